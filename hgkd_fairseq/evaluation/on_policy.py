"""Translation of training sentences by a student during its training, alone or together with its teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fairseq.search import BeamSearch, Search
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from hgkd_fairseq.evaluation.sampling import SeededSampling, placed, uniform
from hgkd_fairseq.plugin import features

MAX_LEN_A, MAX_LEN_B = 1.5, 10  # as fairseq-generate's options: limits of a student that repeats itself


class StudentAndTeacher(EnsembleModel):
    """Ensemble of a student and its teachers for fairseq's search, which sees the student's log-probabilities alone.

    Attributes:
        teacher_logprob: (B, V) logarithms of the teachers' mean probabilities for the same prefixes, at the last step;
            None before the first step.
    """

    def __init__(self, student: torch.nn.Module, teachers: Sequence[torch.nn.Module]):
        super().__init__([student, *teachers])
        self.student, self.teacher = EnsembleModel([student]), EnsembleModel(list(teachers))
        self.teacher_logprob: Tensor | None = None

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        others = self.teacher.forward_decoder(tokens, encoder_outs[1:], incremental_states[1:], temperature)
        self.teacher_logprob = others[0]
        return self.student.forward_decoder(tokens, encoder_outs[:1], incremental_states[:1], temperature)


def accepted(proposed: Tensor, logq: Tensor, most: int, drawn: Tensor) -> Tensor:
    """Accept the tokens that a student proposes, or replace them (Speculative KD: Xu et al., ICLR 2025,
    arXiv:2410.11325).

    A token is accepted if it is among the teacher's `most` most probable ones; otherwise it is replaced by one drawn
    from the teacher's distribution.

    Args:
        proposed: (B,) proposed tokens.
        logq: (B, V) the teacher's log-probabilities, which need not be normalised.
        most: number of tokens that are accepted; a token as probable as the last of them is accepted as well.
        drawn: (B,) numbers in (0, 1) that determine the draws from the teacher's distribution.

    Returns:
        (B,) tokens.
    """
    outside = (logq > logq.gather(1, proposed[:, None])).sum(1) >= most
    sampled = placed(logq.double().softmax(1).cumsum(1), drawn[:, None]).squeeze(1)
    return torch.where(outside, sampled, proposed)


class Speculative(Search):
    """Search in which the teacher replaces tokens of the student that it finds improbable.

    Args:
        dictionary: target dictionary.
        proposals: search that proposes one token per sentence from the student's log-probabilities.
        models: the ensemble that the generator runs.
        most: see :func:`accepted`.
        seed: seed of the draws from the teacher.
    """

    def __init__(self, dictionary, proposals: Search, models: StudentAndTeacher, most: int, seed: int):
        super().__init__(dictionary)
        self.proposals, self.models, self.most, self.seed = proposals, models, most, seed

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """Take a step; arguments and results as of :meth:`SeededSampling.step`, with a beam of 1."""
        _, proposed, beams = self.proposals.step(step, lprobs, scores, prev_output_tokens, original_batch_idxs)
        assert self.models.teacher_logprob is not None
        # What the search forbids the student is forbidden to the teacher: padding, an empty translation, and anything
        # but EOS at the maximum length.
        logq = self.models.teacher_logprob.masked_fill(lprobs[:, 0].isneginf(), -torch.inf)
        drawn = uniform(self.seed, original_batch_idxs, step, torch.ones_like(original_batch_idxs))
        found = accepted(proposed[:, 0], logq, self.most, drawn)[:, None]
        gained = lprobs.gather(-1, found[..., None]).squeeze(-1)
        return gained + scores[:, :, step - 1] if step else gained, found, beams


class Translator:
    """Translates batches with a student, by incremental decoding.

    Args:
        student: fairseq translation model; it is put into eval mode.
        teachers: models whose maximum target lengths also limit that of a translation; with `speculative` they replace
            tokens of the student.
        dictionary: target dictionary.
        beam: beam size; 1: greedy decoding. `sampling` and `speculative` need a beam of 1.
        sampling: sample from the student's distribution; the draws of a sentence depend on the seed and the sentence's
            number alone.
        speculative: number of the teacher's most probable tokens that are accepted from the student, see
            :func:`accepted`; None: all tokens are accepted.
        seed: seed of the draws.
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
        """Return the tokens (T,), EOS included, of the best translation of each sentence of a fairseq batch."""
        return [best[0]["tokens"] for best in self.generator.generate([], sample)]
