"""Commands that run translation models or read their output, and score it."""

from hgkd_fairseq import plugin

plugin.register()  # without it, fairseq evaluates strings in a checkpoint's options as code
