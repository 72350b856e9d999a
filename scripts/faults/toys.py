"""Utilities shared by the scripts in this folder: small data sets and trainings, and forked processes that start
without import time."""

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
sys.path.insert(0, str(ROOT))  # use this checkout, even if another version is installed

import fairseq_cli.generate  # noqa: E402  slow to import, so done once before forking
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
WORDS = 30  # per language


def sentences(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Return `count` sentence pairs of 3 to 9 word numbers.

    The target repeats the numbers of the source, with each replaced by a random one with a probability of 0.1.
    """
    rng = random.Random(seed)
    sources = [rng.choices(range(WORDS), k=rng.randint(3, 9)) for _ in range(count)]
    return [(one, [i if rng.random() < 0.9 else rng.randrange(WORDS) for i in one]) for one in sources]


def text(letter: str, words: Sequence[int]) -> str:
    return " ".join(f"{letter}{i}" for i in words)


def write_data(folder: Path, sizes: dict[str, int], pairs: Sequence[str] = ("de-en",)) -> Path:
    """Write binarised data as fairseq-preprocess does, with one dictionary for all languages.

    Args:
        folder: folder to create.
        sizes: number of sentence pairs by split.
        pairs: language pairs, of the languages de, fr and en.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
    """
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
    """Return a function that runs fairseq-train with these arguments and returns 0.

    The arguments are parsed here, before the fork, because that takes longer than such a small training.
    """
    given = options.parse_args_and_arch(options.get_training_parser(), list(words))
    cfg = convert_namespace_to_omegaconf(given)

    def run() -> int:
        logging.getLogger().setLevel(logging.INFO)
        distributed_utils.call_main(cfg, fairseq_cli.train.main)
        return 0

    return run


def begin(run: Callable[[], int], folder: Path, log: Path) -> int:
    """Fork a process, in a new process group, that runs a function in a folder.

    Args:
        run: function that returns the exit status. The status is 1 if it raises an exception other than SystemExit.
        folder: working directory of the process.
        log: file that standard output and standard error are appended to.

    Returns:
        The process id, to be passed to :func:`ended` or :func:`wait`.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # parent and child both try; the second may fail
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
    """Return the exit status of a process of :func:`begin`, negative for a signal, or None while it is running.

    Once it has ended, the rest of its process group is killed. A status can be retrieved only once.
    """
    found, status = os.waitpid(pid, os.WNOHANG)
    if not found:
        return None
    kill(pid)
    return os.waitstatus_to_exitcode(status)


def descendants(pid: int) -> set[int]:
    """Return the ids of a process and its running descendants, including those in other process groups."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [number for number, parent in parents.items() if parent == one]
    return set(found)


def kill(pid: int) -> None:
    """Kill a process of :func:`begin`, its process group and its descendants with SIGKILL.

    They are all stopped before any is killed. Otherwise a child that is started in the meantime would be reparented and
    could not be found.
    """
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
    # The files may be locks that the next run needs.
    while any(map(holds_files, stopped - {pid})) and time.monotonic() < deadline:
        time.sleep(0.002)


def holds_files(pid: int) -> bool:
    """Return whether a process may still hold open files: on a busy machine it takes a killed one seconds to end."""
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):  # the main thread may have ended before the others
        with contextlib.suppress(OSError):  # the thread has ended
            if file.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(pid: int, seconds: float = 600) -> int:
    """Wait for a process of :func:`begin` and return its exit status, negative for a signal.

    Raises:
        TimeoutError: the process has not ended after `seconds`; it is killed.
    """
    deadline = time.monotonic() + seconds
    while (status := ended(pid)) is None:
        if time.monotonic() > deadline:
            kill(pid)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} has not ended within {seconds:.0f} s")
        time.sleep(0.002)
    return status


def begin_program() -> None:
    """Set up this process for :func:`begin`: one thread, since a process with several cannot be forked safely, and no
    warnings or messages below WARNING."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
