"""The benchmarks run from end to end at toy sizes; what they measure there means nothing."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from command_line import environment

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"


def run(name: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as source:
        return list(csv.DictReader(source))


def test_loss(tmp_path):
    shape = ("--tokens", 64, "--dim", 16, "--vocabulary", 101, "--dtype", "fp32")
    files = ("--csv", tmp_path / "loss.csv", "--markdown", tmp_path / "loss.md")
    # Nothing that is compiled: that takes longer than all the rest.
    run("loss.py", "--time", "--errors", "--rungs", "chunked", "--without", "liger", "--repeats", 7, *shape, *files)
    found = {(row["measure"], row["name"]): row for row in rows(tmp_path / "loss.csv")}
    ours = {f"chunked {work}" for work in ("token", "sentence", "KL", "CE")}
    peers = {f"eager peer {work}" for work in ("token", "sentence", "KL")}
    assert {name for measure, name in found if measure == "time"} >= {"floor", *ours, *peers}
    assert all(float(row["value"]) > 0 for row in found.values())
    assert found["time", "floor"]["over_floor"] == "1.0"
    assert found["time", "chunked token"]["over_ours"] == "1.0"
    for gradient in ("dH", "dW"):
        for peer in ("chunked KL", "eager peer KL"):
            assert float(found[f"error {gradient} norm", peer]["value"]) < 1e-5
    summary = (tmp_path / "loss.md").read_text()
    assert "| time / floor, token | fp32 N=64 d=16 V=101 |" in summary
    assert "| eager peer / ours, sentence |" in summary


def test_flushed(tmp_path):
    run("flushed.py", "--tokens", 32, "--dim", 8, "--vocabulary", 2000, "--markdown", tmp_path / "flushed.md")
    table = [line for line in (tmp_path / "flushed.md").read_text().splitlines() if line.endswith("% |")]
    entries = [float(line.split("|")[2].strip().rstrip(" %")) for line in table]
    assert len(entries) == 3
    assert entries[0] < entries[1] < entries[2]  # with the factor, without, with a mean


def test_step(tmp_path):
    arguments = ("--arch-size", "tiny", "--rungs", "chunked", "--repeats", 7)
    printed = run("step.py", *arguments, "--csv", tmp_path / "step.csv")
    found = {row["name"]: row for row in rows(tmp_path / "step.csv")}
    parts = ["teacher's forward pass", "teacher's output product", "reading the store", "output layer's three products"]
    steps = ["CE, fairseq", "CE, chunked", "KD, chunked", "KD, eager", "KD, chunked, stored", "no output layer"]
    assert list(found) == [*steps, *parts]
    assert all(float(row["median_ms"]) > 0 for row in found.values())
    assert float(found["KD, chunked"]["over_ours"]) == 1
    assert all(0 < float(found[part]["over_ours"]) < 1 for part in parts)
    assert "A step of KD (KD, chunked) over one of CE (fairseq):" in printed
    assert "Without an output layer " in printed


def test_store(data, teacher, plain):
    """A store of fp32 states loses nothing, one of half precision little, and one of few tokens more."""
    paths = ("--teacher-path", teacher.path(), "--student-path", plain.path())
    output = run("store.py", data, *paths, "--teacher-temperature", 1.2, "--topk", 4, "--repeats", 1)
    rows, speeds = (
        [line.strip("| ").split(" | ") for line in table.splitlines()[2:]] for table in output.split("\n\n")
    )
    errors = {kind: float(error) for kind, _, error, _, _ in rows}
    assert list(errors) == ["hidden, fp32", "hidden, bf16", "sampled, 32 draws", "topk, 4"]
    assert errors["hidden, fp32"] < 1e-5 < errors["hidden, bf16"] < 0.02 < errors["topk, 4"]
    assert all(gates.startswith("0 of ") for *_, gates in rows)
    assert [kind for kind, *_ in speeds] == ["fairseq-validate", *errors]
    assert all(float(ratio) > 0 for *_, ratio in speeds)


def test_translate(data, teacher, tmp_path):
    """Each way translates all sentences, fairseq's as fairseq-generate does."""
    ways = ("--ways", "hgkd translate", "hgkd translate, processes")
    options = ("--subset", "valid", "--threads", 2, "--repeats", 1, "--csv", tmp_path / "translate.csv")
    printed = run("translate.py", data, "--teacher-path", teacher.path(), *ways, *options)
    found = rows(tmp_path / "translate.csv")
    assert {(row["way"], row["sentences"]) for row in found} == {(way, "64") for way in ("fairseq-generate", *ways[1:])}
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:]]
    assert [way for way, *_ in lines] == ["fairseq-generate", *ways[1:]]
    assert all(float(speed) > 0 and float(same) == 100 for _, speed, _, same in lines)


def test_load(tmp_path):
    """Some cheap parts; the costs a pair are compared from the CSV file alone."""
    table, sizes = tmp_path / "load.csv", ("--pairs", 40, "--tokens", 8000)
    run("load.py", tmp_path, "--csv", table, *sizes, "--only", "table, look-up", "--kinds", "pair")
    run("load.py", tmp_path, "--csv", tmp_path / "queue.csv", *sizes, "--only", "queue", "--kinds", "pair")
    printed = run("load.py", tmp_path, "--csv", table, *sizes, "--only", "smooth ECE", "--kinds", "token")
    found = rows(table)
    assert [(row["kind"], row["count"]) for row in found] == [("pair", "40"), ("token", "8000")]
    assert all(float(row["seconds"]) > 0 for row in found)
    assert "| sentence weights: table, look-up, save, load |" in printed
    pair = found[0]
    with table.open("a", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(pair))
        for name, costs in {"flat": (1.4, 1.4), "time": (1.6, 1.0), "memory": (1.0, 1.6)}.items():
            for size, (time, memory) in {100_000: (1.0, 1.0), 1_000_000: (10 * costs[0], 10 * costs[1])}.items():
                numbers = {"size": size, "count": size, "seconds": time, "mib": 50 * memory}
                writer.writerow({**pair, **numbers, "name": name})
    notes = {line.split(" | ")[0][2:]: line for line in run("load.py", "--csv", table).splitlines()}
    assert "grows" not in notes["flat"]
    assert notes["time"].endswith("time grows |")
    assert notes["memory"].endswith("memory grows |")


def test_long_training(tmp_path):
    """The slope of the last two thirds, and an interval that holds it where the noise is of minutes."""
    rng = np.random.default_rng(1)
    seconds = np.arange(10, 5410, 10.0)
    noise = np.repeat(rng.normal(0, 2, len(seconds) // 12), 12)  # two minutes long
    mib = np.where(seconds < 1810, 100 + seconds, 500 + 12 * seconds / 3600 + noise)
    lines = [f"{second},{value},0,{second / 10}" for second, value in zip(seconds, mib, strict=True)]
    table = tmp_path / "memory.csv"
    table.write_text("\n".join(["seconds,training_mib,workers_mib,updates", *lines]) + "\n")
    printed = run("long_training.py", "--table", table)
    slope, low, high = map(float, re.search(r"the training,.*\| (\S+) \[(\S+), (\S+)\] \|", printed).groups())
    assert low < 12 < high
    assert low < slope < high
    assert 1 < high - low < 10
    assert "| minutes; updates | 90.0; 540 |" in printed
