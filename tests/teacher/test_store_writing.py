"""Tests of `hgkd store`: after killed processes and on a full disk the finished store is the same, byte for byte."""

import shutil
from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
import torch
from making_stores import command, of_kind, write
from processes import content, fill_and_kill, full_disk, start

from hgkd_fairseq import cli
from hgkd_fairseq.teacher.store import Store


def error(capsys) -> str:
    """Return the error message of a command that failed, which must be one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: ")]
    assert len(lines) == 1
    return lines[0]


OPTIONS = ("--dtype", "fp32", "--shard-size", 32)


@pytest.fixture(scope="module")
def unbroken(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "store"
    assert write(data, teacher, folder, *OPTIONS) == 0
    return folder


def test_killed_five_times_by_two_processes(data: Path, teacher: cl.Run, unbroken: Path, tmp_path: Path):
    words = command(data, teacher.path(), tmp_path / "store", *OPTIONS)
    fill_and_kill(tmp_path / "store", lambda: start(*words))
    assert content(tmp_path / "store") == content(unbroken)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_what_was_interrupted_goes_on(kind: str, data: Path, teacher: cl.Run, stores: dict[str, Path], tmp_path: Path):
    """The same command completes a store with a missing shard, a damaged one and a partly written output layer."""
    folder = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    shutil.rmtree(folder / "shard-00001")
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00002" / "gold.npy").write_bytes(b"")
    for name in ("member-0.weight.npy", "member-0.weight.npy.partial-0"):
        (folder / name).write_bytes(b"")
    assert write(data, teacher, folder, *of_kind(kind)) == 0
    if kind != "hidden":
        (folder / "member-0.weight.npy").unlink()
    assert content(folder) == content(stores[kind])


@pytest.mark.parametrize("full", ["manifest.json", "member-0.weight.npy", "shard"])
def test_a_full_disk(full: str, data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    """A full disk is one error line; only what was finished stays, and the next call completes the store."""
    options = ("--dtype", "fp32", "--subset", "valid", "--shard-size", 10)
    folder, unbroken = tmp_path / "store", tmp_path / "unbroken"
    assert write(data, teacher, unbroken, *options) == 0
    sizes = [file.stat().st_size for file in sorted(unbroken.rglob("hidden-0.npy"))]
    largest = sizes.index(max(sizes))
    finished = [f"shard-{number:05d}{end}" for number in range(largest) for end in ("", ".json")]
    limit, left, file = {
        "manifest.json": (500, [], "manifest.json cannot be written"),
        "member-0.weight.npy": (3000, ["manifest.json"], f"{folder}/member-0.weight.npy"),
        "shard": (max(sizes) - 1, ["manifest.json", "member-0.weight.npy", *finished], f"{folder}/shard-{largest:05d}"),
    }[full]
    assert largest > 0
    with full_disk(limit):
        assert write(data, teacher, folder, *options) == 1
    assert f"{file}: File too large" in error(capsys)
    assert sorted(one.name for one in folder.iterdir()) == sorted(left)
    assert write(data, teacher, folder, *options) == 0
    assert content(folder) == content(unbroken)


def test_another_teachers_store_is_not_continued(
    data: Path, teacher: cl.Run, student: cl.Run, stores: dict[str, Path], capsys
):
    for run, options, message in (
        (student, ("--kind", "topk"), "another teacher"),
        (teacher, ("--kind", "topk", "--k", 9), "another k (8, now 9)"),
        (teacher, ("--kind", "topk", "--teacher-temperature", 2), "another temperature (1.5, now 2.0)"),
        (teacher, ("--kind", "topk", "--shard-size", 100), "another shard_size (200, now 100)"),
    ):
        assert write(data, run, stores["topk"], *options) == 1
        assert message in error(capsys)


def test_a_teacher_whose_languages_have_other_names(data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    """A teacher whose languages have other names than the data's is refused, and accepted if --teacher-model-overrides
    gives it those names."""
    state = teacher.state()
    state["cfg"]["task"] |= {"source_lang": "de_DE", "target_lang": "en_XX"}
    torch.save(state, tmp_path / "a.pt")
    words = command(data, tmp_path / "a.pt", tmp_path / "store", "--subset", "valid", "--kind", "gold")
    assert cli.main(words) == 1
    assert "is no data for" in error(capsys)
    assert cli.main([*words, "--teacher-model-overrides", "{'source_lang': 'de', 'target_lang': 'en'}"]) == 0
    assert Store(str(tmp_path / "store")).manifest["languages"] == ["de", "en"]


def test_no_room_is_told_before_the_work(data: Path, teacher: cl.Run, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    assert write(data, teacher, tmp_path / "store") == 1
    assert "do not fit, 0.00 MB are free; name another disk" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [("", "--output is empty; name a folder"), ("file", "file is no folder; name another one"),
     ("link", "link is no folder; name another one")],
)  # fmt: skip
def test_an_output_that_is_no_folder(output: str, message: str, data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert write(data, teacher, tmp_path / output if output else "", "--subset", "valid") == 1
    assert error(capsys).endswith(message)


@pytest.mark.parametrize(("option", "kind"), [("--draws", "sampled"), ("--k", "topk")])
def test_an_option_of_another_kind(option: str, kind: str, data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    assert write(data, teacher, tmp_path / "store", option, 4) == 1
    assert error(capsys).endswith(f"{option} is for --kind {kind}, and this is hidden; drop it")
    assert not (tmp_path / "store").exists()
