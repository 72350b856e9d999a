"""What runs models, or reads what they wrote, and scores it."""

from hgkd_fairseq import plugin

plugin.register()  # fairseq as it is would run code in a checkpoint's options
