"""What stands between fairseq and the rest: reading its checkpoints."""
