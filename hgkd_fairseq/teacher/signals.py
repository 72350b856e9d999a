"""What a teacher says of a batch."""

from __future__ import annotations

from typing import NamedTuple

from hgkd_fairseq.loss import Head


class Dense(NamedTuple):
    """Features (B, T, D) and output layer of each member of an ensemble: its logits can be made at any temperature, a
    chunk of tokens at a time. No gradient passes through them."""

    heads: list[Head]
