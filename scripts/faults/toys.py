"""What the scripts here share: small data and trainings, and programs that begin at once, in processes of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the checkout that this script lies in, installed or not

import fairseq_cli.generate  # noqa: E402  all that takes long to import, once
import fairseq_cli.train  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
from fairseq import options  # noqa: E402
from fairseq.data import Dictionary, indexed_dataset  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.distributed import utils as distributed_utils  # noqa: E402

from hgkd_fairseq import cli, export, plugin  # noqa: E402, F401

plugin.register()

USER_DIR = ("--user-dir", str(ROOT / "hgkd_fairseq"))
SIZE = (
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32"),
    *("--decoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
    "--share-all-embeddings",
)
STEPS = (
    *("--optimizer", "adam", "--lr", "0.005", "--max-tokens", "300", "--dropout", "0.2", "--cpu", "--no-progress-bar"),
    *("--log-format", "json", "--required-batch-size-multiple", "1", "--save-dir", "run"),
)
WORDS = 30


def sentences(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of 3 to 9 words; the translation has one word for each, one of ten at random."""
    rng = random.Random(seed)
    sources = [rng.choices(range(WORDS), k=rng.randint(3, 9)) for _ in range(count)]
    return [(one, [i if rng.random() < 0.9 else rng.randrange(WORDS) for i in one]) for one in sources]


def text(letter: str, words: Sequence[int]) -> str:
    return " ".join(f"{letter}{i}" for i in words)


def write_data(folder: Path, sizes: dict[str, int], pairs: Sequence[str] = ("de-en",)) -> Path:
    """What fairseq-preprocess would make, under one dictionary for all languages."""
    folder.mkdir(parents=True)
    dictionary, letters = Dictionary(), {"de": "w", "fr": "v", "en": "t"}
    for letter in letters.values():
        for number in range(WORDS):
            dictionary.add_symbol(f"{letter}{number}")
    for seed, pair in enumerate(pairs):
        for split, count in sizes.items():
            found = sentences(seed + count, count)
            for side, language in enumerate(pair.split("-")):
                prefix = folder / f"{split}.{pair}.{language}"
                builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
                for sentence in found:
                    line = text(letters[language], sentence[side])
                    builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).int())
                builder.finalize(f"{prefix}.idx")
                dictionary.save(str(folder / f"dict.{language}.txt"))
    return folder


def write_text(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir(parents=True)
    for split, count in sizes.items():
        found = sentences(count, count)
        for side, (language, letter) in enumerate((("de", "w"), ("en", "t"))):
            lines = (text(letter, sentence[side]) for sentence in found)
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))
    return folder


def training(words: Sequence[str]) -> Callable[[], int]:
    """fairseq-train, whose options are read beforehand: that takes longer than so small a training."""
    given = options.parse_args_and_arch(options.get_training_parser(), list(words))
    cfg = convert_namespace_to_omegaconf(given)

    def run() -> int:
        logging.getLogger().setLevel(logging.INFO)
        distributed_utils.call_main(cfg, fairseq_cli.train.main)
        return 0

    return run


def begin(run: Callable[[], int], folder: Path, log: Path) -> int:
    """A process, in a process group of its own, that runs the function in a folder: its number. What it prints is added
    to the log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # both may; whoever comes first
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.chdir(folder)
        nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for descriptor, place in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, place)
        status = run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int | None:
    """The exit status, negative for a signal; None while it runs. What it has started ends with it."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    kill(pid)
    return os.waitstatus_to_exitcode(status)


def descendants(pid: int) -> set[int]:
    """A process and all that it has started, also in process groups of their own."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [number for number, parent in parents.items() if parent == one]
    return set(found)


def kill(pid: int) -> None:
    """With its descendants, stopped first: what they start meanwhile would have no parent, and be found no more."""
    stopped: set[int] = set()
    while more := descendants(pid) - stopped:
        for one in more:
            send(one, signal.SIGSTOP)
        stopped |= more
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for one in stopped - {pid}:
        send(one, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(holds_files, stopped - {pid})) and time.monotonic() < deadline:  # and locks, which the next run needs
        time.sleep(0.002)


def holds_files(pid: int) -> bool:
    """Whether the process exists and is not a zombie: one that is killed may need seconds for this on a busy machine."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(pid: int, seconds: float = 600) -> int:
    """The exit status. Raises TimeoutError where there is none in that time; the process is killed then."""
    deadline = time.monotonic() + seconds
    while (status := ended(pid)) is None:
        if time.monotonic() > deadline:
            kill(pid)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} has not ended within {seconds:.0f} s")
        time.sleep(0.002)
    return status


def begin_program() -> None:
    """Of the scripts here: one thread, which may be forked, and nothing of what fairseq and others log and warn of."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
