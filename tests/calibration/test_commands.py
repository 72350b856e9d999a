"""`hgkd calibration` on models that fairseq trained and translations that fairseq made."""

import json
import math

import command_line as cl
import pytest
import torch
from sklearn.metrics import log_loss

from hgkd_fairseq import cli
from hgkd_fairseq.evaluation.forced import load
from hgkd_fairseq.evaluation.inference import read


def run(*arguments) -> int:
    return cli.main(["calibration", *map(str, arguments)])


def probabilities(data, path, subset: str, temperature: float = 1.0):
    """(probability (N, V), gold (N,)) of every target token, sentence by sentence, from fairseq's own forward pass."""
    models, task, _ = load(str(data), str(path), cpu=True)
    task.load_dataset(subset)
    dataset = task.dataset(subset)
    rows, gold = [], []
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        with torch.no_grad():
            logits, _ = models[0](**sample["net_input"])
        rows.append((logits[0].double() / temperature).softmax(-1))
        gold.append(sample["target"][0])
    return torch.cat(rows), torch.cat(gold), task.target_dictionary


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forced_by_hand(data, teacher, tmp_path, capsys, temperature: float):
    path = teacher.path("checkpoint_best.pt")
    options = ("--temperature", temperature, "--json", tmp_path / "scores.json", "--tokens", tmp_path / "tokens.tsv")
    assert run("forced", data, "--path", path, "--cpu", "--max-tokens", 300, *options) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    probability, gold, dictionary = probabilities(data, path, "test", temperature)
    top, argmax = probability.max(1)
    right = argmax == gold
    gold_probability = probability.gather(1, gold[:, None]).squeeze(1)
    for suffix, rows in (("", slice(None)), ("_without_eos", gold != dictionary.eos())):
        count = len(gold[rows])
        onehot = torch.nn.functional.one_hot(gold[rows], len(dictionary))
        surplus = torch.zeros(20).double()
        p = probability[rows].flatten()
        cell = (p * 20).ceil().long().clamp(min=1) - 1
        surplus.index_add_(0, cell, p * (p - onehot.flatten()))
        full = torch.zeros(20).double().index_add_(0, cell, p - onehot.flatten())
        binned = torch.zeros(20).double()
        binned.index_add_(0, ((top[rows] * 20).ceil().long().clamp(min=1) - 1), top[rows] - right[rows].double())
        expected = {
            "ece": float(binned.abs().sum()) / count,
            "weighted_ece": float(surplus.abs().sum()) / count,
            "full_ece": float(full.abs().sum()) / count,
            "brier": float((probability[rows] - onehot).square().sum(1).mean()),
            "brier_top1": float((top[rows] - right[rows].double()).square().mean()),
            "nll_top1": log_loss(right[rows], top[rows]) / math.log(2),
            "nll": float(-gold_probability[rows].log2().mean()),
            "accuracy": float(right[rows].double().mean()),
        }
        for key, value in expected.items():
            assert found[key + suffix] == pytest.approx(value, rel=1e-4, abs=1e-6), key + suffix
    assert (found["tokens"], found["sentences"], found["temperature"]) == (len(gold), 64, temperature)
    score = found["scores"][0]
    assert 0 <= score["low"] < score["high"] <= 1
    tempered = "" if temperature == 1 else "|temp:2.5"
    assert f"ECE|bins:20|mode:forced|eos:yes|tok:bpe{tempered}|version:0.1.0 = " in capsys.readouterr().out

    lines = [line.split("\t") for line in (tmp_path / "tokens.tsv").read_text().splitlines()]
    assert lines[0] == ["sentence", "token", "predicted", "confidence", "correct", "nll_bits", "brier"]
    rows = sorted(lines[1:], key=lambda line: int(line[0]))  # stable: the tokens of a sentence stay in order
    assert [line[1] for line in rows] == [dictionary[index] for index in gold]
    assert [line[2] for line in rows] == [dictionary[index] for index in argmax]
    assert [float(line[5]) for line in rows] == pytest.approx((-gold_probability.log2()).tolist(), abs=1e-4)


def test_batches_do_not_matter(data, plain, tmp_path):
    files = []
    for size in (60, 4000):
        files.append(tmp_path / f"{size}.json")
        checkpoint = plain.path("checkpoint_best.pt")
        assert run("forced", data, "--path", checkpoint, "--cpu", "--max-tokens", size, "--json", files[-1]) == 0
    one, other = (json.loads(file.read_text()) for file in files)
    for score, same in zip(one["scores"], other["scores"], strict=True):
        # Adaptive ECE may see a token cross an edge by a rounding.
        for key in ("value", "low", "high"):
            assert score[key] == pytest.approx(same[key], abs=2e-3 if "adaptive" in score["key"] else 1e-5), score


def test_temperature(data, plain, tmp_path, capsys):
    """Within 1 % of a search over a table of logits, and read back by forced."""
    path, file = plain.path("checkpoint_best.pt"), tmp_path / "temperature.json"
    assert run("temperature", data, "--path", path, "--cpu", "--replicates", 0, "--json", file) == 0
    found = json.loads(file.read_text())
    grid = [found["temperature"] * factor for factor in (0.98, 0.99, 1, 1.01, 1.02)]
    nll = []
    for temperature in grid:
        probability, gold, _ = probabilities(data, path, "valid", temperature)
        nll.append(float(-probability.gather(1, gold[:, None]).log2().mean()))
    assert min(nll) == nll[2]
    assert found["scaled"]["nll"] == pytest.approx(nll[2], rel=1e-5)
    assert found["raw"]["nll"] >= found["scaled"]["nll"]
    assert f"temperature = {found['temperature']:.4f}" in capsys.readouterr().out
    arguments = (data, "--path", path, "--cpu", "--gen-subset", "valid", "--temperature", file, "--replicates", 0)
    assert run("forced", *arguments, "--json", tmp_path / "scaled.json") == 0
    assert json.loads((tmp_path / "scaled.json").read_text())["nll"] == pytest.approx(found["scaled"]["nll"])


@pytest.fixture(scope="module")
def generated(data, teacher, tmp_path_factory) -> dict[int, str]:
    """What fairseq-generate wrote, by the width of its beam."""
    folders = {beam: tmp_path_factory.mktemp(f"beam{beam}") for beam in (1, 3)}

    def generate(beam: int) -> cl.Result:
        options = ("--cpu", "--beam", beam, "--max-len-b", 12, "--results-path", folders[beam])
        return cl.fairseq("generate", data, *cl.USER_DIR, "--path", teacher.path("checkpoint_best.pt"), *options)

    for result in cl.together(lambda: generate(1), lambda: generate(3)):
        assert result.code == 0, result.end()
    return {beam: str(folder / "generate-test.txt") for beam, folder in folders.items()}


@pytest.mark.parametrize("beam", [1, 3])
def test_inference(data, teacher, generated, tmp_path, beam: int):
    """The confidences of the file are those of the model under the hypothesis' own prefix."""
    file = tmp_path / "inference.json"
    assert run("inference", generated[beam], "--json", file, "--replicates", 50) == 0
    found = json.loads(file.read_text())
    rows = read(generated[beam])
    assert len(rows) == found["sentences"] == 64
    assert found["tokens"] == sum(len(row.logprobs) for row in rows)
    assert sum(found["histograms"]["eos:yes"]["count"]) == found["tokens"]
    assert sum(found["histograms"]["eos:no"]["count"]) == found["tokens"] - 64
    assert 0.3 < found["accuracy"] < 1  # the teacher has learnt something

    models, task, _ = load(str(data), str(teacher.path("checkpoint_best.pt")), cpu=True)
    task.load_dataset("test")
    dictionary = task.target_dictionary
    for row in rows[:8]:
        sample = task.dataset("test").collater([task.dataset("test")[row.sentence]])
        tokens = torch.tensor([[dictionary.index(token) for token in row.tokens] + [dictionary.eos()]])
        previous = torch.cat([tokens[:, -1:], tokens[:, :-1]], dim=1)
        with torch.no_grad():
            source = {key: sample["net_input"][key] for key in ("src_tokens", "src_lengths")}
            logits, _ = models[0](**source, prev_output_tokens=previous)
        bits = logits[0].log_softmax(-1).gather(1, tokens[0, :, None]).squeeze(1) / math.log(2)
        assert row.logprobs == pytest.approx(bits.tolist(), abs=2e-3)
        assert row.reference == dictionary.string(sample["target"][0]).split()


def test_one_figure_of_both(data, teacher, generated, tmp_path):
    forced, inference = tmp_path / "forced.json", tmp_path / "inference.json"
    assert run("forced", data, "--path", teacher.path("checkpoint_best.pt"), "--cpu", "--json", forced) == 0
    assert run("inference", generated[1], "--json", inference) == 0
    output = tmp_path / "figure.png"
    names = ("--label", "teacher-forced", "--label", "greedy")
    assert run("diagram", forced, inference, *names, "--output", output, "--without-eos") == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_refusals(data, plain, tmp_path, capsys):
    """One sentence each, exit status 1, and before the work where that can be."""
    checkpoint = plain.path("checkpoint_best.pt")
    state = plain.state("checkpoint_best.pt")
    for tensor in state["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    for side in ("de", "en"):
        (empty / f"dict.{side}.txt").write_text((data / f"dict.{side}.txt").read_text())
        (empty / f"none.{side}").write_text("")
    result = cl.fairseq(
        "preprocess", "--testpref", empty / "none", "--source-lang", "de", "--target-lang", "en", "--destdir",
        empty / "bin", "--srcdict", empty / "dict.de.txt", "--tgtdict", empty / "dict.en.txt",
    )  # fmt: skip
    assert result.code == 0, result.end()
    (tmp_path / "generate.txt").write_text("H-0\t-1\ta b\nT-0\ta b\nP-0\t-1 -1\n")
    cases = [
        (
            ("forced", empty / "bin", "--path", checkpoint),
            "holds no sentences, or is damaged); run fairseq-preprocess again, or name another with --gen-subset",
        ),
        (("forced", data, "--path", tmp_path / "nan.pt"), "its training has diverged; name an earlier one"),
        (("temperature", data, "--path", tmp_path / "nan.pt"), "its training has diverged; name an earlier one"),
        (("forced", data, "--path", checkpoint, "--temperature", "warm"), "--temperature warm is neither"),
        (("forced", data, "--path", checkpoint, "--tokens", tmp_path / "t.csv"), "ends in .tsv or .parquet"),
        (("inference", tmp_path / "generate.txt"), "H-0 has 2 tokens and an end of sentence, P-0 2 scores"),
        (("diagram", tmp_path / "generate.txt", "--output", tmp_path / "x.png"), "is no file of"),
    ]
    for arguments, expected in cases:
        capsys.readouterr()
        assert run(*arguments) == 1
        errors = capsys.readouterr().err.splitlines()
        errors = [line for line in errors if line.startswith("hgkd: error: ")]
        assert len(errors) == 1
        assert expected in errors[0]
    for arguments, expected in [
        (("--bins", "0"), "0 is no whole number above 0"),
        (("--json", tmp_path / "gone" / "x.json"), "make it first"),
    ]:
        with pytest.raises(SystemExit):
            run("forced", data, "--path", checkpoint, *arguments)
        assert expected in capsys.readouterr().err
