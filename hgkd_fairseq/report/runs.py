"""Reading of finished runs: the folder that fairseq-train has saved to, with all files of scores and translations.

All other modules of the report take runs from here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.arguments import TOKENIZERS
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import generated, logs, results, temperature
from hgkd_fairseq.report.names import short_names

GENERATED = "generate-test.txt"
# The files of a run, all optional, and the command that makes each of them, with RUN for the run's folder. The content
# of a .json file is in the field of Run with the name of the file without .json.
FILES = {
    "checkpoint_best.pt": "fairseq-train DATA --save-dir RUN",
    "checkpoint_last.pt": "fairseq-train DATA --save-dir RUN, without --no-last-checkpoints",
    "train.log": "fairseq-train DATA --save-dir RUN 2>&1 | tee -a RUN/train.log",
    GENERATED: "hgkd score DATA RUN",
    "forced.json": "hgkd score DATA RUN",
    "inference.json": "hgkd score DATA RUN",
    "temperature.json": "hgkd score DATA RUN",
    "scaled.json": "hgkd score DATA RUN",
    "inference_scaled.json": "hgkd score DATA RUN",
}
TRAINING = ("checkpoint_best.pt", "checkpoint_last.pt", "train.log")
MODES = {"forced": "forced", "inference": "inference", "scaled": "forced", "inference_scaled": "inference"}


@dataclass
class Run:
    """Content of the files of a run; None for what is missing."""

    folder: Path
    name: str
    missing: list[str] = field(default_factory=list)  # names from FILES
    translations: list[str] | None = None  # text, in the order of the subset
    references: list[str] | None = None  # text, in the same order
    translated: str = ""  # subfolder of the translations, if they are another checkpoint's
    tokenize: str | None = None  # --tokenize of the `hgkd score` that scored the translations; None: unknown
    best_update: int | None = None
    last_update: int | None = None
    minutes: float | None = None  # duration of training, over all resumptions
    log: logs.Log = field(default_factory=logs.Log)
    generation: logs.Log = field(default_factory=logs.Log)
    forced: dict[str, Any] | None = None
    inference: dict[str, Any] | None = None
    scaled: dict[str, Any] | None = None  # scores of mode forced at the fitted temperature
    inference_scaled: dict[str, Any] | None = None  # scores of translations that were made at that temperature
    temperature: dict[str, Any] | None = None


def read_all(folders: Sequence[Path], reference: Path | None = None, translations: str = "") -> list[Run]:
    """Read runs whose translations are of the same test set.

    Args:
        folders: folders of the runs, from which their names are made; see :func:`short_names`.
        reference: text file with one reference per line, which replaces those in the runs' translations.
        translations: subfolder of each run with its translations, as `hgkd score --checkpoint NAME` makes it; "": the
            run's folder itself.

    Raises:
        UserError: a run is named twice, a folder is not a run, a file in it cannot be used, or the translations are of
            different test sets or were scored with different tokenizers.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    runs = [read(folder, name, translations) for folder, name in zip(folders, short_names(folders), strict=True)]
    translated = [run for run in runs if run.translations is not None]
    if reference is not None:
        given = generated.read_references(reference)
        for run in translated:
            count = len(run.translations or ())
            if count != len(given):
                raise UserError(
                    f"{run.folder / translations / GENERATED} has {count} translations and {reference} {len(given)} "
                    "lines; name the references of its subset with --reference, and generate with "
                    "--required-batch-size-multiple 1"
                )
            run.references = given
    referenced = [run for run in translated if run.references is not None]
    for run in referenced[1:]:
        if run.references != referenced[0].references:
            raise UserError(
                f"{run.folder} and {referenced[0].folder} were translated from different test sets; generate both "
                "from one"
            )
    tokenized = [run for run in translated if run.tokenize is not None]
    for run in tokenized[1:]:
        if run.tokenize != tokenized[0].tokenize:
            raise UserError(
                f"{run.folder} was scored with --tokenize {run.tokenize} and {tokenized[0].folder} with --tokenize "
                f"{tokenized[0].tokenize}; score both with one: hgkd score --tokenize NAME"
            )
    return runs


def read(folder: Path, name: str, translations: str = "") -> Run:
    """Read a run; arguments as in :func:`read_all`.

    Raises:
        UserError: the folder is not a run, or a file in it cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the --save-dir of a run of fairseq-train")
    generation = folder / translations
    if translations and not (generation / GENERATED).exists():
        raise UserError(
            f"--translations {translations}: {generation / GENERATED} does not exist; write it: hgkd score DATA "
            f"{folder} --checkpoint {translations}"
        )
    places = {**dict.fromkeys(FILES, folder), GENERATED: generation, **dict.fromkeys(TRAINING, trained(folder))}
    missing = [file for file in FILES if not (places[file] / file).exists()]
    run = Run(folder, name, missing, translated=translations)
    if len(run.missing) == len(FILES):
        raise UserError(
            f"{folder} is no run: it holds none of {', '.join(FILES)}; name the --save-dir of a run of fairseq-train"
        )
    for place in [*(places[file] / file for file in FILES), generation / "generate.log"]:
        if place.exists():
            files.refuse_irregular(place, "remove it")
    if GENERATED not in run.missing:
        run.translations, run.references = generated.read_texts(generation / GENERATED)
        run.tokenize = tokenizer(generation / "scores.json")
    run.best_update, _ = progress(run, places["checkpoint_best.pt"] / "checkpoint_best.pt")
    run.last_update, run.minutes = progress(run, places["checkpoint_last.pt"] / "checkpoint_last.pt")
    if "train.log" not in run.missing:
        run.log = logs.read(places["train.log"] / "train.log")
    for file in ("generate.log", GENERATED):  # with --results-path, fairseq only prints its settings
        if (generation / file).exists() and not run.generation.settings:
            run.generation = logs.read(generation / file)
    for key, mode in MODES.items():
        if f"{key}.json" not in run.missing:
            setattr(run, key, scores(folder / f"{key}.json", mode))
    if "temperature.json" not in run.missing:
        run.temperature = temperature.read_file(folder / "temperature.json")
        fitted, used = run.temperature["temperature"], (run.scaled or run.temperature)["temperature"]
        if used != fitted:
            raise UserError(
                f"{folder / 'scaled.json'} was measured at temperature {used:.4g} and {folder / 'temperature.json'} "
                f"says {fitted:.4g}; write scaled.json again"
            )
    return run


def tokenizer(file: Path) -> str | None:
    """Return the tokenizer in the signature of BLEU in a scores.json of `hgkd score`.

    None if there is no such file, or no such signature in it.

    Raises:
        UserError: the file cannot be used, or names an unknown tokenizer.
    """
    if not file.exists():
        return None
    files.refuse_irregular(file, "remove it")
    found = files.read_json(file, {"signatures?": {"bleu?": str}}, "file of `hgkd score`")
    named = re.search(r"\btok:([^|]*)", found.get("signatures", {}).get("bleu", ""))
    if named and named[1] not in TOKENIZERS:
        raise UserError(f"{file} names the tokenizer {named[1]}, which hgkd score has not; score the run again")
    return named[1] if named else None


def trained(folder: Path) -> Path:
    """Return the folder that the training has saved to.

    It is the folder itself, or RUN if the folder is RUN/NAME, RUN/SRC-TGT or RUN/SRC-TGT/NAME, which `hgkd score` makes
    for a checkpoint or a language pair.
    """
    above = folder.resolve().parents[:2] if (folder / "scores.json").exists() else ()
    return next((one for one in (folder, *above) if any((one / file).exists() for file in TRAINING)), folder)


def progress(run: Run, file: Path) -> tuple[int | None, float | None]:
    """Return the updates and the minutes of training at which a checkpoint was saved; None if they are not known."""
    from hgkd_fairseq.plugin import checkpoints

    if file.name in run.missing:
        return None, None
    found = checkpoints.read(file, model=False)
    return found.updates, None if found.seconds is None else found.seconds / 60


def scores(file: Path, mode: str) -> dict[str, Any]:
    found = results.read(file)
    if found["mode"] != mode:
        raise UserError(
            f"{file} holds scores of `hgkd calibration {found['mode']}`; write it again: {FILES[file.name]}"
        )
    return found
