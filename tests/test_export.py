"""Export: for plain fairseq in an environment without the plugin, for CTranslate2; models side by side."""

import re
import subprocess
import sys
from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq import cli
from hgkd_fairseq.calibration import inference
from hgkd_fairseq.compare import Search, compare

SEARCH = ("--gen-subset", "test", "--beam", 3, "--max-len-b", 20, "--required-batch-size-multiple", 1, "--cpu")

# Plain fairseq as its users have it: no PYTHONPATH, another folder, and the plugin cannot be imported.
ALONE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hgkd_fairseq":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from fairseq_cli.generate import cli_main
sys.argv[0] = "fairseq-generate"
cli_main()
"""


def export(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


def generate_alone(data: Path, checkpoint: Path, folder: Path) -> str:
    command = [sys.executable, "-I", "-c", ALONE, data, "--path", checkpoint, *SEARCH]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=cl.environment(), capture_output=True, text=True,
        timeout=cl.TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def translations(output: str) -> list[str]:
    """The lines of hypotheses and scores."""
    return sorted(line for line in output.splitlines() if re.match(r"[HP]-\d+\t", line))


def test_plain_fairseq_without_the_plugin(data, student, tmp_path):
    """The same translations and scores on the whole test set; nothing but the model is in the file."""
    output = tmp_path / "exported.pt"
    assert export(student.path("checkpoint_best.pt"), output) == 0
    before, after = cl.together(
        lambda: (
            cl.fairseq("generate", data, "--path", student.path("checkpoint_best.pt"), *SEARCH, *cl.USER_DIR).output
        ),
        lambda: generate_alone(data, output, tmp_path),
    )
    assert len(translations(before)) == 2 * 64
    assert translations(after) == translations(before)

    state, original = torch.load(output, weights_only=True), student.state("checkpoint_best.pt")
    assert cl.differences(state["model"], original["model"]) == {}
    assert state["cfg"]["task"]["_name"] == "translation"
    assert state["cfg"]["criterion"]["_name"] == "cross_entropy"
    assert state["criterion"] == {}
    assert "last_optimizer_state" not in state
    text = str({key: value for key, value in state.items() if key != "model"})
    for word in ("teacher", "gate", "hgkd", "hard_gate"):
        assert word not in text.replace("student", ""), word
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in state["model"].values()}
    assert output.stat().st_size < sum(tensors.values()) + 60_000  # names and options; the optimizer would add twice it


def test_average(student, plain, tmp_path):
    """Mean of each tensor, in fp32 and back to its type; tied tensors stay one."""
    paths = [student.path("checkpoint_best.pt"), plain.path("checkpoint_best.pt")]
    one, other = (run.state("checkpoint_best.pt")["model"] for run in (student, plain))
    assert export(":".join(map(str, paths)), tmp_path / "mean.pt") == 0
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)["model"]
    assert mean.keys() == one.keys()
    for key, tensor in mean.items():
        assert torch.equal(tensor, (one[key] + other[key]) / 2), key
    assert mean["encoder.embed_tokens.weight"].data_ptr() == mean["decoder.embed_tokens.weight"].data_ptr()

    # In half precision the sum of these overflows.
    states = []
    for place, value in enumerate((61440.0, 40960.0)):
        state = student.state("checkpoint_best.pt")
        state["model"] = {key: torch.full_like(tensor, value).half() for key, tensor in state["model"].items()}
        states.append(tmp_path / f"half{place}.pt")
        torch.save(state, states[-1])
    assert export(":".join(map(str, states)), tmp_path / "half.pt") == 0
    for tensor in torch.load(tmp_path / "half.pt", weights_only=True)["model"].values():
        assert tensor.dtype == torch.float16
        assert (tensor == 51200).all()


def test_moving_average(student, tmp_path):
    state = student.state("checkpoint_best.pt")
    state["extra_state"]["ema"] = {key: 2 * tensor for key, tensor in state["model"].items()}
    torch.save(state, tmp_path / "ema.pt")
    assert export(tmp_path / "ema.pt", tmp_path / "out.pt", "--ema") == 0
    found = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert cl.differences(found, state["extra_state"]["ema"]) == {}


def test_ctranslate2(data, teacher, plain, tmp_path, capsys):
    """Float32 translates as fairseq does; the command prints both, here with int8 weights."""
    pytest.importorskip("ctranslate2")
    checkpoint = teacher.path("checkpoint_best.pt")
    float32, int8 = tmp_path / "float32", tmp_path / "int8"
    assert export(checkpoint, tmp_path / "a.pt", "--ctranslate2", float32, "--no-comparison") == 0
    options = ("--data", data, "--beam", 3, "--max-len-b", 20, "--repeats", 3, "--cpu")
    capsys.readouterr()
    assert export(checkpoint, tmp_path / "b.pt", "--ctranslate2", int8, "--quantization", "int8", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        "| model", f"| {tmp_path / 'b.pt'}", f"| {int8}"
    ]  # fmt: skip
    assert "median of 3 passes over 64 sentences" in lines[-1]
    assert "ECE|bins:20|mode:inference|align:wang2020|eos:yes|tok:bpe|version:0.1.0" in lines[-1]

    search = Search(beam=3, max_len_b=20)
    paths = [str(tmp_path / "a.pt"), str(float32), str(plain.path("checkpoint_best.pt"))]
    found = compare(str(data), paths, search=search, repeats=1, cpu=True)
    before, after, other = found.rows
    assert other.same < 32  # a model that has hardly learnt
    assert after.same >= 63  # of 64: but for ties
    assert after.bleu == pytest.approx(before.bleu, abs=0.5)
    assert after.ece.value == pytest.approx(before.ece.value, abs=0.003)
    assert before.megabytes == pytest.approx((tmp_path / "a.pt").stat().st_size / 1e6)
    assert before.speed > 0

    # What fairseq-generate wrote has the same calibration.
    result = cl.fairseq("generate", data, "--path", tmp_path / "a.pt", *SEARCH)
    (tmp_path / "generate.txt").write_text(result.output)
    assert inference.evaluate(str(tmp_path / "generate.txt"))["ece"].value == pytest.approx(before.ece.value, abs=1e-4)


def test_refusals(data, student, teacher, tmp_path, capsys, monkeypatch):
    checkpoint = student.path("checkpoint_best.pt")
    (tmp_path / "there.pt").touch()
    (tmp_path / "empty").mkdir()
    small = student.state("checkpoint_best.pt")
    small["model"]["decoder.layers.0.fc1.bias"] = torch.zeros(3)
    torch.save(small, tmp_path / "small.pt")
    lstm = student.state("checkpoint_best.pt")
    lstm["cfg"]["model"].arch = "lstm"
    torch.save(lstm, tmp_path / "lstm.pt")
    out, folder = tmp_path / "out.pt", tmp_path / "ct2"
    cases = [
        ((checkpoint, tmp_path / "there.pt"), "there.pt exists; name another file or folder, or remove it"),
        ((checkpoint, tmp_path / "gone" / "out.pt"), "there is no folder"),
        ((tmp_path / "none.pt", out), "none.pt does not exist; name a fairseq checkpoint"),
        ((f"{checkpoint}:{tmp_path / 'small.pt'}", out), "different architectures cannot be averaged: they differ in "),
        ((checkpoint, out, "--ema"), "holds no moving average; it was trained without --store-ema, so drop --ema"),
        ((checkpoint, out, "--quantization", "int8"), "add --ctranslate2 DIR"),
        ((checkpoint, out, "--ctranslate2", tmp_path / "empty"), "empty exists; name another"),
        ((tmp_path / "lstm.pt", tmp_path / "l.pt", "--ctranslate2", folder), "does not convert this model: "),
        ((checkpoint, out, "--ctranslate2", folder, "--data", tmp_path / "empty"), "no dictionaries"),
        ((checkpoint, out, "--ctranslate2", folder, "--reference", tmp_path / "none.en"), "none.en does not exist"),
    ]
    for arguments, expected in cases:
        capsys.readouterr()
        assert export(*arguments) == 1, expected
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: ")]
        assert len(errors) == 1
        assert expected in errors[0]
        assert not out.exists()
        assert not folder.exists()
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as where it is not installed
    assert export(checkpoint, out, "--ctranslate2", folder) == 1
    assert "--ctranslate2 needs CTranslate2: pip install 'hgkd-fairseq[export]'" in capsys.readouterr().err
    assert not out.exists()
