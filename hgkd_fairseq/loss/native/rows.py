"""The row mathematics of one chunk on the C kernel: `row_step` does what `rows.row_step` does, on CPUs.

kernels.c is compiled for the processor in hand on first use, by the C compiler of the machine (some tenths of a
second), and kept in ``~/.cache/hgkd_fairseq``, where nobody else may write. `usable` says whether that works here.

    gate "token", and weights that are known   one call: statistics, gate and gradient while a row is in the cache
    any other gate                             two, and the gate's torch function between them
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hgkd_fairseq import cache
from hgkd_fairseq.gates import GateWeights, hard
from hgkd_fairseq.loss import equations, rows
from hgkd_fairseq.loss.options import Decide, Options, Sparse, TokenResults, decided

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
# No flag that changes what nan and inf do: an overflow in the logits must reach fairseq's loss scaler as it is.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILE_TIMEOUT_S = 60

# The order of the kernel's enums. The last is known where the compiler has _Float16: `dtypes`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS_ALONE, GRADIENT_ALONE, WEIGHTED, TOKEN, TOKEN_CLOSED = range(5)
STATISTICS = (
    *("student_max", "student_sum", "teacher_max", "teacher_sum"),
    *("student_read", "teacher_read", "gold", "mean", "entropy", "kl", "teacher_entropy"),
)
NO_MEMORY, NO_SUCH_TOKEN = 1, 2


def compiler() -> str | None:
    """The C compiler: the program of the variable CC, else cc, gcc or clang."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)


def processor() -> str:
    """What "-march=native" depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # x86 lists "flags", Arm "Features" and the number of the core's design.
    kinds = {line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}
    return f"{platform.machine()} {platform.processor()} {sorted(kinds)}"


def name_of(content: bytes, key: str) -> str:
    """The name of a compiled kernel: what it was compiled from and for, and what it is."""
    return f"rows-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def whole(file: Path, key: str) -> bool:
    """Whether a file of the cache is what was put there: this user's, written by nobody else, not cut short."""
    status = file.lstat()
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and not cache.open_to_others(file)
        and file.name == name_of(file.read_bytes(), key)
    )


def library() -> Path:
    """The compiled kernel, compiled first where it is not in the cache. Where the cache cannot be used it is compiled
    for this process alone, and a warning says why.

    Raises:
        OSError: there is no compiler, it fails, or nothing can be written.
    """
    program = compiler()
    if program is None:
        raise FileNotFoundError("there is no C compiler (cc, gcc, clang, or the program of the variable CC)")
    version = subprocess.run([program, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False).stdout
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), program.encode(), version, processor().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    try:
        folder = cache.folder()
        for file in folder.glob(f"rows-{key}-*.so"):
            if whole(file, key):
                return file
            file.unlink()  # cut short, or not this user's alone
        return compiled(program, folder, key)
    except (OSError, RuntimeError) as error:  # also of a cache that is full, or read-only
        logger.warning("the row kernel is compiled for this process alone: %s", error)
        folder = Path(tempfile.mkdtemp(prefix="hgkd_fairseq-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compiled(program, folder, key)


def compiled(program: str, folder: Path, key: str) -> Path:
    """Compile the kernel into `folder`."""
    # Under another name first: several workers may start at once, and one may be killed.
    descriptor, made = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        done = subprocess.run(
            [program, *FLAGS, str(SOURCE), "-o", made, "-lm"],
            capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"{program} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}")
        os.chmod(made, 0o700)
        file = folder / name_of(Path(made).read_bytes(), key)
        os.replace(made, file)
    finally:
        Path(made).unlink(missing_ok=True)
    return file


@functools.cache
def loaded() -> ctypes.CDLL:
    """The library of kernels.c."""
    return ctypes.CDLL(str(library()))


@functools.cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Of logits, those that the kernel reads and writes."""
    return DTYPES if loaded().knows_half() else DTYPES[:-1]


@functools.cache
def kernel():
    """The function `rows` of kernels.c."""
    function = loaded().rows
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    function.argtypes = [*[pointer] * 9, *[size] * 3, *[number] * 6, *[real] * 5]
    function.restype = number
    return function


def usable(device: torch.device | str) -> str | None:
    """None where `row_step` runs on `device` and agrees with plain torch; otherwise why not, as an error message."""
    device = torch.device(device)
    return _usable() if device.type == "cpu" else f'the row kernel is for CPUs, and this is "{device}".'


@functools.cache
def _usable() -> str | None:
    try:
        kernel()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home folder
        return f"the row kernel cannot be compiled or loaded: {error}"
    difference = rows.difference_of(row_step, torch.device("cpu"))
    if not difference < rows.LARGEST_DIFFERENCE:
        return f"the row kernel differs from plain torch by {difference:.1e}: the compiler made a mistake."
    return None


class Chunk:
    """C rows of the student's logits, and what the kernel finds of them.

    Raises of its calls:
        IndexError: a target outside the vocabulary.
        MemoryError: there is no room for two rows a thread.
    """

    def __init__(self, logits: Tensor, target: Tensor, options: Options, gradient_scale: float | None):
        self.options, self.scale = options, gradient_scale
        self.student, self.target = logits.contiguous(), target.contiguous()  # overwritten by the gradient
        self.found = torch.empty((len(STATISTICS), logits.size(0)), dtype=torch.float32)
        self.correct = torch.empty(logits.size(0), dtype=torch.bool) if options.needs_argmax else None

    def run(
        self,
        mode: int,
        weights: GateWeights | None = None,  # (C,)
        teacher: Tensor | None = None,  # (G, V)
        temperature: float = 1.0,
        places: Tensor | None = None,  # (G,) int64, the rows to do; None: all
    ) -> None:
        options, (count, vocabulary) = self.options, self.student.shape
        if teacher is not None:
            teacher = (teacher if teacher.dtype in dtypes() else teacher.float()).contiguous()
        kinds = [DTYPES.index(one.dtype) for one in (self.student, self.student if teacher is None else teacher)]
        # Kept until the kernel has run.
        known = [None if part is None else part.float().contiguous() for part in weights or [None] * 3]
        tensors = (self.student, teacher, self.target, self.found, self.correct, *known, places)
        failed = kernel()(
            *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
            count if places is None else len(places), count, vocabulary, *kinds, mode, torch.get_num_threads(),
            options.gate_on == "argmax", options.reads_untempered, 1 / temperature,
            *options.gold_weight(vocabulary), options.confidence_penalty, self.scale or 0.0,
        )  # fmt: skip
        if failed == NO_MEMORY:
            raise MemoryError(f"no room for rows of {vocabulary} logits")
        if failed == NO_SUCH_TOKEN:
            raise IndexError(f"a target is no token of the vocabulary of {vocabulary}")

    def statistics(self) -> rows.RowStatistics:
        return rows.RowStatistics(**dict(zip(STATISTICS, self.found, strict=True)), correct=self.correct)

    def gradient(self) -> Tensor | None:
        return None if self.scale is None else self.student


def row_step(
    student_logits: Tensor,  # (C, V), overwritten by the gradient where they are contiguous
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    sparse: Sparse | None = None,
) -> tuple[TokenResults, Tensor | None]:
    """As :func:`hgkd_fairseq.loss.rows.row_step`, with the gradient written over `student_logits`.

    Raises:
        IndexError: a target outside the vocabulary.
        MemoryError: there is no room for two rows a thread.
    """
    dtype, ensemble = student_logits.dtype, len(teacher_logits) > 1
    # A row of an ensemble has a mean probability for each temperature.
    if sparse is not None and sparse.rest is None and dtype == torch.float32:
        return sparse_step(student_logits, sparse, target, decide, options, gradient_scale)
    ordinary = dtype in dtypes() and options.fused and sparse is None
    if not ordinary or (ensemble and options.reads_untempered):
        return rows.row_step(student_logits, teacher_logits, target, decide, options, gradient_scale, sparse)
    temperature, teacher = options.teacher_temperature, None
    if ensemble:
        # log of the mean probability: logits at temperature 1
        teacher = rows.mean_probability(teacher_logits, 1 / temperature, torch.float32).log_()
        temperature = 1.0
    elif teacher_logits and options.gate.needs_teacher:
        teacher = teacher_logits[0]
    chunk = Chunk(student_logits, target, options, gradient_scale)
    run = functools.partial(chunk.run, teacher=teacher, temperature=temperature)

    weights = decide if isinstance(decide, GateWeights) else None
    token = options.gate.weights is hard.token
    if gradient_scale is None or not (weights or token):
        run(STATISTICS_ALONE)
    elif weights:
        run(WEIGHTED, weights)
    else:
        run(TOKEN)
    statistics = chunk.statistics()
    asked = rows.asked(options, statistics.teacher_entropy)
    given = decided(decide, statistics.student_read, statistics.teacher_read, *asked)
    if gradient_scale is not None and not (weights or token):
        run(GRADIENT_ALONE, given)
    return rows.row_results(statistics, given, student_logits.size(1), options), chunk.gradient()


def sparse_step(
    student_logits: Tensor,  # (C, V) fp32, overwritten by the gradient where they are contiguous
    sparse: Sparse,  # (C, K) without a rest
    target: Tensor,
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
) -> tuple[TokenResults, Tensor | None]:
    """`row_step` with a sparse teacher: p's part of the gradient is the kernel's, q's is taken from its tokens."""
    chunk = Chunk(student_logits, target, options, gradient_scale)
    chunk.run(STATISTICS_ALONE)
    found = chunk.statistics()
    logp = chunk.student.gather(1, sparse.ids) - found.student_max[:, None] - found.student_sum.log()[:, None]
    found = found._replace(kl=equations.sparse_kl_of(logp, None, sparse).float())
    given = decided(decide, found.student_read, found.teacher_read)
    if gradient_scale is not None:
        chunk.run(GRADIENT_ALONE, given)
        taken = sparse.probability * (given.teacher * gradient_scale)[:, None]
        chunk.student.scatter_add_(1, sparse.ids, -taken.float())
    return rows.row_results(found, given, student_logits.size(1), options), chunk.gradient()
