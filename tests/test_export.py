"""Tests of the export, for plain fairseq without the plugin and for CTranslate2, and of the comparison of models."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq import cli
from hgkd_fairseq.evaluation import inference
from hgkd_fairseq.evaluation.compare import Search, compare

SEARCH = ("--gen-subset", "test", "--beam", 3, "--max-len-b", 20, "--required-batch-size-multiple", 1, "--cpu")

# fairseq-generate in a process that cannot import the plugin.
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


def status(*arguments) -> int:
    """Return the exit status of the command, also if its argument parser exits."""
    try:
        return export(*arguments)
    except SystemExit as end:
        return int(end.code or 0)


def generate_alone(data: Path, checkpoint: Path, folder: Path) -> str:
    command = [sys.executable, "-I", "-c", ALONE, data, "--path", checkpoint, *SEARCH]
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=cl.environment(), capture_output=True, text=True,
        timeout=cl.TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def translations(output: str) -> list[str]:
    """Return the lines of hypotheses and of scores, sorted."""
    return sorted(line for line in output.splitlines() if re.match(r"[HP]-\d+\t", line))


def test_plain_fairseq_without_the_plugin(data, student, tmp_path):
    """The exported file gives the same translations and scores on the whole test set, and holds nothing of teacher,
    gate or optimizer."""
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
    # 60 kB are for names and options; a state of the optimizer would add twice the size of the tensors.
    assert output.stat().st_size < sum(tensors.values()) + 60_000


def test_average(student, plain, tmp_path):
    """Tensors are averaged in fp32 and converted back to their dtype; tied tensors stay tied."""
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
    """A float32 model translates as fairseq does; the command compares both models, here with int8 weights."""
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
    assert other.same < 32  # an undertrained model
    assert after.same >= 63  # of 64, because of ties
    assert after.bleu == pytest.approx(before.bleu, abs=0.5)
    assert after.ece.value == pytest.approx(before.ece.value, abs=0.003)
    assert before.megabytes == pytest.approx((tmp_path / "a.pt").stat().st_size / 1e6)
    assert before.speed > 0

    # The output of fairseq-generate has the same calibration.
    result = cl.fairseq("generate", data, "--path", tmp_path / "a.pt", *SEARCH)
    (tmp_path / "generate.txt").write_text(result.output)
    assert inference.evaluate(str(tmp_path / "generate.txt"))["ece"].value == pytest.approx(before.ece.value, abs=1e-4)


WIDTHS = {"encoder_embed_dim": 16, "decoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "decoder_ffn_embed_dim": 24}
LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


class Tiny:
    """A transformer with random weights, with its dictionary and its checkpoint in a folder."""

    def __init__(self, folder: Path, arch: str = "transformer", **options):
        self.dictionary = Dictionary()
        for i in range(30):
            self.dictionary.add_symbol(f"w{i}", 100 - i)
        for language in ("de", "en"):
            self.dictionary.save(str(folder / f"dict.{language}.txt"))
        task = TranslationTask(TranslationConfig(data=str(folder)), self.dictionary, self.dictionary)
        given = Namespace(**{**WIDTHS, **LAYERS, **options}, arch=arch, _name=arch)
        torch.manual_seed(1)
        self.model = models.build_model(given, task)  # adds the architecture's defaults to `given`
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for coder in (self.model.encoder, self.model.decoder):
                coder.embed_tokens.weight[self.dictionary.pad()] = 0
        self.model.eval()
        self.path = folder / "a.pt"
        task = {"_name": "translation", "data": str(folder), "source_lang": "de", "target_lang": "en"}
        cfg = {"model": given, "task": task, "criterion": {"_name": "cross_entropy"}, "common": {}}
        history = [{"criterion_name": "X", "optimizer_name": "X", "lr_scheduler_state": {}, "num_updates": 1}]
        state = {"args": None, "cfg": cfg, "model": self.model.state_dict(), "optimizer_history": history}
        torch.save({**state, "extra_state": {}}, self.path)

    @torch.no_grad()
    def logprobs(self, source: list[str], target: list[str]) -> list[float]:
        """Return the log-probabilities of the tokens of a translation and of its end of sentence."""
        to_ids = self.dictionary.index
        ids, gold = torch.tensor([[*map(to_ids, source), 2]]), [*map(to_ids, target), 2]
        output = self.model(ids, torch.tensor([ids.size(1)]), torch.tensor([[2, *gold[:-1]]]))
        return self.model.get_normalized_probs(output, log_probs=True)[0][range(len(gold)), gold].tolist()


PRENORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}
CONVERTED = {
    "defaults": {},
    "tied": {"share_all_embeddings": True},
    "output tied": {"share_decoder_input_output_embed": True},
    "pre-norm": PRENORM,
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True, "max_target_positions": 40},
    "embeddings": {"no_scale_embedding": True, "layernorm_embedding": True},
    "gelu": {"activation_fn": "gelu", "dropout": 0.3, "encoder_layerdrop": 0.2},
    "gelu_accurate": {"activation_fn": "gelu_accurate", "attention_dropout": 0.1},
    "two widths": {"encoder_embed_dim": 24},
    "align": {"arch": "transformer_align", "alignment_layer": 0},
    "bart": {"arch": "bart_base"},
}
NOT_CONVERTED = {
    "cross_self_attention": True,
    "no_cross_attention": True,
    "scale_heads": True,
    "scale_fc": True,
    "quant_noise_pq": 0.1,
    "quant_noise_scalar": 0.1,
    "adaptive_softmax_cutoff": "10,20",
    "decoder_layers_to_keep": "1",
    "no_decoder_final_norm": True,
    "char_inputs": True,
}


@pytest.mark.parametrize("name", CONVERTED)
def test_ctranslate2_gives_the_same_probabilities(name: str, tmp_path):
    """A converted model gives fairseq's probabilities, for every option that the export accepts."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    tiny = Tiny(tmp_path, **CONVERTED[name])
    assert export(tiny.path, tmp_path / "out.pt", "--ctranslate2", tmp_path / "ct2", "--no-comparison") == 0
    source, target = ["w1", "w2", "w9"], ["w7", "w1"]
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    (found,) = translator.score_batch([source], [target])
    assert found.log_probs == pytest.approx(tiny.logprobs(source, target), abs=1e-5)


@pytest.mark.parametrize("option", NOT_CONVERTED)
def test_ctranslate2_does_not_know(option: str, tmp_path, capsys):
    """Options for which the converter would fail or make another model are refused."""
    pytest.importorskip("ctranslate2")
    tiny = Tiny(tmp_path, **{option: NOT_CONVERTED[option]})
    assert export(tiny.path, tmp_path / "out.pt", "--ctranslate2", tmp_path / "ct2", "--no-comparison") == 1
    assert f"its converter does not know --{option.replace('_', '-')} " in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


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
    no_task, diverged = student.state("checkpoint_best.pt"), student.state("checkpoint_best.pt")
    del no_task["cfg"]["task"]
    torch.save(no_task, tmp_path / "no_task.pt")
    diverged["extra_state"]["ema"] = {key: tensor * torch.nan for key, tensor in diverged["model"].items()}
    torch.save(diverged, tmp_path / "ema.pt")
    out, folder = tmp_path / "out.pt", tmp_path / "ct2"
    cases = [
        ((tmp_path / "no_task.pt", out), "it holds no options of its task"),
        ((tmp_path / "ema.pt", out, "--ema"), "holds nan or infinity in "),
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
        assert status(*arguments) in (1, 2), expected
        errors = re.findall(r"^hgkd(?: export)?: error: .*$", capsys.readouterr().err, flags=re.MULTILINE)
        assert len(errors) == 1
        assert expected in errors[0]
        assert not out.exists()
        assert not folder.exists()
    monkeypatch.setitem(sys.modules, "ctranslate2", None)  # as if it were not installed
    assert export(checkpoint, out, "--ctranslate2", folder) == 1
    assert "--ctranslate2 needs CTranslate2: pip install 'hgkd-fairseq[export]'" in capsys.readouterr().err
    assert not out.exists()
