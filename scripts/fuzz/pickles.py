"""Fuzzing of checkpoints with code, for every pickle operation that can call code and every file format; the loader
must not run it. fuzz.py runs the reader."""

from __future__ import annotations

import atexit
import functools
import io
import pickle
import pickletools
import random
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import checkpoints

from hgkd_fairseq.plugin import checkpoints as loader


@functools.cache
def mark() -> Path:
    """Return the path of the marker file that the code creates if it is run."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "code_has_run"


def calls() -> list[tuple[str, str, tuple]]:
    """Return (module, name, arguments) of calls that an unpickler must not make.

    Most of them create the marker file, directly or through the code that they run. The others import a module, load a
    file or return a callable.
    """
    file = str(mark())
    python, shell = f"open({file!r}, 'w')", f"touch {file}"
    return [
        *((module, "system", (shell,)) for module in ("os", "posix", "nt")),
        *(("subprocess", name, (["touch", file],)) for name in ("Popen", "run", "call", "check_output")),
        *((module, name, (python,)) for module in ("builtins", "__builtin__") for name in ("eval", "exec", "open")),
        *((module, "open", (file, "w")) for module in ("io", "codecs", "builtins", "pathlib.Path", "bz2", "gzip")),
        ("numpy", "memmap", (file, "u1", "w+", 0, 1)),
        ("torch", "save", (1, file)),
        ("torch", "load", (file,)),
        ("torch.hub", "load_state_dict_from_url", (f"file://{file}",)),
        ("torch.jit", "CompilationUnit", (python,)),
        ("torch.utils.cpp_extension", "load_inline", (python,)),
        ("torch._utils", "_rebuild_wrapper_subclass", (python,)),
        ("runpy", "run_path", (file,)),
        ("timeit", "timeit", (python,)),
        ("pdb", "run", (python,)),
        ("code", "interact", (python,)),
        ("importlib", "import_module", ("antigravity",)),
        ("operator", "attrgetter", ("__class__.__base__.__subclasses__",)),
        ("operator", "methodcaller", ("__reduce__",)),
        ("functools", "partial", (print,)),
        ("shutil", "copyfile", ("/proc/self/cmdline", file)),
        ("fairseq.file_io", "PathManager.open", (file, "w")),
        ("omegaconf", "OmegaConf.load", (file,)),
        ("argparse", "FileType.__call__", (file,)),
        ("hgkd_fairseq.files", "write_text", (file, "x")),
    ]


def operations(module: str, name: str, arguments: tuple, kind: str) -> bytes:
    """Encode a call as pickle operations that leave one value on the stack.

    Args:
        module: module of the callable.
        name: name of the callable.
        arguments: arguments of the call.
        kind: element of KINDS: the operations that make the call.

    Raises:
        ValueError: unknown kind.
    """
    packed = pickle.dumps(arguments, protocol=2)[2:-1] if print not in arguments else b"cbuiltins\nprint\n\x85"
    named = f"c{module}\n{name}\n".encode()
    if kind == "reduce":
        return named + packed + b"R"
    if kind == "inst":
        parts = b"".join(pickle.dumps(one, protocol=2)[2:-1] for one in arguments if one is not print)
        return b"(" + parts + f"i{module}\n{name}\n".encode()
    if kind == "obj":
        parts = b"".join(pickle.dumps(one, protocol=2)[2:-1] for one in arguments if one is not print)
        return b"(" + named + parts + b"o"
    if kind == "new":
        return named + packed + b"\x81"
    if kind == "new with keywords":
        return named + packed + b"}\x92"
    if kind == "build":
        return named + b")R" + packed + b"b"
    if kind == "stack":
        words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
        return words + b"\x93" + packed + b"R"
    if kind == "state":  # __setstate__ of an allowed object, with a call in its state
        return b"cnumpy\ndtype\nX\x02\0\0\0i8\x85R(K\x03" + named + packed + b"RNNNNNtb"
    if kind == "hooks":  # a backward hook of a parameter
        return b"ctorch._utils\n_rebuild_parameter\n(" + named + b"\x88ccollections\nOrderedDict\n)RtR"
    if kind == "persistent":
        return named + packed + b"RQ"
    raise ValueError(kind)


KINDS = ("reduce", "inst", "obj", "new", "new with keywords", "build", "stack", "state", "hooks", "persistent")
FORMS = ("zip", "old", "raw", "tar", "raw in zip")


def with_code(content: bytes, code: bytes, place: str) -> bytes:
    """Insert code into a pickle: at its "end", as its only content ("alone"), or at its beginning ("begin")."""
    if place == "end":
        return content[:-1] + code + b"0."
    if place == "alone":
        return b"\x80\x02" + code + b"."
    return content[:2] + code + b"0" + content[2:]


def file_of(code: bytes, place: str, form: str) -> bytes:
    zipped, old = plain()
    if form == "old":
        stream, parts = io.BytesIO(old), []
        for _ in range(5):
            start = stream.tell()
            pickle_end(stream)
            parts.append(old[start : stream.tell()])
        parts[3] = with_code(parts[3], code, place)
        return b"".join(parts) + old[stream.tell() :]
    with zipfile.ZipFile(io.BytesIO(zipped)) as records:
        content = records.read("archive/data.pkl")
        others = {entry.filename: records.read(entry) for entry in records.infolist()}
    made = with_code(content, code, place)
    buffer = io.BytesIO()
    if form == "raw":
        return made
    if form == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as file:
            for name in ("pickle", "storages", "tensors"):
                entry = tarfile.TarInfo(name)
                entry.size = len(made)
                file.addfile(entry, io.BytesIO(made))
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, record in others.items() if form == "zip" else ():
            file.writestr(name, made if name == "archive/data.pkl" else record)
        if form == "raw in zip":
            file.writestr("data.pkl", made)
            file.writestr("constants.pkl" if place == "end" else "code/__torch__.py", made)
    return buffer.getvalue()


def pickle_end(stream: io.BytesIO) -> None:
    """Advance the stream past the end of one pickle."""
    for _ in pickletools.genops(stream):
        pass


@functools.cache
def plain() -> tuple[bytes, bytes]:
    """Return the same checkpoint in torch's zip format and in the legacy format."""
    return checkpoints.saved(checkpoints.state(), zipped=True), checkpoints.saved(checkpoints.state(), zipped=False)


def hostile(rng: random.Random) -> Iterator[bytes]:
    while True:
        more = rng.choice((0, 0, 1))
        code = b"".join(operations(*rng.choice(calls()), rng.choice(KINDS)) + b"0" for _ in range(more))
        code += operations(*rng.choice(calls()), rng.choice(KINDS))
        content = file_of(code, rng.choice(("end", "alone", "begin")), rng.choice(FORMS))
        yield checkpoints.bytes_changed(content, rng) if rng.random() < 0.2 else content


def read(path: str | Path) -> None:
    """Load a checkpoint as the commands do, and check that no code was run and that the loaded state is plain.

    Raises:
        UserError: the checkpoint is refused.
        AssertionError: code was run (the marker file exists), or the state is not plain.
    """
    try:
        found = loader.read(path)
        checkpoints.check_plain(found.state)
        found.options("model")
    finally:
        assert not mark().exists(), "code was run"


READERS = {"code": (hostile, read)}
