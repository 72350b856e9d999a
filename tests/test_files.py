"""Tests of reading and writing files: results are written atomically, through links and pipes, and JSON and text that
are not what they should be are refused."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from processes import as_a_user, in_a_child

from hgkd_fairseq import drawing, files
from hgkd_fairseq.errors import UserError, in_one_line
from hgkd_fairseq.evaluation.token_table import TokenTable


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_new_file_has_the_permissions_of_open(folder):
    old = os.umask(0o027)
    try:
        files.write_text("ours", "x\n")
        Path("theirs").write_text("x\n")
        with files.writing_folder("folder") as made:
            (made / "x").touch()
        Path("plain").mkdir()
        for one, other in (("ours", "theirs"), ("folder", "plain")):
            assert os.stat(one).st_mode == os.stat(other).st_mode
    finally:
        os.umask(old)
    os.chmod("ours", 0o604)
    files.write_text("ours", "y\n")
    assert stat.S_IMODE(os.stat("ours").st_mode) == 0o604
    assert Path("ours").read_bytes() == b"y\n"
    assert sorted(os.listdir()) == ["folder", "ours", "plain", "theirs"]


def test_a_link_stays_a_link(folder):
    Path("sub").mkdir()
    Path("sub/real").write_text("old")
    os.symlink("sub/real", "link")
    os.symlink("sub/new", "dangling")
    os.symlink("link", "second")
    for name, place in (("link", "sub/real"), ("dangling", "sub/new"), ("second", "sub/real")):
        files.write_text(name, f"through {name}")
        assert os.path.islink(name)
        assert Path(place).read_text() == f"through {name}"
    os.symlink("loop", "loop")
    with pytest.raises(UserError, match="loop cannot be written: Too many levels of symbolic links"):
        files.write_text("loop", "x")
    assert sorted(os.listdir("sub")) == ["new", "real"]


def test_pipes_and_devices_are_written_to(folder):
    os.mkfifo("pipe")
    reader = subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE)
    files.write_text("pipe", "through\n")
    assert reader.communicate()[0] == b"through\n"
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    files.write_text("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device"):
        files.write_text("/dev/full", "x")


def disk_full() -> None:
    """Limit the files of this process to 4 KiB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("into", ["pipe", "file"])
def test_standard_output(name, into, folder):
    """Output to standard output by its name keeps the order of what is printed, also if it is a file, which opening it
    again would overwrite."""

    def redirect():
        os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout = open(1, "w")  # noqa: SIM115

    def write():
        print("before")
        files.write_text(name, "middle\n")
        print("after", flush=True)

    if into == "pipe":
        os.mkfifo("out")
        reader = subprocess.Popen(["cat", "out"], stdout=subprocess.PIPE)
    assert in_a_child(write, redirect) == 0
    assert (reader.communicate()[0] if into == "pipe" else Path("out").read_bytes()) == b"before\nmiddle\nafter\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty; give one"),
        ("folder", "it is a folder"),
        ("no/x", "there is no folder no; make it first"),
        ("file/x", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_names_that_cannot_be_written(name, reason, folder):
    Path("folder").mkdir()
    Path("file").touch()
    for write in (files.check_output, lambda name: files.write_text(name, "x")):
        with pytest.raises(UserError, match=reason):
            write(name)
    assert sorted(os.listdir()) == ["file", "folder"]


def test_permissions(folder):
    Path("file").write_text("mine")
    os.chmod("file", 0o444)
    Path("secret").write_text("mine")
    os.chmod("secret", 0)
    os.chmod(".", 0o777)
    Path("locked").mkdir(mode=0o555)

    def refused():
        for name, path in (("file", "file"), ("locked/x", "locked")):
            for write in (files.check_output, lambda name: files.write_text(name, "x")):
                with pytest.raises(UserError, match=f"^{name} cannot be written: {path} may not be written to$"):
                    write(name)
        with pytest.raises(UserError, match=r"^secret cannot be read: Permission denied; name a text file"):
            files.read_text("secret")

    assert in_a_child(refused, as_a_user) == 0
    assert Path("file").read_text() == "mine"


def write_tensor() -> None:
    with files.writing("old", "wb") as stream:
        torch.save(torch.ones(5000), stream)


def write_tokens(name: str) -> None:
    with TokenTable(name) as table:
        table.write({"token": [str(number) for number in range(5000)]})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("old", lambda: files.write_text("old", "x" * 5000)),
        ("old", lambda: files.write_json("old", ["x"] * 5000)),
        ("old", write_tensor),
        ("old.tsv", lambda: write_tokens("old.tsv")),
    ],
)
def test_a_full_disk_keeps_the_old_file(name, write, folder):
    Path(name).write_text("old")

    def refused():
        with pytest.raises(UserError, match=f"^{name} cannot be written: File too large$"):
            write()

    assert in_a_child(refused, disk_full) == 0
    assert Path(name).read_text() == "old"
    assert os.listdir() == [name]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figure_is_the_same_file(name, folder):
    figure = drawing.figure_class()()
    figure.subplots().plot([1, 2], marker="o")
    found = []
    for _ in range(2):
        files.write_figure(figure, name)
        found.append(Path(name).read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(2, "gone", "another")])
def test_an_error_in_the_block_keeps_the_old_file(error, folder):
    def write():
        with files.writing("old") as stream:
            stream.write("new")
            raise error

    def fill():
        with files.writing_folder("folder") as made:
            (made / "x").touch()
            raise error

    Path("old").write_text("old")
    with pytest.raises(type(error)):
        write()
    with pytest.raises((type(error), UserError)):
        fill()
    assert Path("old").read_text() == "old"
    assert os.listdir() == ["old"]


FILLS = """
import sys
from hgkd_fairseq import files
with files.writing_folder("folder") as made:
    (made / "x").touch()
    print(flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_takes_for_an_unfinished_one(folder, monkeypatch):
    """It is removed between its creation and its lock; another one is made."""
    create, made = tempfile.mkdtemp, []

    def create_and_lose(*args, **words) -> str:
        made.append(create(*args, **words))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    open_folder, opened = files._open_folder, []

    def open_and_lose(one: Path) -> int:
        opened.append(open_folder(one))
        if len(opened) == 1:
            os.rmdir(one)
        return opened[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", create_and_lose)
    monkeypatch.setattr(files, "_open_folder", open_and_lose)
    with files.writing_folder("folder") as last:
        assert last.samefile(made[2])
        (last / "x").touch()
    assert os.listdir() == ["folder"]
    assert os.listdir("folder") == ["x"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_the_size_of_a_folder_from_which_files_vanish(folder, monkeypatch):
    for name, size in (("a.npy", 3), ("sub/b.npy", 5), ("sub/c.json", 7), ("gone/d.npy", 11)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(bytes(size))
    os.symlink("nowhere", "sub/e.npy")
    os.symlink("f.npy", "sub/f.npy")  # a link to itself
    assert files.size_of(".") == 26
    assert files.size_of(".", ".npy") == 19
    assert files.size_of("nowhere") == 0
    walk = os.scandir

    def scan(place):
        if isinstance(place, str) and Path(place).name == "gone":
            shutil.rmtree(place)
        return walk(place)

    monkeypatch.setattr(os, "scandir", scan)
    assert files.size_of(".", ".npy") == 8


def test_what_killed_processes_left_of_a_folder_is_removed(folder):
    def begin() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", FILLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    killed, works = begin(), begin()
    killed.kill()
    killed.communicate()
    Path(".hgkd-other-x").mkdir()
    os.symlink(".hgkd-other-x", ".hgkd-folder-link")
    assert len(list(folder.glob(".hgkd-folder-*"))) == 3
    second = begin()
    works.communicate(b"")
    second.communicate(b"")
    assert (works.returncode, second.returncode) == (0, 1)  # the folder of the running process was left alone
    assert sorted(os.listdir()) == [".hgkd-folder-link", ".hgkd-other-x", "folder"]
    assert os.listdir("folder") == ["x"]


def test_names_of_the_user_survive(folder):
    mine = ["out.json.tmp", "out.json.partial", "out.json~", ".out.json.swp"]
    for name in mine:
        Path(name).write_text("mine")
    files.write_json("out.json", {"a": 1})
    assert json.loads(Path("out.json").read_text()) == {"a": 1}
    assert all(Path(name).read_text() == "mine" for name in mine)


def test_what_cannot_be_encoded_is_escaped(folder):
    files.write_text("x", "bad\udcff é\n")
    assert Path("x").read_bytes() == b"bad\\udcff \xc3\xa9\n"
    with pytest.raises(UserError, match="x is not written: a number in it is NaN or infinite"):
        files.write_json("x", {"a": float("nan")})


def test_only_a_line_feed_ends_a_line(folder):
    content = "a\rb\u2028c\x0c\x1d\x85\n\r\nd\r\n\ne"
    Path("x").write_bytes(content.encode())
    assert list(files.read_lines("x")) == ["a\rb\u2028c\x0c\x1d\x85", "", "d", "", "e"]
    Path("x").write_bytes(b"")
    assert list(files.read_lines("x")) == []
    Path("x").write_bytes(b"\n")
    assert list(files.read_lines("x")) == [""]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone", "gone does not exist; name a thing"),
        ("folder", "folder cannot be read: Is a directory; name a thing"),
        ("latin", "latin is no text in UTF-8; name a thing"),
        ("a\0b", r"a\\x00b cannot be read: embedded null byte; name a thing"),
    ],
)
def test_texts_that_cannot_be_read(name, expected, folder):
    Path("folder").mkdir()
    Path("latin").write_bytes("ä".encode("latin-1"))
    for read in (files.read_text, lambda *arguments: list(files.read_lines(*arguments))):
        with pytest.raises(UserError, match=f"^{expected}$"):
            read(name, "name a thing")


SCHEMA = {"n": files.Within(0, 9), "x?": (float, None), "rows?": [{"k": str}], "by?": {str: bool}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"n": 3, "x": null, "rows": [{"k": "é"}], "by": {"a": true}, "more": [1]}', None),
        ('{"n": 3, "x": 1e308}', None),
        ("{", "it is no JSON, or cut short"),
        ("", "it is no JSON, or cut short"),
        ("[" * 100000, "it is nested too deep"),
        ('{"n": NaN}', "NaN is no number of JSON"),
        ('{"n": 3, "more": -Infinity}', "-Infinity is no number of JSON"),
        ('{"n": %s}' % ("9" * 5000), "it is no JSON"),
        ("3", "it is not a table"),
        ("{}", "it lacks 'n'"),
        ('{"n": 10}', "n is not from 0 to 9"),
        ('{"n": true}', "n is not a whole number"),
        ('{"n": 3.0}', "n is not a whole number"),
        ('{"n": "3"}', "n is not a whole number"),
        ('{"n": 3, "x": 1e999}', "x is not a number"),
        ('{"n": 3, "x": %s}' % ("9" * 400), "x is not a number"),
        ('{"n": 3, "rows": {}}', "rows is not a list"),
        ('{"n": 3, "rows": [{"k": "a"}, {"k": 1}]}', r"rows\[1\].k is not text"),
        ('{"n": 3, "rows": [{"k": "\\ud800"}]}', r"rows\[0\].k is not text"),
        ('{"n": 3, "by": {"a": 1}}', "by.a is not true or false"),
    ],
)
def test_json(text, problem, folder):
    Path("x.json").write_text(text)
    if problem is None:
        assert files.read_json("x.json", SCHEMA) == json.loads(text)
    else:
        with pytest.raises(UserError, match=rf"^x\.json is no file of ours: .*{problem}"):
            files.read_json("x.json", SCHEMA, "file of ours")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("as it is"), "as it is"),
        (FileNotFoundError(2, "No such file", "a\x1bb"), r"a\\x1bb: No such file"),
        (BrokenPipeError(32, "Broken pipe"), "standard output was closed before everything was written"),
        (OSError(28, "No space left on device"), "standard output or a file: No space left on device"),
        (MemoryError(), "not enough memory; give smaller batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (KeyError("x"), "unforeseen KeyError: 'x'; --debug shows where"),
    ],
)
def test_in_one_line(error, expected):
    with pytest.raises(UserError, match=f"^{expected}"):
        raise in_one_line(error)
