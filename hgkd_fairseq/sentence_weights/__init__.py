"""Weights of training sentences that are learned beside the student (ALM-KD): gate, meta-gradient, refresh, table."""
