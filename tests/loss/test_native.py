"""Tests of the C kernel: cases that other tests do not reach, against plain torch; its cache; and missing compilers.

test_gated_distillation.py compares it with fp64 and eager in every combination of options.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import as_a_user, in_a_child

from hgkd_fairseq import gates
from hgkd_fairseq.gates import GATES, Gate, TokenStatistics, hard, published
from hgkd_fairseq.loss import gated_distillation, rows, unusable
from hgkd_fairseq.loss.native import rows as cpu_rows
from hgkd_fairseq.loss.options import Options

ROOT = Path(__file__).parents[2]
# Gates that the kernel does in one call, in a form that it does not recognise and does in two calls.
SPLIT = {
    "token": Gate("mine", lambda statistics: hard.token(statistics)),
    "none": Gate("mine", lambda statistics: hard.none(statistics), needs_teacher=False),
    "always": Gate("mine", lambda statistics: published.always(statistics, kd_weight=0.3)),
    "virtual-teacher": Gate("mine", lambda s: published.virtual_teacher(s), needs_teacher=False, uniform=True),
}
ONE = {**GATES, "always": gates.get_gate("always", kd_weight=0.3)}


def step(row_step, student, teachers, target, options: Options, scale: float | None = 1.0):
    def decide(student_read, teacher_read):
        sentence = torch.zeros_like(target)
        return options.gate.weights(TokenStatistics(student_read, teacher_read, sentence, 1, student.size(1)))

    unread = torch.zeros(len(target))
    weights = decide(unread, unread) if options.gate.constant else decide
    return row_step(student.clone(), [t.clone() for t in teachers], target, weights, options, scale)


def logits(count: int, vocabulary: int, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, vocabulary, generator=generator).mul(3).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(vocabulary, (count,), generator=generator)


def test_usable_here():
    assert cpu_rows.usable("cpu") is None
    assert unusable("native", "cpu") is None
    assert unusable("native", "cuda") == 'the row kernel is for CPUs, and this is "cuda".'
    assert cpu_rows.usable("cuda") == 'the row kernel is for CPUs, and this is "cuda".'


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 5),
    vocabulary=st.sampled_from([2, 3, 15, 16, 17, 31, 507, 2047, 2048, 2049, 5003]),
    seed=st.integers(0, 5),
)
def test_odd_shapes(count: int, vocabulary: int, seed: int):
    student, teacher, target = logits(count, vocabulary, seed=seed)
    options = Options(GATES["token"], label_smoothing=0.1, confidence_penalty=0.2, top1=True)
    ours, dz = step(cpu_rows.row_step, student, [teacher], target, options)
    plain, dz_plain = step(rows.row_step, student.double(), [teacher.double()], target, options)
    torch.testing.assert_close(dz.double(), dz_plain, atol=1e-6, rtol=1e-5)
    for name in ("loss", "nll", "data_term", "kl", "student_read", "teacher_read", "confidence"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(plain, name), atol=3e-6, rtol=1e-5)
    assert torch.equal(ours.correct, plain.correct)
    assert torch.equal(ours.teacher_mask, plain.teacher_mask)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("dtype", cpu_rows.DTYPES)
def test_one_call_and_two_agree(name: str, dtype: torch.dtype):
    student, teacher, target = logits(64, 1001, dtype)
    teachers = [teacher] if ONE[name].needs_teacher else []
    fused, dz = step(cpu_rows.row_step, student, teachers, target, Options(ONE[name], label_smoothing=0.1))
    split, dz_split = step(cpu_rows.row_step, student, teachers, target, Options(SPLIT[name], label_smoothing=0.1))
    torch.testing.assert_close(dz, dz_split, atol=1e-9, rtol=2 * torch.finfo(dtype).eps)
    assert torch.equal(fused.loss, split.loss)
    assert 0 < fused.teacher_mask.sum() < 64 or name != "token"


@pytest.mark.parametrize("gate", [GATES["token"], SPLIT["token"]], ids=["one call", "two"])
def test_student_and_teacher_of_different_dtypes(gate: Gate):
    student, teacher, target = logits(8, 300)
    expected, dz_plain = step(rows.row_step, student.bfloat16(), [teacher], target, Options(gate))
    for wide in (teacher, teacher.double()):
        ours, dz = step(cpu_rows.row_step, student.bfloat16(), [wide], target, Options(gate))
        torch.testing.assert_close(ours.kl, expected.kl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dz, dz_plain, atol=1e-6, rtol=2**-7)


def test_gradient_is_rounded_once_and_to_the_nearest():
    student, teacher, target = logits(16, 300, torch.bfloat16)
    for options in (Options(GATES["token"]), Options(SPLIT["token"])):
        _, half = step(cpu_rows.row_step, student, [teacher], target, options)
        _, full = step(cpu_rows.row_step, student.float(), [teacher.float()], target, options)
        assert torch.equal(half, full.bfloat16())


def test_a_tie_leaves_the_token_to_the_data():
    student, _, target = logits(8, 300)
    ours, dz = step(cpu_rows.row_step, student, [student], target, Options(GATES["token"], teacher_temperature=1.0))
    _, of_data = step(cpu_rows.row_step, student, [], target, Options(GATES["none"]))
    assert not ours.teacher_mask.any()
    torch.testing.assert_close(dz, of_data, atol=1e-7, rtol=1e-6)


def test_gate_that_reads_the_teacher_at_temperature_1():
    student, teacher, target = logits(64, 300)
    options = Options(GATES["token"], gate_on="argmax", teacher_temperature=2.0, tempered_gate=False)
    ours, dz = step(cpu_rows.row_step, student, [teacher], target, options)
    plain, dz_plain = step(rows.row_step, student, [teacher], target, options)
    for name in ("data_term", "student_read", "teacher_read"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(dz, dz_plain, atol=1e-6, rtol=1e-5)


def test_equal_rows_have_no_divergence_and_no_gradient():
    student, _, target = logits(8, 4001)
    ours, dz = step(
        cpu_rows.row_step, student, [student], target, Options(gates.get_gate("always"), teacher_temperature=1.0)
    )
    assert ours.kl.abs().max() < 1e-6
    assert dz.abs().max() < 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float):
    student, teacher, target = logits(4, 100)
    student[1, 7] = value
    for options in (Options(GATES["token"]), Options(SPLIT["token"])):
        ours, dz = step(cpu_rows.row_step, student, [teacher], target, options)
        assert not ours.nll[1].isfinite()
        assert not dz[1].isfinite().all()
        assert dz[0].isfinite().all()


def test_masked_logits_have_no_probability():
    """A logit of minus infinity, by which a decoder forbids a token, has probability 0 and leads to no nan."""
    student, teacher, target = logits(4, 100)
    student[:, 50], teacher[:, 50], target[:] = -torch.inf, -torch.inf, 3
    ours, dz = step(cpu_rows.row_step, student, [teacher], target, Options(GATES["token"]))
    plain, dz_plain = step(rows.row_step, student, [teacher], target, Options(GATES["token"]))
    assert (dz[:, 50] == 0).all()
    torch.testing.assert_close(dz, dz_plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.loss, plain.loss)


def test_a_compiler_without_half_precision(tmp_path: Path):
    """Without _Float16 in the compiler plain torch computes rows in fp16, also for a gate that is decided first."""
    code = """
import torch
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.loss.native import rows
rows.FLAGS += ("-U__FLT16_MAX__",)
torch.manual_seed(0)
student, teacher = torch.randn(2, 1, 9, 40).half()
eye, target = torch.eye(40).half(), torch.randint(2, 40, (1, 9))
for known in (None, torch.full((1, 9), -3.0)):
    found = []
    for implementation in ("native", "chunked"):
        leaf = student.clone().requires_grad_()
        out = gated_distillation(leaf, eye, teacher, eye, target, teacher_gold=known, implementation=implementation)
        found.append((out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))
    torch.testing.assert_close(*found)
assert rows.dtypes() == (torch.float32, torch.bfloat16)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_target_outside_the_vocabulary_is_refused():
    student, teacher, target = logits(4, 100)
    for wrong in (100, -1):
        target[2] = wrong
        with pytest.raises(IndexError, match="a target is no token of the vocabulary of 100"):
            step(cpu_rows.row_step, student, [teacher], target, Options(GATES["token"]))


def program(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `code` in a new process in which `a` (eager) and `b` (auto) are outputs of the same loss."""
    start = """
import logging
logging.basicConfig(level=logging.WARNING)
import torch
from hgkd_fairseq.loss import gated_distillation
generator = torch.Generator().manual_seed(0)
h, w, t, u = (torch.randn(*size, generator=generator) for size in ((2, 9, 8), (40, 8)) * 2)
target = torch.randint(2, 40, (2, 9), generator=generator)
a, b, c = (gated_distillation(h, w, t, u, target, implementation=i) for i in ("eager", "auto", "auto"))
assert torch.allclose(a.loss, b.loss, rtol=1e-5), (a.loss, b.loss)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the folder of compiled kernels, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hgkd_fairseq"


def test_compiled_once_and_kept(cache: Path):
    kept = cpu_rows.library()
    made = kept.stat()
    assert cpu_rows.library() == kept
    assert list(cache.iterdir()) == [kept]
    assert kept.stat() == made


@pytest.mark.parametrize("length", [0, 1000, -1])
def test_a_kernel_that_is_cut_short_is_compiled_again(length: int, cache: Path):
    kept = cpu_rows.library()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    assert cpu_rows.library().read_bytes() == whole
    assert len(list(cache.iterdir())) == 1


def test_another_library_under_the_kernels_name_is_not_loaded(cache: Path, tmp_path: Path):
    """A file with other content and a link are not loaded under the kernel's name, though both are this user's."""
    kept = cpu_rows.library()
    whole = kept.read_bytes()
    kept.write_bytes(b"not " + whole)
    assert cpu_rows.library().read_bytes() == whole
    (tmp_path / "theirs.so").write_bytes(whole)
    kept.unlink()
    kept.symlink_to(tmp_path / "theirs.so")
    assert not cpu_rows.library().is_symlink()


def test_the_cache_is_for_this_user_alone(cache: Path):
    before = os.umask(0)
    try:
        kept = cpu_rows.library()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache.parent, cache, kept)] == [0o700] * 3


@pytest.mark.parametrize("open_to_others", ["the folder", "the folder above", "the file"])
def test_what_others_may_write_to_is_not_used(open_to_others: str, cache: Path, caplog: pytest.LogCaptureFixture):
    kept = cpu_rows.library()
    opened = {"the folder": cache, "the folder above": cache.parent, "the file": kept}[open_to_others]
    opened.chmod(0o777)
    made = cpu_rows.library()
    if opened == kept:
        assert made == kept
        assert kept.stat().st_mode & 0o777 == 0o700
        return
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert cache not in made.parents
    (message,) = caplog.messages
    assert f"compiled for this process alone: {opened} is another user's, or others may write to it" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_not_used(cache: Path):
    kept = cpu_rows.library()
    os.chown(kept, 65534, 65534)
    assert cpu_rows.library().stat().st_uid == 0
    os.chown(cache, 65534, 65534)
    assert cache not in cpu_rows.library().parents


@pytest.mark.parametrize("where", ["a read-only cache", "a read-only home"])
def test_a_cache_that_cannot_be_written_to(where: str, monkeypatch: pytest.MonkeyPatch):
    """The kernel is compiled for this process alone, also if TMPDIR does not exist."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # the other user may be unable to read the checkout
    monkeypatch.setattr(cpu_rows, "SOURCE", Path(shutil.copy(cpu_rows.SOURCE, home)))
    kept = home / ".cache" / "hgkd_fairseq"
    kept.mkdir(parents=True)
    kept.chmod(0o555)
    home.chmod(0o555)

    def compile_it() -> None:
        as_a_user()
        os.umask(0o077)
        os.environ.update(HOME=str(home if where == "a read-only cache" else "/proc"), TMPDIR="/nowhere")
        os.environ.pop("XDG_CACHE_HOME", None)
        tempfile.tempdir = None
        made = cpu_rows.library()
        assert made.exists()
        assert not made.is_relative_to(home)

    try:
        assert in_a_child(compile_it) == 0
    finally:
        home.chmod(0o700)
        shutil.rmtree(home)


def test_a_relative_cache_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cpu_rows.library().parent == tmp_path / "home" / ".cache" / "hgkd_fairseq"
    assert not Path("relative").exists()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "false"}, "false failed: no message"),
        ({"PATH": "", "CC": ""}, "there is no C compiler (cc, gcc, clang, or the program of the variable CC)"),
    ],
)
def test_without_a_compiler_plain_torch_does_the_rows(variables: dict[str, str], reason: str, tmp_path: Path):
    done = program("", XDG_CACHE_HOME=str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the loss runs in plain torch, slower") == 1, done.stderr
    assert "compiled for this process alone" not in done.stderr
    assert reason in done.stderr
    asked = program(
        'gated_distillation(h, w, t, u, target, implementation="native")', XDG_CACHE_HOME=str(tmp_path), **variables
    )
    assert 'ValueError: implementation="native" cannot be used: the row kernel cannot be compiled' in asked.stderr


def test_one_result_for_any_number_of_threads():
    """Threads share out whole rows, so that the result is the same to the bit for any number of threads."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(4, 25, 16, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(2500, 16, generator=generator) for _ in range(2))
    target = torch.randint(2, 2500, (4, 25), generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = gated_distillation(hidden, weight, teacher, teacher_weight, target, implementation="native")
            found.append(out.token_nll)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
