"""Tests of the Triton kernels in Triton's interpreter, on the CPU: values, gradients and gates against fp64.

TRITON_INTERPRET=1 must be set before Triton is imported, so without it this module runs itself in a new process. Where
there is a GPU the cases, and more of real vocabularies, run on it instead. An error may be at most about twice that of
the plain torch rows in the same dtype.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if DEVICE == "cuda" and torch.cuda.is_available():
    pytestmark = pytest.mark.cuda  # the cases below run on the GPU itself, and nothing is interpreted

elif not INTERPRETED:

    @pytest.mark.slow
    def test_in_a_process_of_the_interpreter():
        files = (__file__, Path(__file__).with_name("test_properties.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rP", *files]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        print(run.stdout[-4000:])
        assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
        assert " passed" in run.stdout

    def test_usable_says_why_not():
        from hgkd_fairseq.loss.triton import rows as triton_rows

        assert triton_rows.usable("cpu") == 'Triton compiles for CUDA devices, and this is "cpu".'


if INTERPRETED or torch.cuda.is_available():
    import numpy as np
    import test_waiting
    from torch import Tensor
    from waiting import NoWaiting

    from hgkd_fairseq import gates
    from hgkd_fairseq.gates import GATES, Gate, GateWeights, TokenStatistics, hard
    from hgkd_fairseq.loss import rows
    from hgkd_fairseq.loss.options import Options
    from hgkd_fairseq.loss.triton import rows as triton_rows
    from hgkd_fairseq.sentence_weights import gate as _instance  # noqa: F401  registers the gate instance

    if INTERPRETED:
        import triton_interpreter  # after the package, where Triton is imported

    ULPS = 4  # the exponential of base 2 is accurate to 2
    FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
    # (num_warps, VECTOR, DEPTH) by the stride of the rows: tiles of 128 to 256 logits, so that a row has one to four
    # tiles, the last of which need not be full.
    SHAPES = {123: (1, 1, 4), 252: (1, 2, 4), 507: (2, 1, 4), 512: (1, 4, 2), 1000: (1, 4, 2)}
    VOCABULARIES = (123, 252, 507, 1000)

    def soft(statistics) -> GateWeights:
        teacher = torch.sigmoid(statistics.student_logprob - statistics.teacher_logprob)
        return GateWeights(data=1 - 0.3 * teacher, teacher=teacher)

    def halves(statistics) -> GateWeights:
        half = torch.full_like(statistics.student_logprob, 0.5)
        return GateWeights(data=half, teacher=0 * half)

    class Closed(torch.nn.Module):
        """A learned gate whose teacher weight is 0: its gradient needs the KL of every token."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, statistics) -> GateWeights:
            ones = torch.ones_like(statistics.student_logprob)
            return GateWeights(data=ones, teacher=self.weight.detach().to(ones) * ones)

    USER = {
        "closed": Gate("closed", Closed(), compares=False),
        "soft": Gate("soft", soft),
        "halves": Gate("halves", halves, needs_teacher=False),
        # The gates of the fused kernel, computed by the split kernels.
        "token split": Gate("token", lambda s: hard.token(s)),
        "none split": Gate("none", lambda s: hard.none(s), needs_teacher=False),
    }

    class Case(NamedTuple):
        gate: str = "token"
        gate_on: str = "gold"
        tempered_gate: bool = True
        smoothing: float = 0.1
        top1: bool = False
        dtype: torch.dtype = FP32
        vocabulary: int = 507
        teachers: int = 1
        scale: float | None = 1.0
        tokens: int = 6
        temperature: float = 1.5
        width: float = 3.0  # standard deviation of the logits
        offset: float = 0.0  # added to the student's logits
        stride: int = 0  # logits from one row to the next; 0: the size of the vocabulary

        @property
        def options(self) -> Options:
            gate = USER.get(self.gate) or GATES[self.gate]
            return Options(gate, self.gate_on, self.temperature, self.tempered_gate, self.smoothing, top1=self.top1)

        def __str__(self) -> str:
            changed = [f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults[k]]
            return " ".join(changed).replace("torch.", "") or "default"

    def options_cases() -> list[Case]:
        """Return a case for every combination of the options, with dtypes, vocabularies and scales taken in turn."""
        turns = itertools.cycle(itertools.product((FP32, BF16, FP16), VOCABULARIES, (1.0, None, 1024.0)))
        combinations = itertools.product(
            ("token", "sentence", "none", "soft"), ("gold", "argmax"), (True, False), (0.0, 0.1), (False, True)
        )
        return [Case(*combination, *next(turns)[:2])._replace(scale=next(turns)[2]) for combination in combinations]

    REAL = [
        Case(dtype=dtype, vocabulary=vocabulary, tokens=300, gate=gate, smoothing=smoothing, gate_on=gate_on)
        for dtype, vocabulary in itertools.product((FP32, BF16, FP16), (10152, 32000, 32001))
        for gate, smoothing, gate_on in (("token", 0.1, "gold"), ("sentence", 0.0, "argmax"), ("none", 0.1, "gold"))
    ]

    CASES = [
        *options_cases(),
        *(Case(dtype=d, vocabulary=v, tokens=11) for d in (FP32, BF16, FP16) for v in VOCABULARIES),
        *(Case(gate, dtype=d, stride=512) for gate in ("token", "soft", "none") for d in (FP32, BF16)),
        Case("sentence", "argmax", dtype=BF16, vocabulary=123, stride=128),
        Case(vocabulary=505, stride=512, smoothing=0.1, top1=True),
        Case("none", vocabulary=505, stride=507, smoothing=0.1, top1=True),
        *(Case("sentence", dtype=d, vocabulary=v) for d, v in zip((FP32, BF16, FP16), (1000, 252, 123), strict=True)),
        *(Case(gate, dtype=d) for gate in USER for d in (FP32, FP16)),
        *(Case(gate, "argmax", teachers=2, dtype=d) for gate in ("token", "soft") for d in (FP32, BF16)),
        Case(teachers=3, tempered_gate=False),
        Case(teachers=2, tempered_gate=False, temperature=1.0),
        Case(tempered_gate=False, temperature=0.3, width=1.0),
        Case(temperature=4.0, vocabulary=1000, tokens=32),
        Case(dtype=FP16, scale=1024.0, vocabulary=1000, tokens=16),
        Case(offset=1e4),
        Case(offset=1e4, tempered_gate=False, gate_on="argmax"),
        Case(offset=-1e4, width=30.0),
        Case(width=1e4, smoothing=0.0),
        Case(width=200.0),  # q underflows to 0
        Case(width=200.0, dtype=BF16, gate="sentence"),
        Case(width=0.01, temperature=1.0),
        *([] if INTERPRETED else REAL),
    ]

    class Rows(NamedTuple):
        student: Tensor
        teachers: list[Tensor]
        target: Tensor
        sentence: Tensor

    def draw(case: Case, seed: int = 0) -> Rows:
        """Draw logits, the teachers' correlated with the student's, and targets, half of which are likely tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape = (case.tokens, case.vocabulary)
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(case.teachers + 1)]
        student = case.width * noise[0]
        teachers = [case.width * (0.7 * noise[0] + 0.7 * other) for other in noise[1:]]
        target = torch.randint(case.vocabulary, (case.tokens,), generator=generator)
        likely = (student + teachers[0]).argmax(1)
        target = torch.where(torch.arange(case.tokens) % 2 == 0, likely, target)
        student = (student + case.offset).to(case.dtype)
        return Rows(student, [t.to(case.dtype) for t in teachers], target, torch.arange(case.tokens) // 3)

    def decide(options: Options, sentence: Tensor):
        def weights(student_read: Tensor, teacher_read: Tensor) -> GateWeights:
            count = int(sentence[-1]) + 1 if len(sentence) else 0
            return options.gate.weights(TokenStatistics(student_read, teacher_read, sentence, count))

        return weights

    def run(step, case: Case, data: Rows, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the results of `step` by name, on the CPU, for logits in `dtype`; None: in that of the data."""
        dtype = dtype or data.student.dtype
        student = apart(data.student.to(DEVICE, dtype, copy=True), case.stride)
        teachers = [apart(t.to(DEVICE, dtype), case.stride) for t in data.teachers]
        target, gate = data.target.to(DEVICE), decide(case.options, data.sentence[: len(student)].to(DEVICE))
        results, dz = step(student, teachers, target, gate, case.options, case.scale)
        if step is triton_rows.row_step and dz is not None and runs_kernels(case, student):
            assert dz.data_ptr() == student.data_ptr()
        if results.teacher_share is None:  # fused gates give 0 or 1
            results = results._replace(teacher_share=results.teacher_mask.to(results.kl.dtype))
        named = {**results._asdict(), "gap": results.student_read - results.teacher_read, "dz": dz}
        return {name: value.cpu() for name, value in named.items() if value is not None}

    def apart(logits: Tensor, stride: int) -> Tensor:
        """Return the logits with rows `stride` apart and nan between them."""
        if not stride:
            return logits
        room = logits.new_full((len(logits), stride), float("nan"))
        room[:, : logits.size(1)] = logits
        return room[:, : logits.size(1)]

    def runs_kernels(case: Case, logits: Tensor) -> bool:
        two_means = case.teachers > 1 and not case.tempered_gate and case.temperature != 1
        return logits.dtype != torch.float64 and len(logits) > 0 and not two_means

    @pytest.fixture(autouse=True)
    def _small_tiles(monkeypatch):
        real = triton_rows.launch_shape
        monkeypatch.setattr(
            triton_rows, "launch_shape", lambda stride, *more: SHAPES.get(stride) or real(stride, *more)
        )
        if INTERPRETED:
            with triton_interpreter.exact_bf16(), np.errstate(all="ignore"):
                yield
        else:
            yield

    def compare(case: Case, data: Rows) -> None:
        truth = run(rows.row_step, case, data, torch.float64)
        plain = run(rows.row_step, case, data)
        fused = run(triton_rows.row_step, case, data)
        assert fused.keys() == truth.keys()
        if case.options.gate.needs_teacher:
            assert truth["gap"].abs().min() > 1e-5, "a case too close to call: choose another seed"
        for name, expected in truth.items():
            got, ours = fused[name], plain[name]
            assert got.dtype == ours.dtype
            assert got.shape == ours.shape
            if expected.dtype == torch.bool:
                assert torch.equal(got, expected), name
                continue
            size = expected.abs().max().clamp_min(1e-30 if name == "dz" else 1.0)
            floor = ULPS * torch.finfo(got.dtype).eps * size
            error, allowed = (got - expected).abs().max(), (ours - expected).abs().max()
            assert error <= 2 * allowed + floor, (
                f"{name}: error {error:.3g}, plain torch {allowed:.3g}, ulp {floor:.3g}"
            )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_errors_are_at_most_twice_those_of_plain_torch(case):
        compare(case, draw(case))

    @pytest.mark.parametrize("gate_on", ["gold", "argmax"])
    @pytest.mark.parametrize("gate", ["token", "token split"])
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_equal_models_leave_every_token_to_the_data(vocabulary, gate, gate_on):
        case = Case(gate, gate_on, temperature=1.0, vocabulary=vocabulary, tokens=8)
        data = draw(case)
        got = run(triton_rows.row_step, case, data._replace(teachers=[data.student.clone()]))
        assert torch.equal(got["gap"], torch.zeros(8))
        assert not got["teacher_mask"].any()
        assert torch.equal(got["kl"], torch.zeros(8))

    @pytest.mark.parametrize("gate", ["none", "token", "soft"])
    def test_argmax_is_the_lowest_index_on_ties(gate):
        case = Case(gate, "argmax", top1=True, tokens=12, vocabulary=507)
        data = draw(case)
        student = data.student.round().clamp(max=5)  # many ties at 5, in all tiles
        student[0], student[1, :300], student[2, 500:] = 0, float("-inf"), 7
        data = data._replace(student=student, target=student.argmax(1))
        data.target[6:] = student[6:].eq(5).float().cumsum(1).eq(2).float().argmax(1)  # the second tie
        got, truth = run(triton_rows.row_step, case, data), run(rows.row_step, case, data, torch.float64)
        assert torch.equal(got["correct"], torch.arange(12) < 6)
        torch.testing.assert_close(got["gap"].double(), truth["gap"], rtol=1e-5, atol=1e-5)  # q at the argmax
        torch.testing.assert_close(got["confidence"].double(), truth["confidence"], rtol=1e-5, atol=0)

    def banned(data: Rows, tokens, student: float, teacher: float) -> Rows:
        """Set the logits of some tokens of the vocabulary, as a bias would, and replace targets among them by 505."""
        data.student[:, tokens] = student
        for t in data.teachers:
            t[:, tokens] = teacher
        data.target[torch.isin(data.target, torch.arange(507)[tokens])] = 505
        return data

    INF = float("inf")
    BANS = {
        "both": ([0, 3, 130, 506], -INF, -INF),
        "first tile": (slice(0, 300), -INF, -INF),
        "student, where q underflows": ([0, 3, 130, 506], -INF, -1e4),
        "student, whole threads": (slice(0, 507, 64), -INF, -1e4),
        "student, where q is near underflow": (slice(0, 256), -INF, -95.0),
        "teacher": ([0, 3, 130, 506], 0.5, -INF),
        "student": ([0, 3, 130, 506], -INF, 0.5),
        "lowest number": ([0, 3, 130, 506], -3.4e38, -3.4e38),
    }

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("gate", ["token", "soft", "none"])
    @pytest.mark.parametrize("ban", BANS)
    def test_infinite_logits_give_nan_only_where_plain_torch_does(ban, gate, smoothing):
        case = Case(gate, smoothing=smoothing, top1=True, temperature=1.0 if "near" in ban else 1.5)
        data = banned(draw(case), *BANS[ban])
        got, plain = run(triton_rows.row_step, case, data), run(rows.row_step, case, data)
        for name in ("teacher_mask", "correct"):
            assert torch.equal(got[name], plain[name])
        for name in ("loss", "nll", "data_term", "kl", "student_read", "teacher_read", "confidence", "dz"):
            finite = plain[name].isfinite()
            torch.testing.assert_close(got[name][finite], plain[name][finite], rtol=2e-5, atol=1e-5)
            assert not (got[name].isnan() & ~plain[name].isnan()).any(), name

    @pytest.mark.parametrize("gate", ["token", "soft", "none"])
    @pytest.mark.parametrize("value", [INF, float("nan")])
    def test_overflowing_logits_show(value, gate):
        case = Case(gate, top1=True)
        data = draw(case)
        clean = run(triton_rows.row_step, case, data)
        data.student[2, 400] = value
        got = run(triton_rows.row_step, case, data)
        assert not got["loss"][2].isfinite()
        assert not got["dz"][2].isfinite().all()
        others = torch.arange(6) != 2
        assert torch.equal(got["dz"][others], clean["dz"][others])

    def test_a_target_outside_the_vocabulary_gives_nan():
        case = Case()
        data = draw(case)
        data.target[0], data.target[1] = -1, 507
        got = run(triton_rows.row_step, case, data)
        assert got["loss"][:2].isnan().all()
        assert got["loss"][2:].isfinite().all()

    def test_what_the_kernels_cannot_do_is_left_to_plain_torch():
        case = Case()
        data = draw(case)
        for dtype, tokens in ((torch.float64, 6), (FP32, 0)):
            some = Rows(data.student[:tokens], [data.teachers[0][:tokens]], data.target[:tokens], data.sentence)
            got, plain = (run(step, case, some, dtype) for step in (triton_rows.row_step, rows.row_step))
            assert all(torch.equal(got[name], plain[name]) for name in plain)

    def test_logits_may_be_strided_and_the_teacher_of_another_dtype():
        case = Case()
        data = draw(case)
        target, sentence, teacher = (x.to(DEVICE) for x in (data.target, data.sentence, data.teachers[0].to(BF16)))
        strided = torch.empty(507, 6, device=DEVICE).t().copy_(data.student)  # the columns are neighbours
        plain = rows.row_step(strided, [teacher], target, decide(case.options, sentence), case.options, 1.0)
        got = triton_rows.row_step(strided, [teacher], target, decide(case.options, sentence), case.options, 1.0)
        torch.testing.assert_close(got[0].loss, plain[0].loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], plain[1], rtol=1e-6, atol=1e-6)

    def test_weights_of_sentences():
        from hgkd_fairseq.loss import gated_distillation

        gate = gates.get_gate("instance")
        gate.weights.begin(torch.zeros(8, dtype=torch.bool))
        generator = torch.Generator().manual_seed(0)
        gate.weights.state["data"], gate.weights.state["teacher"] = torch.rand((2, 8), generator=generator) * 2
        hidden, teacher = torch.randn((2, 3, 4, 9), generator=generator).to(DEVICE)
        weight, teacher_weight = torch.randn((2, 123, 9), generator=generator).to(DEVICE)
        target = torch.tensor([[5, 7, 122, 1], [1, 1, 1, 1], [0, 9, 4, 6]], device=DEVICE)  # pads are 1
        results = []
        for implementation, dtype in (("triton", FP32), ("eager", torch.float64)):
            h, w, t, v = (x.to(dtype) for x in (hidden, weight, teacher, teacher_weight))
            h.requires_grad_(), w.requires_grad_()
            out = gated_distillation(
                h, w, t, v, target, gate=gate, instance=torch.tensor([6, 2, 0]), implementation=implementation
            )
            results.append([out.loss.detach(), *torch.autograd.grad(out.loss, (h, w))])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
    @pytest.mark.parametrize("gate", test_waiting.IN_VIEW)
    def test_the_kernels_wait_for_nothing(gate):
        assert triton_rows.usable(DEVICE) is None  # the kernels are compared with plain torch once
        with NoWaiting():
            test_waiting.step(gate, "triton", 0.1)

    def test_usable():
        assert triton_rows.usable(DEVICE) is None

    @pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
    def test_rounding_to_bf16_is_torch_s():
        values = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 1e3
        values[:6] = torch.tensor([0.0, -0.0, INF, -INF, 3.39e38, 1.00390625])  # the last is a tie
        bits = torch.from_numpy(triton_interpreter.round_to_bf16(values.numpy()).view(np.int16))
        assert torch.equal(bits, values.to(BF16).view(torch.int16))
