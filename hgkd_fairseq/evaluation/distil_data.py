"""Training data from a teacher's translations (`hgkd distil-data`): selection of a hypothesis per sentence, filters and
a summary of the quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF

from hgkd_fairseq import files
from hgkd_fairseq.data import distilled, translations
from hgkd_fairseq.data.distilled import REFERENCE, TRANSLATION, Row
from hgkd_fairseq.data.filters import CODES, REASONS, Filters
from hgkd_fairseq.data.shards import Shards, hashed
from hgkd_fairseq.data.translations import Hypothesis, Translated, hash_of
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import generated, selection
from hgkd_fairseq.evaluation.backward import BackwardModel
from hgkd_fairseq.plugin import binarised

MEASURED = 20_000  # maximum number of sentences, evenly spaced, for BLEU and chrF in the summary


@dataclass(frozen=True)
class Choice:
    """Options that decide which translations become training data.

    Attributes:
        select: which hypothesis of a sentence is used. "best": the one with the teacher's best score; "bleu", "chrf":
            the one with the highest sentence-level score against the reference (sequence-level interpolation: Kim and
            Rush, EMNLP 2016, section 3.3); "scores:FILE": the one with the highest score in a file of one number per
            line, one line for each hypothesis, in order.
        filters: filters that drop sentences.
        mix_original: fraction of the sentences whose references are added.
        backward: checkpoint of a model of the opposite direction, or several joined by ':'; None: no such model.
        max_tokens: maximum number of tokens in a batch of the backward model.
        cpu: run the backward model on the CPU even if a GPU is available.
    """

    select: str = "best"
    filters: Filters = field(default_factory=Filters)
    mix_original: float = 0.0
    backward: str | None = None
    max_tokens: int = 4000
    cpu: bool = False


def distil(folder: str, data: str, output: str, choice: Choice) -> str:
    """Write binarised training data made of a teacher's translations.

    Args:
        folder: folder that `hgkd translate` filled.
        data: folder of the data that it translated.
        output: folder to create. Besides the binarised data it holds sentences.tsv (where each row comes from),
            dropped.tsv (the reasons), summary.md and distilled.json (options, and hashes of the files).
        choice: selection of hypotheses and sentences.

    Returns:
        The summary, in Markdown.

    Raises:
        UserError: the translations are unfinished, damaged, of other data or not of the subset train; the selection
            needs several hypotheses per sentence and there is one; a sentence has changed since it was translated; the
            backward model or the file of scores cannot be used; nothing is left to train on; `output` exists.
    """
    shards = translations.opened(folder, data)
    if (subset := shards.manifest["subset"]) != "train":
        raise UserError(f"{folder} has translations of {subset}: only train is distilled, what is measured on is not")
    if choice.select != "best" and shards.manifest.get("decoding", {}).get("nbest") == 1:
        raise UserError(
            f"--select {choice.select} chooses among several translations of a sentence, and {folder} has one of each: "
            "translate with --nbest 5, say, or leave --select out"
        )
    task, dataset = translated_data(data, shards)
    chosen = Chosen(shards, task, dataset, choice)
    with files.writing_folder(output) as unfinished:
        chosen.examine()
        count = distilled.write(unfinished, data, task, subset, chosen.rows())
        with files.writing(unfinished / distilled.DROPPED) as stream:
            stream.write("sentence\treason\n")
            names = ["", *REASONS]
            stream.writelines(f"{one}\t{names[chosen.reasons[one]]}\n" for one in np.flatnonzero(chosen.reasons))
        summary = chosen.summary(count)
        files.write_text(unfinished / distilled.SUMMARY, summary)
        options = asdict(choice)
        options["filters"]["off"] = sorted(choice.filters.off)
        made = {"manifest": shards.manifest, "choice": options, "files": hashed(unfinished)}
        files.write_json(unfinished / distilled.RECORD, made)
    return summary


def translated_data(data: str, shards: Shards):
    """Load the data that were translated.

    Args:
        data: folder that fairseq-preprocess wrote.
        shards: translations of it, whose manifest names the subset and the languages.

    Returns:
        (task, dataset): fairseq's translation task, and the subset.

    Raises:
        UserError: the data cannot be read.
    """
    about = shards.manifest
    wanted = {key: about[key] for key in ("source_lang", "target_lang")}
    task = binarised.translation_task(data, str(shards.folder), {"train_subset": about["subset"], **wanted})
    return task, binarised.subset(task, about["subset"])


class Chosen:
    """Selection of a hypothesis for each of N sentences, and of the sentences that are kept.

    Attributes:
        reasons: (N,) reasons why sentences are dropped, values of filters.CODES; 0: kept.
        ranks: (N,) ranks of the selected hypotheses among those of their sentences.
    """

    def __init__(self, shards: Shards, task, dataset, choice: Choice):
        self.shards, self.task, self.dataset, self.choice = shards, task, dataset, choice
        self.reasons = np.zeros(len(dataset), np.int8)
        self.ranks = np.zeros(len(dataset), np.int16)
        self.scores = np.zeros(len(dataset))  # by the teacher, of the selected hypotheses
        self.copies = np.zeros(len(dataset), bool)
        self.ratios = np.zeros(len(dataset))
        self.texts: list[tuple[int, list[str], list[str]]] = []  # number, translation, reference

    def sentences(self) -> Iterator[Translated]:
        """Yield all sentences in order, after checking that each source is the one that was translated.

        Raises:
            UserError: a source differs, or a shard is damaged or missing; the message names the first one.
        """
        for one in translations.read(self.shards):
            if one.source != hash_of(self.dataset.src[one.number]):
                raise UserError(
                    f"sentence {one.number} of {self.shards.folder} was another one when it was translated: lines have "
                    "moved; translate these data anew"
                )
            yield one

    def source(self, number: int) -> list[str]:
        symbols = self.task.source_dictionary.symbols
        return [symbols[index] for index in self.dataset.src[number].tolist()[:-1]]

    def reference(self, number: int) -> list[str]:
        return generated.reference(self.task.target_dictionary, self.dataset.tgt[number].tolist())

    def chosen(self, one: Translated) -> Hypothesis | None:
        return one.hypotheses[self.ranks[one.number]] if one.hypotheses else None

    def examine(self) -> None:
        """Select a hypothesis for each sentence, and decide which sentences are kept.

        Raises:
            UserError: the translations, the file of scores or the backward model cannot be used.
        """
        filters, backward = self.choice.filters, None
        # The model is loaded first, so that one that cannot be used is reported early.
        if self.choice.backward and "backward" not in filters.off:
            backward = BackwardModel(self.choice.backward, self.task, self.choice.max_tokens, self.choice.cpu)
        select = selection.make(self.choice.select, self.reference)
        unknown = self.task.target_dictionary.unk_word
        every = max(-(-len(self.dataset) // MEASURED), 1)
        for one in self.sentences():
            number = one.number
            self.ranks[number] = select(one.number, one.hypotheses) if one.hypotheses else 0
            hypothesis, source = self.chosen(one), self.source(number)
            self.reasons[number] = CODES.get(filters.reason(source, hypothesis, unknown) or "", 0)
            if hypothesis is not None:
                self.scores[number] = hypothesis.score
                self.copies[number] = "".join(hypothesis.pieces) == "".join(source)
                self.ratios[number] = len(hypothesis.pieces) / max(len(source), 1)
                if number % every == 0:
                    self.texts.append((number, hypothesis.pieces, self.reference(number)))
        if isinstance(select, selection.ByFile):
            select.end()
        filters.worst("score", self.reasons, self.scores)
        if backward:
            scores = np.zeros(len(self.dataset))
            for number, score in backward.scores(self.kept(), self.dataset.src):
                scores[number] = score
            filters.worst("backward", self.reasons, scores)

    def kept(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield the sentence number, rank and token ids (T,) of each translation that is kept.

        Raises:
            UserError: a piece is not in the target dictionary.
        """
        for one in self.sentences():
            if not self.reasons[one.number]:
                rank = int(self.ranks[one.number])
                try:
                    ids = distilled.ids_of(one.hypotheses[rank].pieces, self.task.target_dictionary)
                except KeyError as error:
                    raise UserError(
                        f"sentence {one.number} of {self.shards.folder} has the piece {error}, which is not in the "
                        "dictionary"
                    ) from None
                yield one.number, rank, ids

    def rows(self) -> Iterator[Row]:
        """Yield the training pairs, kept translations and added references, in the order of the sentences."""
        count = round(self.choice.mix_original * len(self.dataset))
        drawn = sorted(np.random.default_rng(1).permutation(len(self.dataset))[:count].tolist(), reverse=True)
        for number, rank, ids in self.kept():
            while drawn and drawn[-1] < number:
                yield self.reference_row(drawn.pop())
            yield Row(number, TRANSLATION, rank, ids)
        while drawn:
            yield self.reference_row(drawn.pop())

    def reference_row(self, number: int) -> Row:
        return Row(number, REFERENCE, 0, self.dataset.tgt[number])

    def summary(self, rows: int) -> str:
        """Return the summary in Markdown: sentences dropped by reason, and quality before and after filtering.

        Args:
            rows: number of training pairs, including the added references.
        """
        kept, there = self.reasons == 0, self.reasons != CODES["skipped"]
        lines = ["| dropped | sentences | |", "|---|---:|---|"]
        counts = np.bincount(self.reasons, minlength=len(REASONS) + 1)
        lines += [f"| {name} | {counts[code]:,} | {REASONS[name]} |" for name, code in CODES.items() if counts[code]]
        lines += [f"| all | {len(kept) - counts[0]:,} of {len(kept):,} | |", ""]
        lines.append(f"| {self.choice.select} | translations | copies, % | length ratio | BLEU | chrF |")
        lines.append("|---|---:|---:|---:|---:|---:|")
        bleu, chrf = BLEU(), CHRF()
        for name, part in (("before", there), ("kept", kept)):
            texts = [(pieces, reference) for number, pieces, reference in self.texts if part[number]]
            if not texts:
                continue
            found, references = (generated.joined(column) for column in zip(*texts, strict=True))
            scores = [f"{metric.corpus_score(found, [references]).score:.2f}" for metric in (bleu, chrf)]
            copies, ratio = 100 * self.copies[part].mean(), self.ratios[part].mean()
            lines.append(f"| {name} | {part.sum():,} | {copies:.2f} | {ratio:.3f} | {' | '.join(scores)} |")
        lines += [
            "",
            f"{rows:,} rows, {rows - counts[0]:,} of them references. Length ratio: pieces over the source's.",
        ]
        about = f"BLEU `{bleu.get_signature()}` and chrF `{chrf.get_signature()}`: against the references"
        lines.append(f"{about}, of {len(self.texts):,} sentences and of those of them that are kept.")
        return "\n".join(lines) + "\n"
