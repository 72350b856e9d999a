"""Tests of the checkpoint loader: what fairseq writes is read; anything else is one error message and runs no code."""

import io
import os
import pickle
import re
import struct
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import checkpoints
from hgkd_fairseq.plugin.literals import literal
from hgkd_fairseq.sentence_weights import table as weight_table

CUT = "cannot be read: it is cut short or damaged"


def state(**changes) -> dict:
    """Return a checkpoint as fairseq-train saves it, with the parts in `changes` replaced."""
    options = {"model": Namespace(arch="transformer", encoder_layers=1), "criterion": {"_name": "cross_entropy"}}
    options |= {"task": {"_name": "translation", "data": "bin"}, "common": {"seed": 1}}
    history = [{"criterion_name": "X", "optimizer_name": "Y", "lr_scheduler_state": {}, "num_updates": 7}]
    model = OrderedDict(w=torch.arange(6.0).view(2, 3), n=torch.tensor([3]))
    extra = {"train_iterator": {"epoch": 2}, "previous_training_time": 60.0}
    return {
        "args": None, "cfg": options, "model": model, "optimizer_history": history, "extra_state": extra, **changes
    }  # fmt: skip


def saved(path: Path, **changes) -> Path:
    torch.save(state(**changes), path)
    return path


def old_format(path: Path, **changes) -> Path:
    torch.save(state(**changes), path, _use_new_zipfile_serialization=False)
    return path


class Code:
    """Unpickling an instance creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


class Calls:
    """Unpickling an instance calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class Named:
    """Unpickling an instance imports this class; `named` puts control characters into the name."""

    def __reduce__(self):
        return Named, ()


def named(path: Path) -> Path:
    saved(path, extra=Named())
    name = f"{Named.__module__}\nNamed\n".encode()
    return rewritten(path, lambda content: content.replace(name, name.replace(b"Named", b"\x1b[2J\x07x")))


def rewritten(path: Path, change) -> Path:
    """Rewrite a zip file with data.pkl changed and all checksums right."""
    with zipfile.ZipFile(path) as file:
        records = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    return path


def flipped(path: Path) -> Path:
    """Save a checkpoint with one bit of one weight flipped."""
    content = bytearray(saved(path).read_bytes())
    place = content.index(struct.pack("<6f", *range(6)))
    content[place + 5] ^= 0x40
    path.write_bytes(content)
    return path


def cut(path: Path, share: float, write=saved) -> Path:
    content = write(path).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def archive(path: Path, compression: int) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        file.writestr("archive/zeros", bytes(10**6))
    return path


def torchscript(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)
    return path


def tar(path: Path) -> Path:
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("pickle")
        content = pickle.dumps({})
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    return path


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def laughs(kind: type = list):
    """Return 64 nested lists (or tuples) that expand to 2^64."""
    value = kind()
    for _ in range(64):
        value = kind([value, value])
    return value


def loop() -> list:
    value: list = []
    value.append(value)
    return value


def larger_than_its_file(path: Path) -> Path:
    """Save a tensor of 2 x 3 numbers whose shape says 2,000,000 x 3."""
    saved(path)
    return rewritten(path, lambda content: content.replace(b"K\x02K\x03\x86", b"J\x80\x84\x1e\x00K\x03\x86"))


def options(**values) -> dict:
    return {"cfg": {**state()["cfg"], "model": Namespace(arch="transformer", **values)}}


REFUSED = {
    "missing": (lambda p: p, "a.pt does not exist; name a fairseq checkpoint"),
    "below a file": (lambda p: saved(p) / "b.pt", "does not exist"),
    "a folder": (folder, "is a folder, not a checkpoint; name the .pt file in it"),
    "a pipe": (pipe, "is no regular file"),
    "empty": (lambda p: write(p, b""), "is empty"),
    "zeros": (lambda p: write(p, bytes(1000)), CUT),
    "text": (lambda p: write(p, b"hello\n" * 200), CUT),
    "half a zip": (lambda p: cut(p, 0.5), CUT),
    "a zip without its end": (lambda p: cut(p, 0.98), CUT),
    "half, old format": (lambda p: cut(p, 0.9, old_format), CUT),
    "the first bytes": (lambda p: cut(p, 0.01), CUT),
    "a flipped bit": (flipped, "damaged (wrong checksum of a/data/0)"),
    "TorchScript": (torchscript, "is a TorchScript program; name a checkpoint of fairseq-train"),
    "tar": (tar, "is a tar file"),
    "a zip bomb": (lambda p: archive(p, zipfile.ZIP_DEFLATED), "is a compressed archive"),
    "another zip": (lambda p: archive(p, zipfile.ZIP_STORED), CUT),
    "control characters": (named, r"wants to import test_checkpoints.\x1b[2J\x07x; use a checkpoint"),
    "a tensor": (lambda p: torch.save(torch.zeros(3), p) or p, "no fairseq checkpoint: it holds Tensor"),
    "no model": (lambda p: saved(p, model=None), "it holds no model"),
    "an empty model": (lambda p: saved(p, model={}), "its model is empty"),
    "no options": (lambda p: saved(p, cfg=None), "it holds no options"),
    "options of another kind": (lambda p: saved(p, cfg=3), "its cfg is int"),
    "no history": (lambda p: saved(p, optimizer_history=[]), "no history of optimizers"),
    "updates in words": (lambda p: saved(p, optimizer_history=[{"num_updates": "a"}]), "its number of updates is none"),
    "a weight that is a string": (lambda p: saved(p, model={"w": "x"}), "w in its model is no tensor"),
    "a weight without a name": (lambda p: saved(p, model={3: torch.ones(1)}), "the name of a weight is int"),
    "a sparse weight": (lambda p: saved(p, model={"w": torch.eye(3).to_sparse()}), "import torch._utils._rebuild_sp"),
    "a complex weight": (lambda p: saved(p, model={"w": torch.ones(1) * 1j}), "import torch.ComplexFloatStorage"),
    "a weight on no device": (lambda p: saved(p, model={"w": torch.ones(2, device="meta")}), "rebuild_meta_tensor"),
    "a weight that is not there": (lambda p: saved(p, model={"w": torch.ones(1).expand(9)}), "w is not all there"),
    "a weight larger than the file": (larger_than_its_file, CUT),
    "nan": (lambda p: saved(p, model={"w": torch.tensor([1.0, torch.nan])}), "nan or infinity in w: its training"),
    "inf": (lambda p: saved(p, model={"w": torch.tensor([torch.inf]).half()}), "holds nan or infinity in w"),
    "an interpolation": (lambda p: saved(p, **options(a="x${oc.env:HOME}")), "option cfg.model.a is to be replaced"),
    "an interpolation in a name": (lambda p: saved(p, **options(a={"${oc.env:HOME}": 1})), "no plain string"),
    "an interpolation in a list": (lambda p: saved(p, **options(a=[{"b": "${a}"}])), "cfg.model.a[0].b is to be"),
    "an interpolation of old": (lambda p: saved(p, cfg=None, args=Namespace(a="${a}")), "args.a is to be replaced"),
    "a tensor for an option": (lambda p: saved(p, **options(a=torch.ones(1))), "cfg.model.a is Tensor, no plain value"),
    "a number without end": (lambda p: saved(p, **options(a=10**600)), "cfg.model.a is int, no plain value"),
    "options without end": (lambda p: saved(p, **options(a=laughs())), "nested too deeply"),
    "options without end, constant": (lambda p: saved(p, **options(a=laughs(tuple))), "nested too deeply"),
    "an open file": (lambda p: saved(p, **options(encoder_embed_path=1)), "encoder_embed_path is no name of a file"),
    "a pipe's name": (lambda p: saved(p, **options(decoder_embed_path="/dev/zero")), "is no name of a file"),
    "options in themselves": (lambda p: saved(p, **options(a=loop())), "nested too deeply"),
    "an array of objects": (lambda p: saved(p, extra=np.array([{}])), "it holds an array of what is no number"),
    "an array of complex numbers": (lambda p: saved(p, extra=np.ones(2, complex)), "an array of what is no number"),
    "an array of strings": (lambda p: saved(p, extra=np.array(["a"])), "an array of what is no number"),
    "an array of dates": (lambda p: saved(p, extra=np.array(["2026"], "M8[s]")), "an array of what is no number"),
    "an array of records": (lambda p: saved(p, extra=np.zeros(2, [("a", "i4")])), "an array of what is no number"),
    "all memory": (lambda p: saved(p, extra=Calls(bytearray, 10**12)), "wants to import __builtin__.bytearray"),
    "all memory, old format": (lambda p: old_format(p, extra=Calls(bytearray, 10**12)), "import __builtin__.bytearray"),
    "unwritten memory": (lambda p: saved(p, model={"w": Calls(torch.Tensor, 3)}), "wants to import torch.Tensor"),
    "a dtype of parts": (lambda p: saved(p, extra=np.dtype(("i8", 2))), "an array of what is no number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path):
    make, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        checkpoints.read(make(tmp_path / "a.pt"))
    message = str(caught.value)
    assert expected in message
    assert message.isprintable()
    assert str(tmp_path) in message
    assert "weights_only" not in message


@pytest.mark.parametrize("part", ["sub-dtype", "fields", "size", "flags"])
def test_a_dtype_that_would_follow_pointers(part: str, tmp_path: Path):
    """numpy's dtype("i8") with a state by which the bytes of the array would be pointers is refused."""
    start, number = b"(K\x03X\x01\x00\x00\x00<", b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    objects = b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R"
    states = {
        "sub-dtype": start + objects + b"K\x01\x86NN" + number,
        "fields": start + b"NX\x01\x00\x00\x00a\x85}X\x01\x00\x00\x00a" + objects + b"K\x00\x86s" + number,
        "size": start + b"NNNK\x08K\x08K\x00t",
        "flags": start + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft",
    }
    saved(tmp_path / "a.pt", extra=np.full(3, 0x41414141, "i8"))
    plain = re.compile(rb"\(K\x03(q.|r....)?X\x01\x00\x00\x00<(q.|r....)?NNN" + re.escape(number), re.DOTALL)
    count = 0

    def change(content: bytes) -> bytes:
        nonlocal count
        content, count = plain.subn(lambda _: states[part], content)
        return content

    rewritten(tmp_path / "a.pt", change)
    assert count == 1
    with pytest.raises(UserError, match="an array of what is no number"):
        checkpoints.read(tmp_path / "a.pt")


@pytest.mark.parametrize("write", [saved, old_format])
def test_code_is_not_run(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Code is refused also with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, the usual workaround for fairseq under torch 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "code_has_run"
    write(tmp_path / "a.pt", extra=Code(file))
    with pytest.raises(UserError, match=rf"wants to import {os.system.__module__}\.system"):
        checkpoints.read(tmp_path / "a.pt")
    assert not file.exists()
    torch.load(tmp_path / "a.pt")  # without the loader's protection it runs
    assert file.exists()


ARRAYS = ["b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", ">i4", ">f8"]


@pytest.mark.parametrize("write", [saved, old_format])
def test_read(write, tmp_path: Path):
    """Weights and options are read unchanged, and arrays of numbers become tensors."""
    arrays = {code: (np.arange(6).reshape(2, 3) % 2).astype(code) for code in ARRAYS}
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    found = checkpoints.read(write(tmp_path / "a.pt", extra_state={"arrays": [arrays], "previous_training_time": 1.0}))
    assert found.updates == 7
    assert list(found.model) == ["w", "n"]
    assert torch.equal(found.model["w"], torch.arange(6.0).view(2, 3))
    assert found.options("model") == {"arch": "transformer", "encoder_layers": 1}
    assert found.options("task") == {"_name": "translation", "data": "bin"}
    with pytest.raises(UserError, match="it holds no options of its optimizer"):
        found.options("optimizer")
    ((read,),) = [found.state["extra_state"]["arrays"]]
    for code, array in arrays.items():
        assert type(read[code]) is torch.Tensor
        assert np.array_equal(read[code].numpy(), array), code
    assert read["f2"].dtype == torch.float16


@pytest.mark.parametrize("value", [None, "transformer", [1], 3])
def test_a_section_that_is_none(value, tmp_path: Path):
    file = saved(tmp_path / "a.pt", cfg={**state()["cfg"], "model": value})
    with pytest.raises(UserError, match=r"is no fairseq (model|checkpoint)"):
        checkpoints.read(file).options("model")


def test_meters_of_old(tmp_path: Path):
    """Meters, which fairseq before 0.9 pickled as objects of fairseq.meters, are read as None."""
    for module in (b"fairseq.meters", b"fairseq.logging.meters"):
        saved(tmp_path / "a.pt", extra_state={"train_meters": OrderedDict(a=Named()), "val_loss": 4.0})
        names = f"{Named.__module__}\nNamed\n".encode(), module + b"\nAverageMeter\n"
        rewritten(tmp_path / "a.pt", lambda content, names=names: content.replace(*names))
        extra = checkpoints.read(tmp_path / "a.pt").state["extra_state"]
        assert extra["train_meters"] == {"a": None}
        assert extra["val_loss"] == 4.0


def test_memory_without_end(tmp_path: Path):
    """Nested containers outside the options, which expand to 2^64, are read without being expanded."""
    file = saved(tmp_path / "a.pt", extra_state={"a": laughs(tuple), "b": laughs()})
    extra = checkpoints.read(file).state["extra_state"]
    assert extra["a"][0] is extra["a"][1]
    assert extra["b"][0] is extra["b"][1]


ROWS = {"held_out": torch.tensor([False, True]), "data": torch.ones(2), "teacher": torch.ones(2)}
ROWS["epoch"] = torch.tensor(2)
TABLES = {
    "none": None,
    "a string": "held_out",
    "no epoch": {**ROWS, "epoch": None},
    "an epoch in words": {**ROWS, "epoch": "1"},
    "an epoch of nan": {**ROWS, "epoch": torch.tensor(torch.nan)},
    "no teacher": {**ROWS, "teacher": None},
    "other lengths": {**ROWS, "teacher": torch.ones(3)},
    "whole numbers": {**ROWS, "held_out": torch.tensor([0, 1])},
    "a table of tables": {**ROWS, "data": torch.ones(2, 2)},
    "learned in words": {**ROWS, "learned": "all"},
    "learned of others": {**ROWS, "learned": torch.tensor([True])},
    "a weight below 0": {**ROWS, "data": torch.tensor([1.0, -1.0])},
    "whole weights": {**ROWS, "data": torch.tensor([1, 2])},
    "a weight without end": {**ROWS, "data": torch.tensor([1.0, torch.inf])},
    "two epochs": {**ROWS, "epoch": torch.tensor([2, 3])},
    "no held-out sentences": {key: value for key, value in ROWS.items() if key != "held_out"},
}


@pytest.mark.parametrize("name", TABLES)
def test_weights_of_sentences_that_are_none(name: str, tmp_path: Path):
    file = saved(tmp_path / "a.pt", extra_state={"TranslationWithTeacherTask": {"gate": TABLES[name]}})
    with pytest.raises(UserError, match=r"has no weights of sentences|a table of weights that is damaged"):
        weight_table.read(str(file))
    saved(file, extra_state={"TranslationWithTeacherTask": {"gate": ROWS}})
    assert weight_table.read(str(file)).epoch == 2


LEARNED = {
    "held_out": torch.tensor([True, False, False, False, False]),
    "learned": torch.tensor([False, True, True, True, False]),
    "data": torch.tensor([0.1, 0.2, 0.3, 0.4, 0.1]),
    "teacher": torch.tensor([0.9, 0.8, 0.5, 0.4, 0.9]),
    "epoch": torch.tensor(2),
}


def of_sentences(path: Path, **changes) -> str:
    return str(saved(path, extra_state={"TranslationWithTeacherTask": {"gate": {**LEARNED, **changes}}}))


def test_report_on_weights_of_sentences(tmp_path: Path, capsys: pytest.CaptureFixture):
    listed, table, figure = tmp_path / "noisy.txt", tmp_path / "weights.tsv", tmp_path / "weights.svg"
    listed.write_text("1\n3\n77\n")
    weight_table.report(of_sentences(tmp_path / "a.pt"), str(table), str(listed), str(figure))
    assert capsys.readouterr().out.splitlines() == [
        "noisy: 2 sentences, median weight data 0.2000, teacher 0.4000, median share of the teacher 0.5000",
        "others: 1 sentences, median weight data 0.3000, teacher 0.5000, median share of the teacher 0.6250",
    ]
    assert table.read_text() == "sentence\tdata\tteacher\n1\t0.2\t0.8\n2\t0.3\t0.5\n3\t0.4\t0.4\n"
    drawn = figure.read_text()
    assert [text in drawn for text in ("weight of the data", "weight of the teacher", "noisy", "others")] == [True] * 4

    # A table before its first refresh, and learned weights that are all 0.
    weight_table.report(of_sentences(tmp_path / "a.pt", epoch=torch.tensor(0), learned=torch.zeros(5) > 0), *[None] * 3)
    assert capsys.readouterr().out.splitlines() == [
        "all: no sentence",
        "not refreshed yet: all weights are what they began with",
    ]
    weight_table.report(of_sentences(tmp_path / "a.pt", data=torch.zeros(5), teacher=torch.zeros(5)), *[None] * 3)
    assert capsys.readouterr().out == (
        "all: 3 sentences, median weight data 0.0000, teacher 0.0000, median share of the teacher nan\n"
    )
    # In older checkpoints, without "learned", rows that differ from their first values were learned.
    old = {key: value for key, value in LEARNED.items() if key != "learned"}
    file = saved(tmp_path / "a.pt", extra_state={"TranslationWithTeacherTask": {"gate": old}})
    assert weight_table.read(str(file)).sentence.tolist() == [1, 2, 3]


def test_sentences_in_a_file_named_as_the_others_are(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "others.txt").write_text("1\n3\n")
    weight_table.report(of_sentences(tmp_path / "a.pt"), None, str(tmp_path / "others.txt"), None)
    found = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == ["others: 2 sentences", "the others: 1 sentences"]


@pytest.mark.parametrize("words", ["1 two 3", "1 -2", "1 2.0", "1 " + "9" * 19])
def test_numbers_of_sentences_that_are_none(words: str, tmp_path: Path):
    (tmp_path / "listed.txt").write_text(words)
    expected = rf"--compare .*listed.txt: {words.split()[1][:40]} \(number 2\) is no number of a sentence; give numbers"
    with pytest.raises(UserError, match=expected):
        weight_table.report(of_sentences(tmp_path / "a.pt"), None, str(tmp_path / "listed.txt"), None)


def test_of_a_diverged_run_without_its_weights(tmp_path: Path):
    """The options of a checkpoint with nan weights can be read without its model, for a report."""
    file = saved(tmp_path / "a.pt", model={"w": torch.tensor([torch.nan])})
    assert checkpoints.read(file, model=False).updates == 7


def test_overrides(tmp_path: Path):
    file = saved(tmp_path / "a.pt")
    found = checkpoints.read(file, {"data": "there", "encoder_layers": 2})
    assert found.options("task")["data"] == "there"
    assert found.options("model")["encoder_layers"] == 2
    with pytest.raises(UserError, match="with the overrides that were given"):
        checkpoints.read(file, {"task": {"nothing": {"a": 1}}, "cfg": 3, "common": {"seed": {"a": object()}}})


def test_without_arrays():
    """Arrays become tensors and numpy's scalars Python's; other values stay, and the object itself is not changed."""
    inside = OrderedDict(a=np.arange(3), b=[np.float64(2.5), (np.int32(1), "x")], c=torch.ones(1))
    found = checkpoints.without_arrays({"x": inside, "n": None})["x"]
    assert type(found) is OrderedDict
    assert torch.equal(found["a"], torch.arange(3))
    assert found["b"] == [2.5, (1, "x")]
    assert [type(value) for value in (found["b"][0], found["b"][1][0])] == [float, int]
    assert found["c"] is inside["c"]
    assert type(inside["a"]) is np.ndarray


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        ([], "a:b", ["a", "b"]),
        ([], "a", ["a"]),
        (["a:b"], "a:b", ["a:b"]),
        (["a:b/c", "d"], "a:b/c:d", ["a:b/c", "d"]),
        (["a:b/c", "d:e"], "d:e:a:b/c:x", ["d:e", "a:b/c", "x"]),
        ([], "s3://a:b|s3://c", ["s3://a:b", "s3://c"]),
    ],
)
def test_split_paths(names, text, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()
    assert checkpoints.split_paths(text) == expected


LITERALS = {
    "0.5": 0.5,
    "-1e-3": -1e-3,
    "True": True,
    "None": None,
    "(0.9, 0.98)": (0.9, 0.98),
    "0.9, 0.98": (0.9, 0.98),
    " [3, 7]": [3, 7],
    "{'a': [1]}": {"a": [1]},
    "[(512, 3)] * 2": [(512, 3), (512, 3)],
    "[(512, 10)] + [(512, 3)] * 2": [(512, 10), (512, 3), (512, 3)],
}


@pytest.mark.parametrize("text", LITERALS)
def test_literals(text: str):
    found = literal(text)
    assert found == LITERALS[text]
    assert type(found) is type(LITERALS[text])


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "print(1)", "__import__('os').getcwd()", "[x for x in (1,)]", "(lambda: 1)()", "1 if 1 else 2",
        "f'{1}'", "9**9", "1+1", "'a'*9", "[0]*1000000", "[[0]*9999]+[0]*9999", "(" * 5000, "[" * 5000, "0" * 20000,
        "[]*'a'", "{[]: 1}", "a.b", "a[0]", "\0", "1;2", "[1].append(2)",
    ],
)  # fmt: skip
def test_no_literals(text: str):
    with pytest.raises(UserError, match="is no Python literal, and fairseq would run it as code"):
        literal(text)


@pytest.mark.parametrize("value", [True, 1, None, b"1", compile("1", "", "eval")])
def test_no_strings(value):
    """A value that is no string raises TypeError, as in eval, because fairseq's eval_bool relies on it."""
    with pytest.raises(TypeError):
        literal(value)
