"""One teacher per language pair (Tan et al., ICLR 2019, arXiv:1902.10461): --teacher-path de-en=T1,fr-en=T2."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head
from hgkd_fairseq.loss.eager import logits
from hgkd_fairseq.teacher.live import LiveTeacher
from hgkd_fairseq.teacher.signals import Dense

PAIR = re.compile(r"([^=,-]+-[^=,-]+)=([^,]+)(?:,|$)")


def paths(given: str, pairs: Sequence[str]) -> list[str] | None:
    """Parse a value of --teacher-path of the form PAIR=CKPT,PAIR=CKPT.

    Args:
        given: value of the option.
        pairs: language pairs of the task.

    Returns:
        The checkpoint of each pair, in the order of `pairs`; None if the value does not have that form or names none of
        the pairs.

    Raises:
        UserError: a pair is missing, named twice, or not one of the task's.
    """
    named = PAIR.findall(given)
    found = dict(named)
    if not set(found) & set(pairs) or "".join(PAIR.split(given)[::3]):
        return None
    if set(found) != set(pairs) or len(found) < len(named):
        raise UserError(
            f"--teacher-path {given} names teachers of {', '.join(pair for pair, _ in named)}, and the language pairs "
            f"are {', '.join(pairs)}; name one for each, or one for all"
        )
    return [found[pair] for pair in pairs]


class TeacherOfEachPair(LiveTeacher):
    """A :class:`LiveTeacher` that uses for each sentence the model of the sentence's language pair.

    The models' features and output layers are concatenated, with zeros in the features of the other models, so that one
    matrix product computes the logits of the batch. It costs as much as the products of all models.

    Args:
        paths: checkpoint of each pair, in the order of the task's pairs; several pairs may share a checkpoint.
        *args, **kwargs: further arguments of :class:`LiveTeacher`.

    Raises:
        UserError: as of :class:`LiveTeacher`, and if a model's dictionaries differ from the student's.
    """

    def __init__(self, paths: Sequence[str], *args, **kwargs):
        files = list(dict.fromkeys(paths))
        super().__init__(files, *args, **kwargs)
        self.of_pair = [files.index(path) for path in paths]
        if self.reindexed:
            raise UserError(
                f"--teacher-path {', '.join(files)}: teachers of single pairs need the student's own dictionaries; "
                "name one teacher for all pairs, or preprocess the data with the teachers' dictionaries"
            )
        self.layer: tuple[object, Head] | None = None  # cache: (device, dtype), and the concatenated output layers

    @property
    def fingerprint(self) -> str:
        return f"for each pair: {' '.join(self.hashes[place] for place in self.of_pair)}"

    @torch.no_grad()
    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        of_pair = torch.tensor(self.of_pair, device=device)
        which = of_pair[sample["pair"].to(device)]  # (B,) index of each sentence's model
        heads, rows = [], []
        for place, model in enumerate(self.placed(device, dtype)):
            mine = (which == place).nonzero().squeeze(1)
            # A model without sentences runs on one sentence, because the width of its features is needed.
            asked = mine if len(mine) else torch.zeros(1, dtype=torch.int64, device=device)
            net_input = {
                name: value[asked] if isinstance(value, Tensor) else value
                for name, value in sample["net_input"].items()
            }
            head, _ = self.heads(model, net_input)
            heads.append(head._replace(hidden=head.hidden[: len(mine)]))
            rows.append(mine)
        return Dense([self.joined(heads, rows, sample["target"].shape)])

    def joined(self, heads: list[Head], rows: list[Tensor], shape: torch.Size) -> Head:
        """Combine the models' heads into one head for the whole batch.

        Args:
            heads: head of each model, for its sentences only.
            rows: indices in the batch of each model's sentences.
            shape: (B, T) of the batch.

        Returns:
            A head with hidden (B, T, D), where D is the sum of the models' widths (and 1 for each bias); a sentence's
            features are 0 in the columns of the other models. If a model has no linear output layer, `hidden` contains
            logits (B, T, V).
        """
        if any(head.weight is None for head in heads):
            parts = [logits(head) for head in heads]
            whole = parts[0].new_zeros(*shape, parts[0].size(-1))
            for part, mine in zip(parts, rows, strict=True):
                whole[mine] = part
            return Head(whole, None)
        widths = [head.hidden.size(-1) + (head.bias is not None) for head in heads]
        hidden = heads[0].hidden.new_zeros(*shape, sum(widths))
        start = 0
        for head, mine, width in zip(heads, rows, widths, strict=True):
            hidden[mine, :, start : start + head.hidden.size(-1)] = head.hidden
            if head.bias is not None:
                hidden[mine, :, start + width - 1] = 1
            start += width
        return self.layers(heads)._replace(hidden=hidden)

    def layers(self, heads: list[Head]) -> Head:
        kept = (heads[0].hidden.device, heads[0].hidden.dtype)
        if self.layer is None or self.layer[0] != kept:
            columns = [
                one for head in heads for one in (head.weight, None if head.bias is None else head.bias[:, None])
            ]
            weight = torch.cat([one for one in columns if one is not None], 1)
            self.layer = kept, Head(weight[:0], weight)
        return self.layer[1]
