#!/usr/bin/env python3
"""One table of finished runs, side by side: BLEU, chrF, forced ECE, parameters, updates, minutes.

Each RUN is a folder with checkpoint_best.pt and checkpoint_last.pt (fairseq-train), generate-test.txt
(fairseq-generate --results-path RUN) and forced.json (hgkd calibration forced --json). The table is markdown, so that
a README can hold what this script wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

import hgkd_fairseq.compat
from hgkd_fairseq.errors import UserError


def hypotheses(file: Path, count: int) -> list[str]:
    """The 1-best translations in the order of the corpus: `H-<index> TAB score TAB text` lines."""
    found: dict[int, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("H-"):
            index, _, text = line[2:].split("\t", 2)
            found[int(index)] = text
    missing = [index for index in range(count) if index not in found]
    if missing or len(found) != count:
        raise UserError(
            f"{file} has {len(found)} translations for {count} references "
            f"(first one missing: {missing[0] if missing else 'none'}); run fairseq-generate again"
        )
    return [found[index] for index in range(count)]


def training(run: Path) -> tuple[int, int, float]:
    """(updates of the best checkpoint, of the last one, minutes of training over all resumptions)."""
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    best, last = (load_checkpoint_to_cpu(str(run / f"checkpoint_{which}.pt")) for which in ("best", "last"))
    updates = [state["optimizer_history"][-1]["num_updates"] for state in (best, last)]
    return updates[0], updates[1], last["extra_state"]["previous_training_time"] / 60


def table(runs: list[Path], references: list[str]) -> str:
    bleu, chrf = BLEU(), CHRF()
    signature = ""
    rows = [
        "| model | BLEU | chrF | ECE, % | NLL, bits | parameters | updates (best) | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        translations = hypotheses(run / "generate-test.txt", len(references))
        forced = json.loads((run / "forced.json").read_text())
        best, last, minutes = training(run)
        rows.append(
            f"| {run.name} | {bleu.corpus_score(translations, [references]).score:.1f} "
            f"| {chrf.corpus_score(translations, [references]).score:.1f} | {100 * forced['ece']:.2f} "
            f"| {forced['nll']:.3f} | {forced['parameters']:,} | {last:,} ({best:,}) | {minutes:.1f} |"
        )
        signature = forced["signature"]
    rows += [
        "",
        f"BLEU `{bleu.get_signature()}`, chrF `{chrf.get_signature()}`, ECE `{signature}`; all on the test set.",
    ]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--reference", required=True, type=Path, help="text file, one reference a line")
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    hgkd_fairseq.compat.apply()
    references = args.reference.read_text(encoding="utf-8").splitlines()
    try:
        result = table(args.runs, references)
    except UserError as error:
        print(f"score_runs.py: {error}", file=sys.stderr)
        return 1
    print(result)
    if args.output:
        args.output.write_text(result + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
