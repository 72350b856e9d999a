"""A student translates training sentences, alone or with its teacher's help."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fairseq.search import BeamSearch, Search
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from hgkd_fairseq.evaluation.sampling import SeededSampling, placed, uniform
from hgkd_fairseq.plugin import features

MAX_LEN_A, MAX_LEN_B = 1.5, 10  # of a translation, as in fairseq-generate: a student that loops costs no more


class StudentAndTeacher(EnsembleModel):
    """fairseq's ensemble of a student and its teachers: the student's probabilities decide, and the teachers' mean of
    the same prefixes is kept beside them, `teacher_logprob` (B, V)."""

    def __init__(self, student: torch.nn.Module, teachers: Sequence[torch.nn.Module]):
        super().__init__([student, *teachers])
        self.student, self.teacher = EnsembleModel([student]), EnsembleModel(list(teachers))
        self.teacher_logprob: Tensor | None = None

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        others = self.teacher.forward_decoder(tokens, encoder_outs[1:], incremental_states[1:], temperature)
        self.teacher_logprob = others[0]
        return self.student.forward_decoder(tokens, encoder_outs[:1], incremental_states[:1], temperature)


def accepted(proposed: Tensor, logq: Tensor, most: int, drawn: Tensor) -> Tensor:
    """(B,) what stands in a translation in place of what a student proposes (Speculative KD: Xu et al., ICLR 2025,
    arXiv:2410.11325): that, where it is one of the teacher's `most` most probable types, else one drawn
    from the teacher's distribution.

    Args:
        proposed: (B,) types.
        logq: (B, V) the teacher's log-probabilities; they need not sum to 1.
        most: types; of equally probable ones none counts against another.
        drawn: (B,) numbers of (0, 1) that choose from the teacher's distribution.
    """
    outside = (logq > logq.gather(1, proposed[:, None])).sum(1) >= most
    sampled = placed(logq.double().softmax(1).cumsum(1), drawn[:, None]).squeeze(1)
    return torch.where(outside, sampled, proposed)


class Speculative(Search):
    """A student's proposals, of which the teacher's types replace some.

    Args:
        proposals: gives one type a sentence.
        models: what the search is made with.
        most: see :func:`accepted`.
        seed: of what is drawn.
    """

    def __init__(self, dictionary, proposals: Search, models: StudentAndTeacher, most: int, seed: int):
        super().__init__(dictionary)
        self.proposals, self.models, self.most, self.seed = proposals, models, most, seed

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """As :meth:`SeededSampling.step`, for a beam of 1."""
        _, proposed, beams = self.proposals.step(step, lprobs, scores, prev_output_tokens, original_batch_idxs)
        assert self.models.teacher_logprob is not None
        # What the search forbids the student, pads and too late an end, it forbids the teacher.
        logq = self.models.teacher_logprob.masked_fill(lprobs[:, 0].isneginf(), -torch.inf)
        drawn = uniform(self.seed, original_batch_idxs, step, torch.ones_like(original_batch_idxs))
        found = accepted(proposed[:, 0], logq, self.most, drawn)[:, None]
        gained = lprobs.gather(-1, found[..., None]).squeeze(-1)
        return gained + scores[:, :, step - 1] if step else gained, found, beams


class Translator:
    """Translates batches with incremental states.

    Args:
        student: a fairseq model, without dropout.
        teachers: their positions limit the length; and for `speculative` they help.
        dictionary: of the target.
        beam: 1 is greedy.
        sampling: draws a translation from the student's distribution instead; what is drawn for a sentence depends on
            the seed and its number alone.
        speculative: the teacher's most probable types that are accepted of the student; None: all.
        seed: of what is drawn.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teachers: Sequence[torch.nn.Module],
        dictionary,
        beam: int = 1,
        sampling: bool = False,
        speculative: int | None = None,
        seed: int = 1,
    ):
        search: Search = BeamSearch(dictionary)
        if beam == 1:
            search = SeededSampling(dictionary, seed, topk=0 if sampling else 1)
        models = EnsembleModel([student])
        if speculative:
            models = StudentAndTeacher(student, teachers)
            search = Speculative(dictionary, search, models, speculative, seed)
        longest = min(features.max_positions(model)[1] for model in (student, *teachers))
        self.generator = SequenceGenerator(
            models, dictionary, beam, MAX_LEN_A, MAX_LEN_B, longest, search_strategy=search
        )

    def __call__(self, sample: dict) -> list[Tensor]:
        """Tokens (T,) of each sentence of a batch of fairseq's, in its order, with the end of sentence."""
        return [best[0]["tokens"] for best in self.generator.generate([], sample)]
