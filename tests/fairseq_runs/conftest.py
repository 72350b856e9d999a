"""What runs fairseq in this process knows the task and the criterion; a process of its own takes --user-dir."""

from hgkd_fairseq import plugin

plugin.register()
