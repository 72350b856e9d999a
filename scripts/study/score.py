#!/usr/bin/env python3
"""Translate and score a trained run: score.py RUN --data DATABIN --reference FILE [--generate OPTIONS] [--cpu].

RUN is fairseq-train's --save-dir, with its output (--log-format json) in train.log. Its checkpoint_best.pt is scored on
the test set. Written to RUN: generate-test.txt (fairseq-generate's), translations.txt (words, in the corpus' order),
forced.json, inference.json, temperature.json and scaled.json (hgkd calibration's), and last scores.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch
from fairseq import options
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq_cli import generate
from sacrebleu.metrics import BLEU, CHRF
from study import write_json

import hgkd_fairseq
from hgkd_fairseq.calibration import forced, inference, temperature
from hgkd_fairseq.calibration.pieces import join, mark
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.generated import read_references

PACKAGES = ("torch", "ve-fairseq", "sacrebleu")


def translate(run: Path, data: str, how: str, cpu: bool) -> list[str]:
    """The translations of the test set in words, in the corpus' order; with pieces and scores in generate-test.txt."""
    arguments = [
        *(data, "--path", str(run / "checkpoint_best.pt"), "--gen-subset", "test", "--results-path", str(run)),
        *("--required-batch-size-multiple", "1", "--max-tokens", "4000", "--no-progress-bar"),
        *(["--cpu"] if cpu else []),
        *shlex.split(how),
    ]
    parser = options.get_generation_parser()
    with contextlib.redirect_stdout(sys.stderr):
        generate.main(options.parse_args_and_arch(parser, input_args=arguments))
    rows = inference.read(str(run / "generate-test.txt"))
    marked = mark(row.tokens for row in rows)
    return [" ".join(join(row.tokens, marked)) for row in rows]


def curve(log: str) -> list[dict[str, float]]:
    """Of each epoch: updates, validation NLL (bits) and ECE, teacher share in training. Where the run was killed in an
    epoch, that epoch was made twice: the last counts."""
    epochs: dict[int, dict[str, float]] = {}
    wanted = {
        "valid": {"valid_num_updates": "updates", "valid_nll_loss": "valid_nll", "valid_ece": "valid_ece"},
        "train": {"train_teacher_share": "teacher_share"},
    }
    for tag, text in re.findall(r"\| (train|valid) \| (\{.*\})", log):
        row = json.loads(text)
        point = {name: float(row[key]) for key, name in wanted[tag].items() if key in row}
        if "updates" in point:
            point["updates"] = int(point["updates"])
        epochs.setdefault(row["epoch"], {}).update(point)
    return [epochs[epoch] for epoch in sorted(epochs) if "updates" in epochs[epoch]]


def score(run: Path, data: str, references: list[str], how: str, cpu: bool) -> dict:
    best = str(run / "checkpoint_best.pt")
    translations = translate(run, data, how, cpu)
    if len(translations) != len(references):
        count = f"{len(translations)} translations for {len(references)} references"
        raise UserError(f"{run}: {count}; name the text that the data was made from")
    (run / "translations.txt").write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    bleu, chrf = BLEU(), CHRF()
    found = {
        "bleu": bleu.corpus_score(translations, [references]).score,
        "chrf": chrf.corpus_score(translations, [references]).score,
    }
    own = inference.evaluate(str(run / "generate-test.txt"))
    own.write(str(run / "inference.json"))
    gold = forced.evaluate(data, best, cpu=cpu)
    gold.write(str(run / "forced.json"))
    # The control: what one number, fitted on the validation set, would have mended.
    fitted = temperature.fit(data, best, cpu=cpu).temperature
    write_json(run / "temperature.json", {"temperature": fitted})
    scaled = forced.evaluate(data, best, cpu=cpu, temperature=fitted)
    scaled.write(str(run / "scaled.json"))

    points = curve((run / "train.log").read_text(encoding="utf-8"))
    if not points:
        raise UserError(f"{run}/train.log has no line of a validation; train with --log-format json")
    last = load_checkpoint_to_cpu(str(run / "checkpoint_last.pt"))
    lowest = min(points, key=lambda point: point["valid_nll"])
    return {
        **found,
        "ece": gold["ece"].value,
        "nll": gold["nll"].value,
        "inference_ece": own["ece"].value,
        "temperature": fitted,
        "scaled_ece": scaled["ece"].value,
        "scaled_nll": scaled["nll"].value,
        "valid_nll_best": lowest["valid_nll"],
        "valid_nll_last": points[-1]["valid_nll"],
        "best_updates": lowest["updates"],
        "last_updates": points[-1]["updates"],
        "teacher_share": points[-1].get("teacher_share", 0.0),
        "parameters": gold.about["parameters"],
        "minutes": last["extra_state"]["previous_training_time"] / 60,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True, metavar="DATABIN", help="folder that prepare_data.sh made")
    parser.add_argument("--reference", required=True, type=Path, metavar="FILE", help="text, one reference a line")
    parser.add_argument("--generate", default="--beam 5", metavar="OPTIONS", help="search options (default: --beam 5)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    args = parser.parse_args()
    try:
        references = read_references(args.reference)
        write_json(args.run / "scores.json", score(args.run, args.data, references, args.generate, args.cpu))
    except UserError as error:
        print(f"score.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
