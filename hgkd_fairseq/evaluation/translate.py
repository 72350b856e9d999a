"""Translation of a subset by a teacher (`hgkd translate`), in shards that several processes can fill together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig

import hgkd_fairseq
from hgkd_fairseq import files
from hgkd_fairseq.data import translations
from hgkd_fairseq.data.batches import filled
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.data.translations import Hypothesis, Translated
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced
from hgkd_fairseq.evaluation.distil_data import translated_data
from hgkd_fairseq.evaluation.progress import Progress
from hgkd_fairseq.evaluation.sampling import SeededSampling
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.teacher.store import DTYPES

TOGETHER = 16  # batches that are passed to CTranslate2 at a time, so that it can run several in parallel


@dataclass(frozen=True)
class Decoding:
    """Options of the search, with fairseq-generate's names and defaults.

    Two differ from fairseq-generate's: `sampling` draws `nbest` translations per sentence, and `max_tokens` is the
    maximum number of tokens in a batch of padded sources.

    Raises:
        UserError: options contradict each other, or the maximum length allows no translation.
    """

    engine: str = "fairseq"
    beam: int = 5
    nbest: int = 1
    lenpen: float = 1.0
    max_len_a: float = 0.0
    max_len_b: int = 200
    sampling: bool = False
    sampling_topk: int = 0
    sampling_topp: float = 0.0
    seed: int = 1
    max_tokens: int = 4000
    dtype: str = "fp32"
    device: str = "cpu"
    quantization: str | None = None

    def __post_init__(self):
        if self.max_len_a + self.max_len_b < 1:
            given = f"--max-len-a {self.max_len_a:g} and --max-len-b {self.max_len_b}"
            raise UserError(f"{given} leave no room for a translation; raise one")
        if self.nbest > self.beam:
            raise UserError(f"--nbest {self.nbest} is more than --beam {self.beam}; raise --beam")
        if (self.sampling_topk or self.sampling_topp) and not self.sampling:
            raise UserError("--sampling-topk and --sampling-topp are of --sampling; add it")
        if self.sampling and self.engine != "fairseq":
            raise UserError("--sampling needs --engine fairseq: CTranslate2 draws by the order of its batches")
        if self.quantization and self.engine != "ctranslate2":
            raise UserError("--quantization is of --engine ctranslate2; add it")
        if self.dtype != "fp32" and (self.device == "cpu" or self.engine != "fairseq"):
            raise UserError(f"--dtype {self.dtype} needs a GPU and --engine fairseq; leave it out")


class Engine(Protocol):
    """Interface of what translates a batch."""

    def translate(self, sample: dict) -> list[list[Hypothesis]]:
        """Return the hypotheses of each sentence of a fairseq batch, in its order, the best one first."""


class FairseqEngine:
    """Runs fairseq models as fairseq-generate does."""

    def __init__(self, models: Sequence, task, how: Decoding, device: torch.device):
        self.models, self.task, self.how, self.device = models, task, how, device
        for model in models:
            model.to(DTYPES[how.dtype])
            model.make_generation_fast_(beamable_mm_beam_size=None if how.sampling else how.beam, need_attn=False)
        cfg = GenerationConfig(
            beam=how.beam, lenpen=how.lenpen, max_len_a=how.max_len_a, max_len_b=how.max_len_b, nbest=how.nbest
        )
        self.generator = task.build_generator(models, cfg)
        if how.sampling:
            dictionary = task.target_dictionary
            self.generator.search = SeededSampling(dictionary, how.seed, how.sampling_topk, how.sampling_topp)

    def translate(self, sample: dict) -> list[list[Hypothesis]]:
        limit = limit_of(self.how, sample["net_input"]["src_tokens"].size(1), self.generator.max_len - 1)
        symbols = self.task.target_dictionary.symbols
        sample = utils.move_to_cuda(sample) if self.device.type == "cuda" else sample
        found = []
        for best in self.task.inference_step(self.generator, self.models, sample):
            rows = [([symbols[index] for index in one["tokens"].tolist()[:-1]], one["score"]) for one in best]
            rows = rows[: self.how.nbest]
            found.append([Hypothesis(pieces, float(score), len(pieces) >= limit) for pieces, score in rows])
        return found


class CTranslate2Engine:
    """Runs a CTranslate2 model, in a folder that `hgkd export` wrote."""

    def __init__(self, folder: str, task, how: Decoding, longest: int):
        import ctranslate2

        self.task, self.how, self.longest = task, how, longest
        threads = torch.get_num_threads()
        on_cpu = {"inter_threads": threads, "intra_threads": 1} if how.device == "cpu" else {}
        self.translator = ctranslate2.Translator(folder, device=how.device, **on_cpu)

    def translate(self, sample: dict) -> list[list[Hypothesis]]:
        dictionary = self.task.source_dictionary
        padding = dictionary.pad(), dictionary.eos()
        rows = sample["net_input"]["src_tokens"].tolist()
        sources = [[dictionary.symbols[index] for index in row if index not in padding] for row in rows]
        limit = limit_of(self.how, len(rows[0]), self.longest)
        found = self.translator.translate_batch(
            sources,
            beam_size=self.how.beam,
            num_hypotheses=self.how.nbest,
            length_penalty=self.how.lenpen,
            max_decoding_length=limit,
            max_input_length=0,
            return_scores=True,
            max_batch_size=self.how.max_tokens,
            batch_type="tokens",
        )
        return [
            [
                Hypothesis(pieces, score, len(pieces) >= limit)
                for pieces, score in zip(one.hypotheses, one.scores, strict=True)
            ]
            for one in found
        ]


def limit_of(how: Decoding, source: int, longest: int) -> int:
    """Return the maximum number of pieces of a translation, without EOS.

    Args:
        how: options of the search.
        source: padded length of the sources in the batch, as fairseq-generate counts it.
        longest: the model's maximum, without EOS.
    """
    return min(int(how.max_len_a * source + how.max_len_b), longest)


Convert = Callable[[str, str, str | None], AbstractContextManager[str]]
"""(checkpoint, data, quantization): the name of a folder with a CTranslate2 model of it."""


def translate(
    data: str,
    path: str,
    output: str,
    subset: str,
    how: Decoding,
    convert: Convert,
    shard_size: int = 20_000,
    part: tuple[int, int] | None = None,
) -> str:
    """Translate a subset of binarised data to a folder of shards (:mod:`hgkd_fairseq.data.translations`).

    Shards that the folder already contains are not translated again.

    Args:
        data: folder that fairseq-preprocess wrote; its dictionaries must be those of the teacher.
        path: fairseq translation checkpoint, or several joined by ':' (an ensemble).
        output: folder to write; it may be a new one, or one that other processes are filling or have filled in part.
        subset: name of the subset, such as "train".
        how: options of the search.
        convert: converts a checkpoint to a CTranslate2 model.
        shard_size: number of sentences in a shard.
        part: (i, n): translate only the shards i, i + n, ...; None: all shards.

    Returns:
        A line that summarises what was done.

    Raises:
        UserError: a file is missing or cannot be used or written, or the folder was made from other data, or with
            another teacher, other options or other versions of the software.
    """
    paths = split_paths(path)
    if how.engine == "ctranslate2" and len(paths) > 1:
        raise UserError("--engine ctranslate2 translates with one model; average the checkpoints by hgkd export")
    hashes = translations.hashes(data, subset)
    before = [files.identity(file) for file in paths]
    models, task, device = forced.load(data, path, cpu=how.device == "cpu")
    translations.check_pieces(task.target_dictionary)
    dataset = binarised.subset(task, subset, option="--subset")
    longest = utils.resolve_max_positions(task.max_positions(), *[model.max_positions() for model in models])
    with contextlib.ExitStack() as stack:
        engine: Engine
        if how.engine == "fairseq":
            engine = FairseqEngine(models, task, how, device)
        else:
            models.clear()
            converted = stack.enter_context(convert(path, data, how.quantization))
            engine = CTranslate2Engine(converted, task, how, longest[1] - 1)
        manifest = {
            "kind": translations.KIND,
            "subset": subset,
            "source_lang": task.cfg.source_lang,
            "target_lang": task.cfg.target_lang,
            **hashes,
            "teacher": [files.sha256(Path(file)) for file in paths],
            "decoding": asdict(how),
            "versions": versions(how.engine),
        }
        check_same(paths, before)
        shards = Shards.create(output, manifest, len(dataset), shard_size)
        # The teacher's task may truncate or pad sources; the hashes are of those in the data.
        _, plain = translated_data(data, shards)
        worker = Worker(shards, dataset, plain.src, how, longest[0], engine, part)
        shards.fill(worker, part)
    return f"{output}: {worker.progress.end()}"


def check_same(paths: list[str], identities: list[tuple[int, ...] | None]) -> None:
    """Check that checkpoints are the files that they were, so that what was loaded is what a manifest names.

    Raises:
        UserError: one of them is another or gone, as a training may replace its checkpoints.
    """
    for path, known in zip(paths, identities, strict=True):
        if files.identity(path) != known:
            raise UserError(
                f"--teacher-path {path} was replaced or removed while it was loaded; wait until its training has ended"
            )


def versions(engine: str) -> dict[str, str]:
    names = ["torch", "ctranslate2"] if engine == "ctranslate2" else ["torch"]
    return {"hgkd_fairseq": hgkd_fairseq.__version__, **{name: metadata.version(name) for name in names}}


class Worker:
    """Translates the sentences of a shard, as :meth:`Shards.fill` requires it.

    Args:
        shards: folder of shards to fill.
        dataset: sentences as the model reads them.
        sources: sources as they are in the data, (length,) each.
        how: options of the search.
        longest: longest source that the model accepts.
        engine: what translates.
        part: as for :meth:`Shards.fill`.
    """

    def __init__(
        self,
        shards: Shards,
        dataset,
        sources,
        how: Decoding,
        longest: int,
        engine: Engine,
        part: tuple[int, int] | None,
    ):
        self.shards, self.dataset, self.sources, self.how, self.longest = shards, dataset, sources, how, longest
        self.engine = engine
        first, step = part or (0, 1)
        self.mine = range(first, shards.count, step)
        self.progress = Progress(self.sentences(self.mine), self.finished)

    def sentences(self, shards: Iterable[int]) -> int:
        return sum(len(self.shards.numbers(shard)) for shard in shards)

    def finished(self) -> int:
        """Return the number of sentences in finished shards of this command's part, by any process."""
        return self.sentences(shard for shard in self.shards.finished() if shard in self.mine)

    @torch.no_grad()
    def __call__(self, shard: int, folder: Path) -> int:
        self.progress.begin()
        numbers = self.shards.numbers(shard)
        hypotheses: dict[int, list[Hypothesis]] = {}
        for batch in self.batches(numbers):
            sample = self.dataset.collater([self.dataset[number] for number in batch])
            found = self.engine.translate(sample)
            hypotheses |= dict(zip(sample["id"].tolist(), found, strict=True))
            self.progress.add(len(found), sum(one[0].limit for one in found))
        rows = [Translated(one, translations.hash_of(self.sources[one]), hypotheses.get(one, [])) for one in numbers]
        translations.write(folder, rows)
        return len(rows)

    def batches(self, numbers: range) -> Iterator[list[int]]:
        """Yield batches of sentence numbers, sorted by length. The longest come first, so that a batch that does not
        fit into memory fails early; sentences longer than the model accepts are left out."""
        sizes = self.dataset.src_sizes
        taken = [one for one in numbers if sizes[one] <= self.longest]
        most = self.how.max_tokens * (TOGETHER if self.how.engine == "ctranslate2" else 1)
        return filled(sorted(taken, key=lambda one: (-sizes[one], one)), sizes.__getitem__, most)
