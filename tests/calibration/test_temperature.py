"""The fitted temperature: its derivatives, and that it finds the minimum."""

import json
from functools import partial

import pytest
import torch

from hgkd_fairseq.calibration.temperature import fit, nll_slopes
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation.temperature import read
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.loss.options import Head


def heads(members: int, count: int = 50) -> tuple[list[Head], torch.Tensor]:
    torch.manual_seed(members)
    found = [
        Head(torch.randn(count, 6).double(), 2 * torch.randn(9, 6).double(), torch.randn(9).double())
        for _ in range(members)
    ]
    return found, mean_logprobs(found, 1.0).exp().multinomial(1).squeeze(1)


def nll(members, gold, inverse: float) -> float:
    return float(-mean_logprobs(members, 1 / inverse).gather(1, gold[:, None]).sum())


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("inverse", [0.4, 1.0, 2.5])
def test_slopes_are_differences(members: int, inverse: float):
    model, gold = heads(members)
    step = 1e-3
    below, here, above = (nll(model, gold, inverse + offset) for offset in (-step, 0, step))
    first, second = nll_slopes(partial(mean_logprobs, model), gold, inverse)
    assert first == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-3)
    assert second == pytest.approx((above - 2 * here + below) / step**2, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("true", [0.2, 1.0, 1.6, 7.0])
def test_finds_the_temperature_that_was_hidden(members: int, true: float):
    """Gold tokens are drawn from a model whose logits are then multiplied by `true`."""
    model, gold = heads(members, count=20000)
    sharp = [head._replace(hidden=head.hidden * true, bias=head.bias * true) for head in model]
    passes = []

    def slope(inverse: float):
        passes.append(inverse)
        return nll_slopes(partial(mean_logprobs, sharp), gold, inverse)

    found = fit(slope)
    assert found == pytest.approx(true, rel=0.05)
    assert len(passes) <= 12
    assert all(nll(sharp, gold, 1 / found) <= nll(sharp, gold, factor / found) for factor in (0.99, 1.01))


@pytest.mark.parametrize("right", [True, False], ids=["always right", "always wrong"])
def test_no_minimum(right: bool):
    model, _ = heads(1)
    logp = mean_logprobs(model, 1.0)
    gold = logp.argmax(1) if right else logp.argmin(1)
    assert fit(partial(nll_slopes, partial(mean_logprobs, model), gold)) is None


def test_read(tmp_path):
    file = tmp_path / "temperature.json"
    file.write_text(json.dumps({"temperature": 1.25}))
    assert (read("0.5"), read(str(file))) == (0.5, 1.25)
    (tmp_path / "other.json").write_text("[]")
    for given, expected in [("x.json", "neither"), (str(tmp_path / "other.json"), "neither"), ("0", "above 0"),
                            ("nan", "above 0"), ("-1", "above 0")]:  # fmt: skip
        with pytest.raises(UserError, match=expected):
            read(given)
