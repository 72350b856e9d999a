"""Registers the plugin for tests that run fairseq in this process; other processes are given --user-dir."""

from hgkd_fairseq import plugin

plugin.register()
