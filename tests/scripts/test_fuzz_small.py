"""A bounded part of scripts/fuzz/small.py and pickles.py: what is left of the readers, and checkpoints that hold
code."""

import contextlib
import io
import random
import sys
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer
from torch._utils import _rebuild_tensor_v2

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "fuzz"))

import checkpoints
import pickles
import small

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import checkpoints as loader


@pytest.mark.parametrize("name", small.READERS)
def test_no_traceback_and_no_hang(name):
    with contextlib.redirect_stdout(io.StringIO()):  # of the readers that print
        counts, slowest = checkpoints.fuzz(150, 3, *small.READERS[name])
    assert counts.keys() <= {"read", "refused"}
    assert counts["read"] > 0
    assert slowest < checkpoints.SLOWEST_S


@pytest.mark.parametrize("form", pickles.FORMS)
@pytest.mark.parametrize("kind", pickles.KINDS)
def test_code_is_refused_in_every_form(kind: str, form: str, tmp_path: Path):
    rng = random.Random(f"{kind} {form}")
    for place in ("end", "alone", "begin"):
        code = pickles.operations(*rng.choice(pickles.calls()), kind)
        (tmp_path / "a.pt").write_bytes(pickles.file_of(code, place, form))
        with pytest.raises(UserError) as caught:
            pickles.read(tmp_path / "a.pt")
        assert str(caught.value).isprintable()


def hooked() -> torch.Tensor:
    """A parameter that calls a function with its gradient."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter._backward_hooks = OrderedDict(a=_rebuild_tensor_v2)
    return parameter


def with_attributes() -> OrderedDict:
    found = OrderedDict(a=1)
    found.kept = [np.ones(2), _rebuild_tensor_v2]
    return found


ODD = {
    "a function": lambda: _rebuild_tensor_v2,
    "a class": lambda: OrderedDict,
    "a storage class": lambda: torch.FloatStorage,
    "functions in all kinds": lambda: {"a": [(_rebuild_tensor_v2, Namespace(b={_rebuild_tensor_v2}))]},
    "a function for a key": lambda: {_rebuild_tensor_v2: 1, (1, _rebuild_tensor_v2): 2, (1, "a"): 3},
    "a tensor for a key": lambda: {torch.ones(1): 1},
    "counts of arrays": lambda: Counter(a=np.ones(2)),
    "a set": lambda: {1, "a", (2, None)},
    "attributes of a dict": with_attributes,
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "hooks": hooked,
    "a dtype": lambda: np.dtype("i8"),
    "plain": lambda: [torch.Size([1]), torch.int8, torch.device("cpu"), b"a", None, True],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", ODD)
def test_tensors_and_plain_values_are_all_that_is_left(name: str, zipped: bool, tmp_path: Path):
    """Of what torch lets a file name and of what hangs on a tensor nothing is."""
    state = checkpoints.state()
    state["extra_state"]["odd"] = ODD[name]()
    state["last_optimizer_state"]["state"][0]["odd"] = [ODD[name]()]
    (tmp_path / "a.pt").write_bytes(checkpoints.saved(state, zipped))
    found = loader.read(tmp_path / "a.pt").state
    checkpoints.check_plain(found)
    if name == "plain":
        assert found["extra_state"]["odd"] == ODD[name]()
    if name == "counts of arrays":
        assert torch.equal(found["extra_state"]["odd"]["a"], torch.ones(2))
    if name == "a set":
        assert found["extra_state"]["odd"] == ODD[name]()


def test_the_walk_finds_what_is_not_plain():
    for value in (_rebuild_tensor_v2, {"a": [OrderedDict]}, hooked(), Namespace(a=object()), {1: {2: np.ones(1)}}):
        with pytest.raises(AssertionError):
            checkpoints.check_plain({"a": value})


@pytest.mark.parametrize(
    ("symbol", "complaint"),
    [(None, "m: is no model of sentencepiece"), ("b c", "m: its piece 'b c' holds white space, .*")],
)
def test_a_model_of_sentencepiece_that_text_cannot_hold_is_refused(symbol: str | None, complaint: str):
    model = io.BytesIO()
    if symbol:
        options = {"model_type": "bpe", "vocab_size": 20, "user_defined_symbols": [symbol], "hard_vocab_limit": False}
        SentencePieceTrainer.train(sentence_iterator=iter(small.SENTENCES), model_writer=model, **options)
    with pytest.raises(UserError, match=f"^{complaint}$"):
        small.encode_text.Model(model.getvalue(), "m")
