"""The compiled row step agrees with the oracle, needs no second compilation for another number of tokens, and gives way
to plain torch where there is no compiler."""

import os
import subprocess
import sys

import pytest
import torch

from hgkd_fairseq.loss import compiled, gated_distillation

V, D = 123, 16


def problem(sentences: int, length: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(sentences, length, D, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(V, D, generator=generator) * 0.5 for _ in range(2))
    target = torch.randint(2, V, (sentences, length), generator=generator)
    target[-1] = 1  # a sentence of pads only
    return hidden, weight, teacher, teacher_weight, target


def run(implementation: str, inputs, **options):
    hidden, weight, teacher, teacher_weight, target = inputs
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = gated_distillation(
        hidden, weight, teacher, teacher_weight, target, label_smoothing=0.1, implementation=implementation, **options
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_compiled_equals_eager_at_any_number_of_tokens(gate):
    compilations = []
    for sentences in (3, 40, 61, 2):  # chunks of 10 to 256 tokens; the last has fewer rows than are worth compiling
        length = 9 if sentences > 2 else 3
        inputs = problem(sentences, length, seed=sentences)
        expected, d_hidden, d_weight = run("eager", inputs, gate=gate)
        out, ours_hidden, ours_weight = run("compiled", inputs, gate=gate)
        assert torch.allclose(out.loss, expected.loss, rtol=1e-5)
        assert torch.allclose(out.kd, expected.kd, rtol=1e-4, atol=1e-5)
        assert torch.equal(out.teacher_mask, expected.teacher_mask)
        assert torch.allclose(ours_hidden, d_hidden, atol=1e-5)
        assert torch.allclose(ours_weight, d_weight, atol=1e-4)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not compiled._broken
    assert compilations[1:] == compilations[:-1]  # the first number of tokens was the only one to compile for


def test_without_a_compiler_plain_torch_does_the_rows(tmp_path):
    """A fresh process whose C++ compiler is a program that fails: the same result, and one line that says so."""
    program = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
sys.path.insert(0, {folder!r})
import torch
from test_compiled import problem, run
inputs = problem(3, 9)
a, b = run("eager", inputs, gate="token"), run("compiled", inputs, gate="token")
run("compiled", inputs, gate="token")
assert torch.allclose(a[0].loss, b[0].loss, rtol=1e-5)
assert torch.allclose(a[2], b[2], atol=1e-4)
print("agree")
"""
    environment = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program.format(folder=os.path.dirname(__file__))],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.strip().endswith("agree"), done.stderr[-2000:]
    assert done.stderr.count("the loss runs without a compiled inner loop") == 1, done.stderr[-2000:]
