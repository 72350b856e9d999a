#!/usr/bin/env python3
"""Translate and score a trained run: score.py RUN --data DATABIN --reference FILE [--generate OPTIONS] [--cpu].

RUN is fairseq-train's --save-dir, with its output (--log-format json) in train.log. Its checkpoint_best.pt is scored on
the test set. Written to RUN: generate-test.txt (fairseq-generate's), translations.txt (words, in the corpus' order),
translations-lenpen.txt (the same at a length penalty chosen on the validation set), forced.json, inference.json,
temperature.json and scaled.json (hgkd calibration's), and last scores.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from fairseq import options
from fairseq_cli import generate
from sacrebleu.metrics import BLEU, CHRF
from study import SCORES, diverged

import hgkd_fairseq
from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError, guarded
from hgkd_fairseq.evaluation import forced, inference, temperature
from hgkd_fairseq.evaluation.generated import read_lines, read_references, texts, translations
from hgkd_fairseq.plugin import checkpoints

PACKAGES = ("torch", "ve-fairseq", "sacrebleu")
LENGTH_PENALTIES = (0.5, 1.0, 1.5, 2.0, 3.0)


def translate(run: Path, data: str, how: str, cpu: bool, subset: str, results: Path) -> tuple[list[str], list[str]]:
    """The translations of a subset and the references in the data, in words and the subset's order; fairseq-generate's
    own file stays in `results`."""
    arguments = [
        *(data, "--path", str(run / "checkpoint_best.pt"), "--gen-subset", subset, "--results-path", str(results)),
        *("--required-batch-size-multiple", "1", "--max-tokens", "4000", "--no-progress-bar"),
        *("--num-workers", "0"),  # torch may wait 5 s for the end of a worker, as long as the whole translation
        *(["--cpu"] if cpu else []),
        *shlex.split(how),
    ]
    parser = options.get_generation_parser()
    with contextlib.redirect_stdout(sys.stderr):
        generate.main(options.parse_args_and_arch(parser, input_args=arguments))
    lines = read_lines(results / f"generate-{subset}.txt")
    found, gold = translations(lines), texts(lines["T"])
    return [found[index] for index in sorted(found)], [gold[index] for index in sorted(found)]


def translate_test(run: Path, data: str, how: str, cpu: bool, results: Path, count: int, file: str) -> list[str]:
    """The test set's translations in words, which are as many as references; kept in `file` of RUN."""
    found, _ = translate(run, data, how, cpu, "test", results)
    if len(found) != count:
        counts = f"{len(found)} translations for {count} references"
        raise UserError(f"{run}: {counts}; name the text that the data was made from")
    files.write_text(run / file, "".join(f"{line}\n" for line in found))
    return found


def score_lengths(run: Path, data: str, references: list[str], how: str, cpu: bool) -> dict[str, float]:
    """The control of BLEU, as a fitted temperature is that of ECE: the test set translated with the --lenpen of
    LENGTH_PENALTIES that has the highest BLEU on the validation set (against the references in the data)."""
    with tempfile.TemporaryDirectory() as folder:
        valid = {}
        for penalty in LENGTH_PENALTIES:
            found, gold = translate(run, data, f"{how} --lenpen {penalty}", cpu, "valid", Path(folder))
            valid[penalty] = BLEU().corpus_score(found, [gold]).score
        best = max(valid, key=lambda penalty: valid[penalty])
        chosen = translate_test(
            run, data, f"{how} --lenpen {best}", cpu, Path(folder), len(references), "translations-lenpen.txt"
        )
    bleu = BLEU().corpus_score(chosen, [references])
    return {"lenpen": best, "lenpen_bleu": bleu.score, "lenpen_brevity_penalty": bleu.bp}


def curve(log: str) -> list[dict[str, float]]:
    """Of each epoch: updates, validation NLL (bits) and ECE, teacher share in training. Where the run was killed in an
    epoch, that epoch was made twice: the last counts."""
    epochs: dict[int, dict[str, float]] = {}
    wanted = {
        "valid": {"valid_num_updates": "updates", "valid_nll_loss": "valid_nll", "valid_ece": "valid_ece"},
        "train": {"train_teacher_share": "teacher_share"},
    }
    for tag, text in re.findall(r"\| (train|valid) \| (\{.*\})", log):
        try:
            row = json.loads(text)
            point = {name: float(row[key]) for key, name in wanted[tag].items() if key in row}
            if "updates" in point:
                point["updates"] = int(point["updates"])
            epochs.setdefault(int(row["epoch"]), {}).update(point)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue  # a line that another process wrote into
    return [epochs[epoch] for epoch in sorted(epochs) if "updates" in epochs[epoch]]


def score(run: Path, data: str, references: list[str], how: str, cpu: bool) -> dict:
    since = diverged(run)
    if since is not None:
        raise UserError(f"{run} has diverged: from update {since} on its NLL on validation is no number; train it anew")
    best = str(run / "checkpoint_best.pt")
    words = translate_test(run, data, how, cpu, run, len(references), "translations.txt")
    bleu, chrf = BLEU(), CHRF()
    scored = bleu.corpus_score(words, [references])
    found = {
        "bleu": scored.score,
        "brevity_penalty": scored.bp,
        "chrf": chrf.corpus_score(words, [references]).score,
        **score_lengths(run, data, references, how, cpu),
    }
    own = inference.evaluate(str(run / "generate-test.txt"))
    own.write(str(run / "inference.json"))
    gold = forced.evaluate(data, best, cpu=cpu)
    gold.write(str(run / "forced.json"))
    # The control: what one number, fitted on the validation set, would have corrected.
    fitted = temperature.fit(data, best, cpu=cpu).temperature
    files.write_json(run / "temperature.json", {"temperature": fitted})
    scaled = forced.evaluate(data, best, cpu=cpu, temperature=fitted)
    scaled.write(str(run / "scaled.json"))

    points = curve(files.read_text(run / "train.log", "keep there what fairseq-train printed"))
    if not points:
        raise UserError(f"{run}/train.log has no line of a validation; train with --log-format json")
    last = checkpoints.read(run / "checkpoint_last.pt", model=False)
    lowest = min(points, key=lambda point: point.get("valid_nll", math.inf))
    scores = {
        **found,
        "ece": gold["ece"].value,
        "nll": gold["nll"].value,
        "inference_ece": own["ece"].value,
        "temperature": fitted,
        "scaled_ece": scaled["ece"].value,
        "scaled_nll": scaled["nll"].value,
        "valid_nll_best": lowest.get("valid_nll"),
        "valid_nll_last": points[-1].get("valid_nll"),
        "best_updates": lowest["updates"],
        "last_updates": points[-1]["updates"],
        "teacher_share": points[-1].get("teacher_share", 0.0),
        "parameters": gold.about["parameters"],
        "minutes": last.seconds / 60,
        "curve": points,
        "signatures": {
            "bleu": str(bleu.get_signature()),
            "chrf": str(chrf.get_signature()),
            "ece": gold["ece"].signature,
            "inference_ece": own["ece"].signature,
        },
        "versions": {"hgkd_fairseq": hgkd_fairseq.__version__, **{name: metadata.version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
    }
    wrong = files.mismatch(scores, SCORES)
    if wrong:
        raise UserError(f"{run}: {wrong}; the training has diverged, or its log is of another")
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True, metavar="DATABIN", help="folder that prepare_data.sh made")
    parser.add_argument("--reference", required=True, type=Path, metavar="FILE", help="text, one reference a line")
    parser.add_argument("--generate", default="--beam 5", metavar="OPTIONS", help="search options (default: --beam 5)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    def write() -> int:
        references = read_references(args.reference)
        scores = score(args.run, args.data, references, args.generate, args.cpu)
        files.write_json(args.run / "scores.json", scores)
        return 0

    return guarded("score.py: error", write, args.debug)


if __name__ == "__main__":
    sys.exit(main())
