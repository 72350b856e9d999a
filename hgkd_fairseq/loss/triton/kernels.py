"""Triton kernels of the row step: from a chunk's logits to per-token results, and the gradient in place.

One program per row makes two passes over the row, in fp32. For the student's logits z and the teacher's logits t of a
row of V, and the teacher's temperature tau:

    pass 1   m = max z                      l = sum exp(z - m)
             M = max t                      L = sum exp((t - M) / tau)
             KL = sum q ((t - M) / tau - (z - m)) - log L + log l,          q = exp((t - M) / tau) / L
    gate     (data, teacher), in the kernel for the gates "token" and "none", else in torch between two kernels
    pass 2   dz = (data + teacher) p - teacher q - data eps_i - data (1 - eps - eps_i) onehot,     p = exp(z - m) / l

Memory. A row is processed in tiles of DEPTH x THREADS x VECTOR logits, with VECTOR consecutive logits per load. In pass
1, each thread keeps its own maxima and sums in registers and rescales them once per tile; threads exchange data
(through shared memory, 4 bytes per warp) only at the end of the row. Pass 2 reads the row again, from L2 as long as all
rows in flight fit there, and writes dz over z. The logits are the only arrays of size V in memory. The stride of the
rows may exceed V: if it is a multiple of 16 bytes, a thread loads 16 bytes at a time for any V, including the columns
from V to the next multiple.

Traffic per row, for logits of b bytes: pass 1 reads 2 V b, pass 2 reads 2 V b and writes V b. For a row with teacher
weight 0, pass 2 does not read the teacher's V b. Without a teacher, pass 1 reads V b, pass 2 reads V b and writes V b.

Numerics. p is exp(z - m) / l, not exp(z - lse), because the rounding error of lse grows with m. KL is one expectation
of a difference of logits that are already shifted by their maxima. A weight below NEGLIGIBLE contributes 0, so that a
student's logit of -inf does not give nan (0 * inf) where the teacher's probability is 0 too. Maxima start at LOWEST,
not at -inf, because -inf - -inf is nan. Student and teacher go through the same operations, so that at tau = 1 equal
logits have bitwise equal log-probabilities.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # below every logit; finite also when multiplied by log2(e)
NEGLIGIBLE = tl.constexpr(1e-20)
MINUS_INF = tl.constexpr(float("-inf"))
# No global constant may be nan: Triton compares a kernel's globals with those of its compilation, and nan != nan.

# Rows of `results` (7, C) fp32, of `flags` (2, C) int8 and of `statistics` (5, C) fp32. Each has one base pointer:
# pointers to rows would be aligned or not, depending on the number of tokens, and each case would be compiled.
LOSS, NLL, DATA_TERM, KL, STUDENT_READ, TEACHER_READ, CONFIDENCE = (tl.constexpr(i) for i in range(7))
TEACHER, CORRECT = (tl.constexpr(i) for i in range(2))
STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, ENTROPY = (tl.constexpr(i) for i in range(5))

# Integers and addresses that change from chunk to chunk: Triton shall not compile further kernels for multiples of 16.
_UNSPECIALIZED = {
    "do_not_specialize": ["rows"],
    "do_not_specialize_on_alignment": ["target", "data_weight", "teacher_weight"],
}


@triton.jit
def _columns(start, THREADS: tl.constexpr, VECTOR: tl.constexpr, DEPTH: tl.constexpr):
    """Return the column of each element of a tile, (DEPTH, THREADS, VECTOR); a load has VECTOR consecutive columns."""
    depth = tl.arange(0, DEPTH)[:, None, None]
    thread = tl.arange(0, THREADS)[None, :, None]
    return start + (depth * THREADS + thread) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _load(row, column, V: tl.constexpr, WIDTH: tl.constexpr):
    """Return the logits of these columns in fp32, -inf for columns from V on.

    Whole vectors are loaded, up to column WIDTH; the values in memory from V on are arbitrary.
    """
    z = tl.load(row + column, mask=column < WIDTH, other=MINUS_INF).to(tl.float32)
    if WIDTH != V:
        z = tl.where(column < V, z, MINUS_INF)
    return z


@triton.jit
def _sum(x):
    """Return the sum over the elements of each thread, (THREADS,), of a tile (DEPTH, THREADS, VECTOR)."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _meet(sums, factor):
    """Return the sum over the threads of `sums` (THREADS,) times `factor` (THREADS,).

    The fma rounds the product. The compiler could fuse a plain product into the sum for the student and not for the
    teacher, whose results would then differ.
    """
    return tl.sum(tl.fma(sums, factor, 0.0), 0)


@triton.jit
def _row_statistics(
    student_row,  # pointer to (V,) logits
    teacher_row,  # pointer to (V,) logits
    target,  # int32 scalar
    inverse_temperature,
    gold_weight,
    every_weight,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ARGMAX: tl.constexpr,
    GATE_ON_ARGMAX: tl.constexpr,
    GATE_TEMPERATURE: tl.constexpr,
    TEACHER_ENTROPY: tl.constexpr,
):
    """Compute pass 1 of a row and return its statistics, scalars.

    Exponents have base 2, (z - m) log2(e), because the hardware's exponential does.
    """
    TILE: tl.constexpr = DEPTH * THREADS * VECTOR
    teacher_bits = inverse_temperature * LOG2E
    m_s = tl.full((THREADS,), LOWEST, tl.float32)
    l_s = tl.zeros((THREADS,), tl.float32)
    m_t = tl.full((THREADS,), LOWEST, tl.float32)
    l_t = tl.zeros((THREADS,), tl.float32)
    untempered = tl.zeros((THREADS,), tl.float32)  # the teacher's sum of exponentials at temperature 1
    difference = tl.zeros((THREADS,), tl.float32)  # sum of exp(t) (t - z), both shifted by the thread's maxima
    surprise = tl.zeros((THREADS,), tl.float32)  # sum of exp(t) t, shifted by the thread's maximum
    shifted_sum = tl.zeros((THREADS,), tl.float32)  # sum of the shifted z
    place = tl.zeros((THREADS,), tl.int32)  # column of the first maximum
    seen = 0.0  # columns of each thread before this tile; only the last tile may be incomplete
    for start in range(0, WIDTH, TILE):
        column = _columns(start, THREADS, VECTOR, DEPTH)
        z = _load(student_row, column, V, WIDTH)
        top = tl.maximum(m_s, tl.max(tl.max(z, 2), 0))
        moved = (m_s - top) * LOG2E
        shifted = (z - top[None, :, None]) * LOG2E
        l_s = tl.fma(l_s, tl.exp2(moved), _sum(tl.exp2(shifted)))
        if SMOOTHING:
            shifted_sum += seen * moved + _sum(tl.where(column < V, shifted, 0.0))
            seen += DEPTH * VECTOR
        if ARGMAX:
            first = tl.min(tl.min(tl.where(z == top[None, :, None], column, V), 2), 0)
            place = tl.where(top > m_s, first, place)
        m_s = top
        if HAS_TEACHER:
            t = _load(teacher_row, column, V, WIDTH)
            top_t = tl.maximum(m_t, tl.max(tl.max(t, 2), 0))
            moved_t = (m_t - top_t) * teacher_bits
            shifted_t = (t - top_t[None, :, None]) * teacher_bits
            factor = tl.exp2(moved_t)
            weight = tl.exp2(shifted_t)
            carried = factor * (difference + l_t * (moved_t - moved))
            added = tl.where(weight > NEGLIGIBLE, weight * (shifted_t - shifted), 0.0)
            difference = tl.where(factor > NEGLIGIBLE, carried, 0.0) + _sum(added)
            if TEACHER_ENTROPY:
                carried_t = tl.where(factor > NEGLIGIBLE, factor * (surprise + l_t * moved_t), 0.0)
                surprise = carried_t + _sum(tl.where(weight > NEGLIGIBLE, weight * shifted_t, 0.0))
            l_t = tl.fma(l_t, factor, _sum(weight))
            if not GATE_TEMPERATURE:
                untempered = tl.fma(
                    untempered,
                    tl.exp2((m_t - top_t) * LOG2E),
                    _sum(tl.exp2((t - top_t[None, :, None]) * LOG2E)),
                )
            m_t = top_t

    # Read before the threads synchronise: in pass 2 other threads overwrite this logit with dz.
    known = (target >= 0) & (target < V)
    gold_logit = tl.load(student_row + target, mask=known, other=float("nan")).to(tl.float32)
    read_logit = gold_logit
    if HAS_TEACHER:
        read_logit = tl.load(teacher_row + target, mask=known, other=float("nan")).to(tl.float32)
    student_max = tl.max(m_s, 0)
    moved = (m_s - student_max) * LOG2E
    student_sum = _meet(l_s, tl.exp2(moved))
    student_log = tl.log(student_sum)
    gold = (gold_logit - student_max) - student_log
    data_term = -gold_weight * gold
    if SMOOTHING:
        last = _columns((WIDTH - 1) // TILE * TILE, THREADS, VECTOR, DEPTH)
        tokens = (WIDTH - 1) // TILE * (DEPTH * VECTOR) + _sum(tl.where(last < V, 1.0, 0.0))  # columns of each thread
        total = LN2 * tl.sum(shifted_sum + tokens * moved, 0)
        data_term -= every_weight * (total - V * student_log)
    student_read = gold
    argmax = target
    if ARGMAX:
        argmax = tl.min(tl.where(m_s == student_max, place, V - 1), 0)
        if GATE_ON_ARGMAX:
            student_read = 0.0 - student_log
            if HAS_TEACHER:
                read_logit = tl.load(teacher_row + argmax).to(tl.float32)

    teacher_max = 0.0
    teacher_sum = 1.0
    teacher_read = student_read
    kl = 0.0
    teacher_entropy = 0.0
    if HAS_TEACHER:
        teacher_max = tl.max(m_t, 0)
        moved_t = (m_t - teacher_max) * teacher_bits
        factor = tl.exp2(moved_t)
        teacher_sum = _meet(l_t, factor)
        teacher_log = tl.log(teacher_sum)
        carried = factor * (difference + l_t * (moved_t - moved))
        expectation = LN2 * tl.sum(tl.where(factor > NEGLIGIBLE, carried, 0.0), 0) / teacher_sum
        kl = expectation - teacher_log + student_log
        if TEACHER_ENTROPY:
            carried_t = tl.where(factor > NEGLIGIBLE, factor * (surprise + l_t * moved_t), 0.0)
            teacher_entropy = teacher_log - LN2 * tl.sum(carried_t, 0) / teacher_sum
        if GATE_TEMPERATURE:
            teacher_read = (read_logit - teacher_max) * inverse_temperature - teacher_log
        else:
            normalizer = _meet(untempered, tl.exp2((m_t - teacher_max) * LOG2E))
            teacher_read = (read_logit - teacher_max) - tl.log(normalizer)
    return (
        student_read, teacher_read, gold, data_term, kl, argmax, student_max, student_sum, teacher_max, teacher_sum,
        teacher_entropy,
    )  # fmt: skip


@triton.jit
def _write_gradient(
    student_row,  # pointer to (V,) logits, overwritten
    teacher_row,
    target,  # int32 scalar
    student_max,
    student_factor,  # (data + teacher) / l * gradient_scale
    teacher_max,
    teacher_factor,  # teacher / L * gradient_scale
    inverse_temperature,
    gold,  # data * gold_weight * gradient_scale
    every,  # data * every_weight * gradient_scale
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
):
    """Compute pass 2 of a row: write the gradient over the student's logits."""
    teacher_bits = inverse_temperature * LOG2E
    for start in range(0, WIDTH, DEPTH * THREADS * VECTOR):
        column = _columns(start, THREADS, VECTOR, DEPTH)
        z = _load(student_row, column, V, WIDTH)
        dz = tl.exp2((z - student_max) * LOG2E) * student_factor - every
        if HAS_TEACHER:
            t = _load(teacher_row, column, V, WIDTH)
            dz -= tl.exp2((t - teacher_max) * teacher_bits) * teacher_factor
        dz = tl.where(column == target, dz - gold, dz)
        tl.store(student_row + column, dz.to(student_row.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _finish_row(
    student_row,
    teacher_row,
    results,
    flags,
    row,
    rows,
    target,
    data,
    teacher,
    data_term,
    kl,
    student_max,
    student_sum,
    teacher_max,
    teacher_sum,
    inverse_temperature,
    gold_weight,
    every_weight,
    gradient_scale,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    MAKE_GRADIENT: tl.constexpr,
):
    """Compute what follows the gate: the weighted loss and, if MAKE_GRADIENT, the gradient."""
    loss = data * data_term
    if HAS_TEACHER:
        loss += tl.where(teacher != 0, teacher * kl, 0.0)  # 0 * inf counts as 0, as in equations.weighted
    tl.store(results + LOSS * rows + row, loss)
    tl.store(flags + TEACHER * rows + row, (teacher > 0).to(tl.int8))
    if MAKE_GRADIENT:
        data *= gradient_scale
        teacher *= gradient_scale
        student_factor = (data + teacher) / student_sum
        teacher_factor = teacher / teacher_sum
        gold = data * gold_weight
        every = data * every_weight
        if HAS_TEACHER:
            if teacher != 0:  # true for nan
                _write_gradient(
                    student_row, teacher_row, target, student_max, student_factor, teacher_max, teacher_factor,
                    inverse_temperature, gold, every, V, WIDTH, THREADS, VECTOR, DEPTH, True,
                )  # fmt: skip
            else:
                _write_gradient(
                    student_row, teacher_row, target, student_max, student_factor, teacher_max, teacher_factor,
                    inverse_temperature, gold, every, V, WIDTH, THREADS, VECTOR, DEPTH, False,
                )  # fmt: skip
        else:
            _write_gradient(
                student_row, teacher_row, target, student_max, student_factor, teacher_max, teacher_factor,
                inverse_temperature, gold, every, V, WIDTH, THREADS, VECTOR, DEPTH, False,
            )  # fmt: skip


@triton.jit(**_UNSPECIALIZED)
def token_rows(
    student_logits,  # (C, V), overwritten by dz if MAKE_GRADIENT
    teacher_logits,  # (C, V)
    target,  # (C,) int64
    results,  # (7, C) fp32
    flags,  # (2, C) int8
    rows,  # C
    inverse_temperature,
    gold_weight,
    every_weight,
    gradient_scale,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ARGMAX: tl.constexpr,
    GATE_ON_ARGMAX: tl.constexpr,
    GATE_TEMPERATURE: tl.constexpr,
    MAKE_GRADIENT: tl.constexpr,
):
    """Compute pass 1, the gate "token", g = 1[p > q] (without a teacher "none", g = 0), and what follows the gate."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_logits + row * STUDENT_STRIDE
    teacher_row = teacher_logits + row * TEACHER_STRIDE
    gold_token = tl.load(target + row).to(tl.int32)
    student_read, teacher_read, gold, data_term, kl, argmax, student_max, student_sum, teacher_max, teacher_sum, _ = (
        _row_statistics(
            student_row, teacher_row, gold_token, inverse_temperature, gold_weight, every_weight,
            V, WIDTH, THREADS, VECTOR, DEPTH, HAS_TEACHER, SMOOTHING, ARGMAX, GATE_ON_ARGMAX, GATE_TEMPERATURE, False,
        )
    )  # fmt: skip
    teacher = tl.where(student_read > teacher_read, 1.0, 0.0)  # strict: 0 at equal probabilities
    tl.store(results + NLL * rows + row, -gold)
    tl.store(results + DATA_TERM * rows + row, data_term)
    tl.store(results + KL * rows + row, kl)
    tl.store(results + STUDENT_READ * rows + row, student_read)
    tl.store(results + TEACHER_READ * rows + row, teacher_read)
    if ARGMAX:
        tl.store(results + CONFIDENCE * rows + row, 1.0 / student_sum)
        tl.store(flags + CORRECT * rows + row, (argmax == gold_token).to(tl.int8))
    _finish_row(
        student_row, teacher_row, results, flags, row, rows, gold_token, 1.0 - teacher, teacher, data_term, kl,
        student_max, student_sum, teacher_max, teacher_sum, inverse_temperature, gold_weight, every_weight,
        gradient_scale, V, WIDTH, THREADS, VECTOR, DEPTH, HAS_TEACHER, MAKE_GRADIENT,
    )  # fmt: skip


@triton.jit(**_UNSPECIALIZED)
def statistics_rows(
    student_logits,  # (C, V)
    teacher_logits,  # (C, V)
    target,  # (C,) int64
    results,  # (7, C) fp32: all but LOSS are written, CONFIDENCE only if ARGMAX
    flags,  # (2, C) int8: CORRECT is written if ARGMAX
    statistics,  # (5, C) fp32
    rows,  # C
    inverse_temperature,
    gold_weight,
    every_weight,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ARGMAX: tl.constexpr,
    GATE_ON_ARGMAX: tl.constexpr,
    GATE_TEMPERATURE: tl.constexpr,
    TEACHER_ENTROPY: tl.constexpr,
):
    """Compute pass 1, for a gate that is then evaluated in torch."""
    row = tl.program_id(0).to(tl.int64)
    student_row = student_logits + row * STUDENT_STRIDE
    teacher_row = teacher_logits + row * TEACHER_STRIDE
    gold_token = tl.load(target + row).to(tl.int32)
    (
        student_read, teacher_read, gold, data_term, kl, argmax, student_max, student_sum, teacher_max, teacher_sum,
        teacher_entropy,
    ) = _row_statistics(
        student_row, teacher_row, gold_token, inverse_temperature, gold_weight, every_weight, V, WIDTH, THREADS,
        VECTOR, DEPTH, HAS_TEACHER, SMOOTHING, ARGMAX, GATE_ON_ARGMAX, GATE_TEMPERATURE, TEACHER_ENTROPY,
    )  # fmt: skip
    tl.store(results + NLL * rows + row, -gold)
    tl.store(results + DATA_TERM * rows + row, data_term)
    tl.store(results + KL * rows + row, kl)
    tl.store(results + STUDENT_READ * rows + row, student_read)
    tl.store(results + TEACHER_READ * rows + row, teacher_read)
    if ARGMAX:
        tl.store(results + CONFIDENCE * rows + row, 1.0 / student_sum)
        tl.store(flags + CORRECT * rows + row, (argmax == gold_token).to(tl.int8))
    tl.store(statistics + STUDENT_MAX * rows + row, student_max)
    tl.store(statistics + STUDENT_SUM * rows + row, student_sum)
    tl.store(statistics + TEACHER_MAX * rows + row, teacher_max)
    tl.store(statistics + TEACHER_SUM * rows + row, teacher_sum)
    if TEACHER_ENTROPY:
        tl.store(statistics + ENTROPY * rows + row, teacher_entropy)


@triton.jit(**_UNSPECIALIZED)
def gradient_rows(
    student_logits,  # (C, V), overwritten by dz if MAKE_GRADIENT
    teacher_logits,  # (C, V)
    target,  # (C,) int64
    results,  # (7, C) fp32: LOSS is written, DATA_TERM and KL are read
    flags,  # (2, C) int8: TEACHER is written
    statistics,  # (5, C) fp32
    data_weight,  # (C,) fp32
    teacher_weight,  # (C,) fp32
    rows,  # C
    inverse_temperature,
    gold_weight,
    every_weight,
    gradient_scale,
    STUDENT_STRIDE: tl.constexpr,
    TEACHER_STRIDE: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    MAKE_GRADIENT: tl.constexpr,
):
    """Compute what follows the gate, with its weights: the weighted loss and, if MAKE_GRADIENT, the gradient."""
    row = tl.program_id(0).to(tl.int64)
    _finish_row(
        student_logits + row * STUDENT_STRIDE,
        teacher_logits + row * TEACHER_STRIDE,
        results,
        flags,
        row,
        rows,
        tl.load(target + row).to(tl.int32),
        tl.load(data_weight + row),
        tl.load(teacher_weight + row),
        tl.load(results + DATA_TERM * rows + row),
        tl.load(results + KL * rows + row),
        tl.load(statistics + STUDENT_MAX * rows + row),
        tl.load(statistics + STUDENT_SUM * rows + row),
        tl.load(statistics + TEACHER_MAX * rows + row),
        tl.load(statistics + TEACHER_SUM * rows + row),
        inverse_temperature,
        gold_weight,
        every_weight,
        gradient_scale,
        V,
        WIDTH,
        THREADS,
        VECTOR,
        DEPTH,
        HAS_TEACHER,
        MAKE_GRADIENT,
    )
