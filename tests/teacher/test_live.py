"""Checkpoints that cannot be teachers are refused with one error message each, before anything is trained."""

from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq import plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.teacher.live import LiveTeacher

CODE = "__import__('pathlib').Path('code_has_run').touch()"

plugin.register()


@pytest.fixture(scope="module")
def task(data: Path) -> TranslationTask:
    interpolated = {"train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1}
    return TranslationTask.setup_task(
        TranslationConfig(data=str(data), source_lang="de", target_lang="en", **interpolated)
    )


def load(task, path: Path | str, overrides: str = "{}") -> LiveTeacher:
    return LiveTeacher([str(path)], task.src_dict, task.tgt_dict, overrides=overrides, languages=("de", "en"))


def model(**options):
    def change(state):
        for name, value in options.items():
            setattr(state["cfg"]["model"], name, value)

    return change


def languages(state):
    state["cfg"]["task"] |= {"source_lang": "en", "target_lang": "de"}


def of_another_kind(state):
    """Save the task's options as a Namespace, as tasks without a dataclass (the multilingual ones) do."""
    state["cfg"]["task"] = Namespace(_name="translation_multi_simple_epoch", data=state["cfg"]["task"]["data"])
    state["cfg"]["task"].data = "nowhere"


def without_task(state):
    del state["cfg"]["task"]


def infinite(state):
    """Make a weight of the output layer, which is tied to the embeddings, infinite."""
    state["model"]["decoder.output_projection.weight"][3, 4] = torch.inf


def half(state):
    state["model"] = dict(list(state["model"].items())[::2])


def wide(state):
    state["cfg"]["model"].encoder_layers = 10**9


def long(state):
    state["cfg"]["model"].max_target_positions = 10**12


REFUSED = {
    "the other direction": (languages, "translates from en to de, the student from de to en"),
    "an argparse task": (of_another_kind, "the folder of the dictionaries of the teacher"),
    "no task": (without_task, "it holds no options of its task"),
    "a language model": (model(arch="transformer_lm"), "is no translation model but a TransformerLanguageModel"),
    "an encoder": (model(arch="roberta"), "is no translation model but a RobertaModel"),
    "not autoregressive": (
        model(arch="nonautoregressive_transformer"),
        "does not translate from left to right (it asks for tgt_tokens)",
    ),
    "an unknown architecture": (model(arch="new"), "has the architecture 'new', which this fairseq does not know"),
    "an architecture that is no string": (model(arch=3), "has the architecture '3'"),
    "no heads": (model(encoder_attention_heads=0), "does not fit the dictionaries of the data, or its own options"),
    "too many heads": (
        model(decoder_attention_heads=5),
        "does not fit the dictionaries of the data, or its own options",
    ),
    "another size": (model(encoder_ffn_embed_dim=8), "size mismatch"),
    "a size in words": (model(encoder_ffn_embed_dim="wide"), "does not fit"),
    "layers without end": (wide, "--encoder-layers 1000000000 is more than"),
    "positions without end": (long, "--max-target-positions 1000000000000 is more than"),
    "half of the weights": (half, "does not fit the dictionaries of the data, or its own options: RuntimeError"),
    "infinite": (infinite, "holds nan or infinity in "),
    "code, a dict": (model(encoder_xformers_att_config=CODE), "is no Python literal, and fairseq would run it as code"),
    "code, a list": (
        model(adaptive_softmax_cutoff=CODE, share_all_embeddings=False, share_decoder_input_output_embed=False),
        "is no Python literal",
    ),
    "code, layers": (model(arch="fconv", encoder_layers=CODE, encoder_embed_path=None), "is no Python literal"),
    "code, a truth value": (
        model(arch="lstm", decoder_attention=CODE, decoder_out_embed_dim=32),
        "is no Python literal",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, task, teacher: cl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    change, expected = REFUSED[name]
    state = teacher.state()
    state["cfg"]["model"]._name = None  # architecture and model are named by arch alone
    change(state)
    torch.save(state, tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(task, tmp_path / "a.pt")
    assert expected in str(caught.value)
    assert str(tmp_path / "a.pt") in str(caught.value)
    assert not Path("code_has_run").exists()


OVERRIDES = {
    "{[]: 1}": "is not a dict",
    "[1]": "is not a dict",
    "{1: 2}": "is not a dict",
    "print(1)": "is not a dict",
    "(" * 9000: "is not a dict",
    "{'data': 3}": "task data is not text; .* out of --teacher-model-overrides",
    "{'data': ['x']}": "task data is not text",
    "{'_name': 5}": "has the architecture '5', which this fairseq does not know",
    "{'encoder_layers': 'many'}": "does not fit",
    "{'encoder_layers': None}": "does not fit",
    "{'task': {'data': 5}}": "task data is not text",
    "{'task': {'nothing': {'data': 5}}}": "with the overrides that were given",
}


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_overrides(overrides: str, task, teacher: cl.Run):
    with pytest.raises(UserError, match=OVERRIDES[overrides]):
        load(task, teacher.path(), overrides)


def test_languages_by_other_names(task, teacher: cl.Run, tmp_path: Path):
    """A teacher with other names of the same languages is refused, unless the overrides give it those of the data."""
    state = teacher.state()
    state["cfg"]["task"] |= {"source_lang": "de_DE", "target_lang": "en_XX"}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match="from de_DE to en_XX"):
        load(task, tmp_path / "a.pt")
    assert len(load(task, tmp_path / "a.pt", "{'source_lang': 'de', 'target_lang': 'en'}").models) == 1


def test_languages_that_were_inferred(task, teacher: cl.Run, tmp_path: Path):
    state = teacher.state()
    state["cfg"]["task"] |= {"source_lang": None, "target_lang": None}
    torch.save(state, tmp_path / "a.pt")
    assert len(load(task, tmp_path / "a.pt").models) == 1
    state["cfg"]["task"]["data"] = str(tmp_path)  # an existing folder without such data
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"{tmp_path}, has no data of a language pair .* --teacher-model-overrides"):
        load(task, tmp_path / "a.pt")


def test_fewer_positions_than_the_data(task, teacher: cl.Run):
    """Sentences (of up to 10 tokens with their end) above the teacher's limits are refused, unless they are above the
    student's own limits too, where fairseq leaves them out."""
    short = load(task, teacher.path(), "{'max_source_positions': 8, 'max_target_positions': 9}")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    with pytest.raises(UserError, match="valid has a source sentence of 10 tokens"):
        short.check_data("valid", dataset, (1024, 1024))
    with pytest.raises(UserError, match="valid has a target sentence of 10 tokens"):
        load(task, teacher.path(), "{'max_target_positions': 9}").check_data("valid", dataset, (1024, 1024))
    short.check_data("valid", dataset, (8, 9))
    short.check_data("valid", dataset, (8, 1024))  # targets of 10 tokens have sources that are left out
    load(task, teacher.path()).check_data("valid", dataset, (1024, 1024))
