"""Helpers that run fairseq's commands on a small corpus and read their output."""

import atexit
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
USER_DIR = ("--user-dir", str(ROOT / "hgkd_fairseq"))
BIN = Path(sys.executable).parent
# Processes at a time. Each runs on one thread, and the tests are meant for 2 cores.
AT_ONCE = 2
TIMEOUT_S = 240

SIZE = (
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", 1, "--decoder-layers", 1),
    *("--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64),
    *("--decoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
)
TIED = ("--share-all-embeddings",)
STEPS = ("--optimizer", "adam", "--lr", 0.005, "--max-tokens", 800)
QUIET = ("--no-progress-bar", "--log-format", "json")
LOGS = ("--cpu", *QUIET)
BEST_BLEU = (
    *("--eval-bleu", "--eval-bleu-args", '{"beam": 2}', "--best-checkpoint-metric", "bleu"),
    "--maximize-best-checkpoint-metric",
)
KEEP_LAST = ("--no-epoch-checkpoints",)


def distil(teacher: Path | str, *options) -> tuple:
    """Return the options of a distilled run; `teacher` is the path of its teacher's checkpoint."""
    task = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
    return (*USER_DIR, *task, "--teacher-path", teacher, *options)


@dataclass
class Result:
    """The exit status and the output of a finished command."""

    code: int
    output: str  # stdout and stderr

    def logs(self, tag: str) -> list[dict[str, float]]:
        """Return the numbers of each log line with a tag: "train", "valid" or the name of a validated subset."""
        lines = re.findall(rf"\| {re.escape(tag)} \| (\{{.*\}})", self.output)
        rows = [json.loads(line) for line in lines]
        return [
            {key.removeprefix(f"{tag}_"): float(value) for key, value in row.items() if value is not None}
            for row in rows
        ]

    def end(self) -> str:
        """Return the last lines of the output, which say why fairseq stopped."""
        return "\n".join(self.output.splitlines()[-12:])

    def errors(self) -> list[str]:
        return re.findall(r"^hgkd_fairseq: error: (.*)$", self.output, flags=re.MULTILINE)

    def hypotheses(self) -> list[str]:
        """Return the hypotheses of fairseq-generate or fairseq-interactive, in the order of the corpus."""
        return self.lines_of("H", r"\S+\t")

    def sources(self) -> list[str]:
        return self.lines_of("S")

    def lines_of(self, kind: str, score: str = "") -> list[str]:
        found = re.findall(rf"^{kind}-(\d+)\t{score}(.*)$", self.output, flags=re.MULTILINE)
        return [text for _, text in sorted(found, key=lambda row: int(row[0]))]


@dataclass
class Run:
    """A finished run of fairseq-train: its --save-dir and its result."""

    folder: Path
    result: Result

    def path(self, name: str = "checkpoint_last.pt") -> Path:
        return self.folder / name

    def state(self, name: str = "checkpoint_last.pt") -> dict:
        return load(self.path(name))


def load(path: Path) -> dict:
    """Load a checkpoint without restrictions: those read here were all written by these tests."""
    return torch.load(path, map_location="cpu", weights_only=False)


def environment(*arguments) -> dict[str, str]:
    """Return the environment of a command with these arguments. With --cpu it sees no GPU, where fairseq would collect
    the norm of gradients."""
    return {**os.environ, "OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if "--cpu" in arguments else {})


def command(name: str, *arguments) -> list[str]:
    """Return the command line of fairseq-`name`: its console script, or its module if the script is not installed."""
    program = BIN / f"fairseq-{name}"
    start = [str(program)] if program.exists() else [sys.executable, "-m", f"fairseq_cli.{name}"]
    return [*start, *map(str, arguments)]


@functools.cache
def server() -> str:
    """Start a fork_server.py for this process and return the path of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="fairseq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "socket"
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("fork_server.py"), path], env=environment())
    atexit.register(process.kill)
    while not path.exists():
        assert process.poll() is None, "fork_server.py has ended"
        time.sleep(0.05)
    return str(path)


def console_script(name: str, *arguments) -> Result:
    """Run fairseq-`name` to its end in a new process, for tests of what differs in a child of the fork server."""
    done = subprocess.run(
        command(name, *arguments),
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout)


def fairseq(name: str, *arguments, cwd: Path | None = None, stdin: str | None = None) -> Result:
    """Run fairseq-`name` to its end in a child of fork_server.py and return its result, whatever the exit status."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        source, output = Path(folder, "stdin"), Path(folder, "output")
        source.write_text(stdin or "")
        output.touch()
        request = {"name": name, "arguments": [*map(str, arguments)], "cwd": str(cwd or Path.cwd())}
        request |= {"env": environment(*arguments), "stdin": str(source), "output": str(output)}
        connection.connect(server())
        connection.settimeout(TIMEOUT_S)
        with connection.makefile("rw") as stream:
            print(json.dumps(request), file=stream, flush=True)
            process = int(stream.readline())
            try:
                code = int(stream.readline())
            except BaseException as error:  # KeyboardInterrupt as well: the command is a session of its own
                os.killpg(process, signal.SIGKILL)
                if not isinstance(error, TimeoutError):
                    raise
                raise subprocess.TimeoutExpired(command(name, *arguments), TIMEOUT_S, output.read_text()) from None
        return Result(code, output.read_text())


def train(data: Path, folder: Path, *options, size=(*SIZE, *TIED), cwd: Path | None = None, device: str = "cpu") -> Run:
    """Run fairseq-train and assert that it succeeds; `options` take precedence over the usual ones."""
    logs = LOGS if device == "cpu" else (*QUIET, "--distributed-world-size", 1)
    arguments = (data, *size, *STEPS, *logs, "--save-dir", folder, *options)
    result = fairseq("train", *arguments, cwd=cwd)
    assert result.code == 0, result.end()
    return Run(folder, result)


def together(*calls) -> list:
    """Call functions without arguments, two at a time, and return their results in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def events(file: Path) -> list:
    """Return the events of a TensorBoard file.

    A record has a length (8 bytes), a checksum (4), the event and another checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event

    found, rest = [], file.read_bytes()
    while rest:
        end = 12 + int.from_bytes(rest[:8], "little")
        found.append(Event.FromString(rest[12:end]))
        rest = rest[end + 4 :]
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_workers(data: Path, folder: Path, *options, logs: Path | None = None) -> Run:
    """Train with two workers, joined by gloo, and return the run of rank 0; each has a TensorBoard folder in `logs`."""

    def own(rank: int) -> tuple:
        return ("--tensorboard-logdir", logs / str(rank)) if logs else ()

    address = ("--distributed-init-method", f"tcp://127.0.0.1:{free_port()}", "--distributed-backend", "gloo")
    world = ("--distributed-world-size", 2, "--distributed-no-spawn", "--ddp-backend", "legacy_ddp", *address)
    runs = together(
        *[lambda rank=r: train(data, folder, *options, *world, *own(rank), "--distributed-rank", rank) for r in (0, 1)]
    )
    return runs[0]


def write_corpus(folder: Path, pairs: dict[str, int]) -> None:
    """Write parallel text: sentences of 3 to 9 words of 30 types, translated word by word, one in ten at random."""
    rng = random.Random(1)
    for split, count in pairs.items():
        source = [rng.choices(range(30), k=rng.randint(3, 9)) for _ in range(count)]
        target = [[i if rng.random() < 0.9 else rng.randrange(30) for i in sentence] for sentence in source]
        for language, letter, sentences in (("de", "w", source), ("en", "t", target)):
            lines = (" ".join(f"{letter}{i}" for i in sentence) for sentence in sentences)
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))


def differences(one: dict, other: dict) -> dict[str, float]:
    """Return what differs in two nested states: the largest absolute difference of a tensor that is not bit-identical,
    and NaN of another value, such as a number or a list.
    """
    found = {}
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, other[key]):
                found[key] = (value.double() - other[key].double()).abs().max().item()
        elif isinstance(value, dict):
            found.update({f"{key}.{name}": gap for name, gap in differences(value, other[key]).items()})
        elif value != other[key]:
            found[key] = math.nan
    return found


def one_error_message(result: Result, expected: Sequence[str]) -> None:
    """Assert that a run failed before training with one message that holds all of `expected`, and no traceback."""
    assert result.code != 0
    assert len(result.errors()) == 1, result.end()
    for text in expected:
        assert text in result.errors()[0]
    assert "Traceback" not in result.output
    assert "begin training epoch" not in result.output
