#!/usr/bin/env python3
"""Compare the speed of `hgkd translate` with that of fairseq-generate with the same search options.

    translate.py DATA --teacher-path CKPT [--subset train] [--beam 5] [--threads 2] [--repeats 7] [--csv FILE]

Each run is a whole command on the CPU, in a new process and with a new output folder; the commands alternate in random
order. The time includes loading the model, which dominates with few sentences. "processes" runs one single-threaded
process per thread, all on the same folder. The table shows sentences per second, the ratio to fairseq-generate, and the
percentage of translations that are equal to those of fairseq-generate.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import append_csv, cpu_model, markdown, median_ratio, version

import hgkd_fairseq
from hgkd_fairseq.data import translations
from hgkd_fairseq.errors import UserError, guarded
from hgkd_fairseq.evaluation import generated

PEER = "fairseq-generate"
WAYS = {  # additional options of hgkd translate, and whether several processes share the output folder
    "hgkd translate": ([], False),
    "hgkd translate, processes": (["--shard-size", "1000"], True),
    "CTranslate2": (["--engine", "ctranslate2"], False),
    "CTranslate2, int8": (["--engine", "ctranslate2", "--quantization", "int8"], False),
}


def run(commands: list[list[str]], threads: int, log: Path) -> float:
    """Run commands concurrently and return the seconds until all have ended.

    Raises:
        UserError: a command fails; the message contains the end of the log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    begin = time.perf_counter()
    with log.open("w") as out:
        running = [subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment) for words in commands]
        failed = [words[0] for words, one in zip(commands, running, strict=True) if one.wait()]
    if failed:
        raise UserError(f"{failed[0]} failed: {log.read_text()[-2000:]}")
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, way: str, folder: Path) -> tuple[float, list[list[str]]]:
    """Translate the subset once; return the seconds and the pieces of the best translation of each sentence."""
    log, output = folder / "log", folder / "translations"
    search = ["--beam", args.beam, "--max-len-a", 1.5, "--max-len-b", 10, "--max-tokens", args.max_tokens, "--cpu"]
    bin = Path(sys.executable).parent
    if way == PEER:
        words = [bin / PEER, args.data, "--path", args.teacher_path, "--gen-subset", args.subset, *search]
        # --user-dir lets recent torch versions load the checkpoint. With a larger batch size multiple, fairseq may drop
        # the sentences of the last batch.
        words += ["--user-dir", Path(hgkd_fairseq.__file__).parent, "--required-batch-size-multiple", 1]
        seconds = run([list(map(str, words))], args.threads, log)
        found = generated.read_lines(log)["H"]
        return seconds, [generated.split(found[number]) for number in sorted(found)]
    more, shared = WAYS[way]
    words = [bin / "hgkd", "translate", args.data, "--teacher-path", args.teacher_path, "--subset", args.subset]
    command = list(map(str, [*words, *search, "--output", output, *more]))
    processes, threads = (args.threads, 1) if shared else (1, args.threads)
    seconds = run([command] * processes, threads, log)
    read = translations.read(translations.opened(str(output)))
    return seconds, [one.hypotheses[0].pieces if one.hypotheses else [] for one in read]


def show(args: argparse.Namespace) -> int:
    order = [PEER, *args.ways]
    seconds: dict[str, list[float]] = {way: [] for way in order}
    for _ in range(args.repeats):
        pieces = {}
        for way in random.sample(order, len(order)):
            with tempfile.TemporaryDirectory() as folder:
                taken, pieces[way] = measure(args, way, Path(folder))
            seconds[way].append(taken)
            if args.csv:
                about = {"cpu": cpu_model(), "torch": version("torch"), "ctranslate2": version("ctranslate2")}
                row = {"way": way, "sentences": len(pieces[way]), "threads": args.threads, "beam": args.beam}
                append_csv(args.csv, [about | row | {"seconds": f"{taken:.2f}"}])
    table = []
    for way in order:
        speed = len(pieces[PEER]) / statistics.median(seconds[way])
        ratio = median_ratio(seconds[PEER], seconds[way])
        same = sum(one == other for one, other in zip(pieces[way], pieces[PEER], strict=True)) / len(pieces[PEER])
        table.append([way, f"{speed:.1f}", f"{ratio:.2f}", f"{100 * same:.1f}"])
    print(markdown(["", "sentences/s", f"over {PEER}", "the same, %"], table), end="")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("--teacher-path", required=True, metavar="CKPT")
    parser.add_argument("--subset", default="train")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    return guarded("translate.py: error", lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
