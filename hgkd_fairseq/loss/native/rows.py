"""The row step on the C kernel, for CPUs: `row_step` computes what `rows.row_step` computes.

kernels.c is compiled for this machine's processor on first use, by the machine's C compiler (some tenths of a second),
and cached in ``~/.cache/hgkd_fairseq``, to which no other user may write. `usable` returns whether this works.

    gate "token" or known weights   one call of the kernel: statistics, gate and gradient while a row is in the cache
    any other gate                  two calls, with the gate's torch function between them
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
# No flag that changes the semantics of nan and inf: fairseq's loss scaler must see an overflow in the logits.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILE_TIMEOUT_S = 60

# In the order of the kernel's enums. fp16 is supported only if the compiler has _Float16: see `dtypes`.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS_ALONE, GRADIENT_ALONE, WEIGHTED, TOKEN, TOKEN_CLOSED = range(5)
STATISTICS = (
    *("student_max", "student_sum", "teacher_max", "teacher_sum"),
    *("student_read", "teacher_read", "gold", "mean", "entropy", "kl", "teacher_entropy"),
)
NO_MEMORY, NO_SUCH_TOKEN = 1, 2


def compiler() -> str | None:
    """Return the path of the C compiler, or None: the program in the variable CC, else cc, gcc or clang."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)


def processor() -> str:
    """Return a description of what "-march=native" depends on, because machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # x86 lists "model name" and "flags", Arm "Features" and "CPU part", the number of the core's design.
    kinds = {line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}
    return f"{platform.machine()} {platform.processor()} {sorted(kinds)}"


def name_of(content: bytes, key: str) -> str:
    """Return the file name of a compiled kernel: it contains the key of its inputs and a hash of its content."""
    return f"rows-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def whole(file: Path, key: str) -> bool:
    """Return whether a cached file is intact: owned by this user, not writable by others, with the content in its name.

    Raises:
        OSError: the file cannot be read.
    """
    status = file.lstat()
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and not cache.open_to_others(file)
        and file.name == name_of(file.read_bytes(), key)
    )


def library() -> Path:
    """Return the path of the compiled kernel, from the cache or compiled into it.

    If that fails, log a warning and compile the kernel into a temporary folder, for this process only.

    Raises:
        OSError: there is no compiler, it fails, or nothing can be written.
        subprocess.TimeoutExpired: the compiler takes more than COMPILE_TIMEOUT_S.
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
            file.unlink()  # truncated, or other users may have changed it
        return compiled(program, folder, key)
    except (OSError, RuntimeError) as error:  # also a file system that is full or read-only
        folder = Path(tempfile.mkdtemp(prefix="hgkd_fairseq-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        file = compiled(program, folder, key)
        logger.warning("the row kernel is compiled for this process alone: %s", error)
        return file


def compiled(program: str, folder: Path, key: str) -> Path:
    """Compile the kernel into `folder` and return its path.

    Raises:
        OSError: the compiler fails, or nothing can be written.
    """
    # Under a temporary name first, because several workers may start at once, and one may be killed.
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
    """Return the loaded library of kernels.c, compiled if needed; raises what `library` raises."""
    return ctypes.CDLL(str(library()))


@functools.cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of logits that the kernel supports."""
    return DTYPES if loaded().knows_half() else DTYPES[:-1]


@functools.cache
def kernel():
    """Return the function `rows` of kernels.c; raises what `library` raises."""
    function = loaded().rows
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    function.argtypes = [*[pointer] * 9, *[size] * 3, *[number] * 6, *[real] * 5]
    function.restype = number
    return function


def usable(device: torch.device | str) -> str | None:
    """Return None if `row_step` runs on `device` and agrees with plain torch, otherwise an error message."""
    device = torch.device(device)
    return _usable() if device.type == "cpu" else f'the row kernel is for CPUs, and this is "{device}".'


@functools.cache
def _usable() -> str | None:
    try:
        kernel()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"the row kernel cannot be compiled or loaded: {error}"
    difference = rows.difference_of(row_step, torch.device("cpu"))
    if not difference < rows.LARGEST_DIFFERENCE:
        return f"the row kernel differs from plain torch by {difference:.1e}: the compiler made a mistake."
    return None


class Chunk:
    """C rows of the student's logits, with the statistics and the gradient that calls of the kernel compute for them.

    `run` calls the kernel; it raises:
        IndexError: a target is outside the vocabulary.
        MemoryError: two rows of fp32 per thread cannot be allocated.
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
        places: Tensor | None = None,  # (G,) int64, indices of the rows to process; None: all
    ) -> None:
        options, (count, vocabulary) = self.options, self.student.shape
        if teacher is not None:
            teacher = (teacher if teacher.dtype in dtypes() else teacher.float()).contiguous()
        kinds = [DTYPES.index(one.dtype) for one in (self.student, self.student if teacher is None else teacher)]
        # A reference keeps the converted tensors alive until the kernel has run.
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
    student_logits: Tensor,  # (C, V), overwritten by the gradient if contiguous
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    sparse: Sparse | None = None,
) -> tuple[TokenResults, Tensor | None]:
    """Compute what :func:`hgkd_fairseq.loss.rows.row_step` computes, and write the gradient over `student_logits`.

    Inputs and options that the kernel does not support are left to that function.

    Raises:
        IndexError: a target is outside the vocabulary.
        MemoryError: two rows of fp32 per thread cannot be allocated.
    """
    dtype, ensemble = student_logits.dtype, len(teacher_logits) > 1
    if sparse is not None and sparse.rest is None and dtype == torch.float32:
        return sparse_step(student_logits, sparse, target, decide, options, gradient_scale)
    ordinary = dtype in dtypes() and options.fused and sparse is None
    # An ensemble is passed as its mean probabilities at one temperature; a gate that reads untempered needs two.
    if not ordinary or (ensemble and options.reads_untempered):
        return rows.row_step(student_logits, teacher_logits, target, decide, options, gradient_scale, sparse)
    temperature, teacher = options.teacher_temperature, None
    if ensemble:
        # The log of the mean probability, which are logits at temperature 1.
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
    student_logits: Tensor,  # (C, V) fp32, overwritten by the gradient if contiguous
    sparse: Sparse,  # (C, K) without a rest
    target: Tensor,
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
) -> tuple[TokenResults, Tensor | None]:
    """Do `row_step` for a sparse teacher without a rest: the kernel computes the part of p, torch adds that of q."""
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
