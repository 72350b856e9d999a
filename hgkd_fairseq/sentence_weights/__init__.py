"""Learned weights of training sentences (ALM-KD): the gate, the meta-gradient, the refresh and the weight table."""
