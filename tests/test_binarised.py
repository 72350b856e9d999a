"""Binarised data that is truncated, damaged or of another kind is refused with one error message, whatever the byte."""

import contextlib
import gc
import os
import random
import shutil
from pathlib import Path

import pytest
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised


def task(folder: Path) -> TranslationTask:
    found = TranslationTask.setup_task(
        TranslationConfig(data=str(folder), source_lang="de", target_lang="en", dataset_impl=None, train_subset="train")
    )
    found.cfg.required_seq_len_multiple = 1
    return found


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """Return a copy of the test set and the dictionaries, which a test may damage."""
    for file in [*data.glob("test.*"), *data.glob("dict.*")]:
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


def cut(size: int, suffix: str):
    return lambda folder: os.truncate(folder / f"test.de-en.en.{suffix}", size)


def overwrite(suffix: str, place: int, content: bytes):
    def change(folder: Path) -> None:
        with (folder / f"test.de-en.en.{suffix}").open("r+b") as file:
            file.seek(place)
            file.write(content)

    return change


def without_targets(folder: Path) -> None:
    for file in folder.glob("test.*.en.*"):
        file.unlink()


def other_targets(folder: Path) -> None:
    """Merge the first two target sentences in the index: 63 sentences in an unchanged .bin file."""
    index = (folder / "test.de-en.en.idx").read_bytes()
    sizes = int.from_bytes(index[26:30], "little"), int.from_bytes(index[30:34], "little")
    shorter = index[:18] + (63).to_bytes(8, "little") + sum(sizes).to_bytes(4, "little") + index[34 : 26 + 4 * 64]
    (folder / "test.de-en.en.idx").write_bytes(shorter + index[26 + 4 * 64 :][:8] + index[26 + 4 * 64 + 16 :])


DAMAGED = {
    "whole": (lambda folder: None, None),
    "no folder": (lambda folder: shutil.rmtree(folder), "is no folder; name the one that fairseq-preprocess wrote"),
    "no such subset": (lambda folder: [file.unlink() for file in folder.glob("test.*")], "there is no subset test in"),
    "no targets": (without_targets, "has no targets; binarise both languages, without --only-source"),
    "fewer targets": (other_targets, "has 64 sources and 63 targets|the same number of examples"),
    **{f"index cut to {size}": (cut(size, "idx"), "en.idx is cut short") for size in (0, 5, 9, 17, 20, 25, 26, 100)},
    **{f"ids cut to {size}": (cut(size, "bin"), f"en.bin has {size} bytes and not") for size in (0, 1, 20, 100)},
    "a type of ids that is none": (overwrite("idx", 17, b"\xff"), "en.idx is cut short or damaged"),
    "a version of tomorrow": (overwrite("idx", 9, b"\x02"), "en.idx is cut short or damaged"),
    "a count out of this world": (overwrite("idx", 18, b"\xff" * 8), "en.idx is cut short or damaged"),
    "a length below 0": (overwrite("idx", 26, b"\xff" * 4), "en.idx holds no sentences, or is damaged"),
    "a pointer elsewhere": (overwrite("idx", 26 + 4 * 64 + 8, b"\x01"), "en.idx holds no sentences, or is damaged"),
    "another format": (overwrite("idx", 0, b"TNTIDX\0\0"), "is empty or damaged"),
    "no format": (overwrite("idx", 0, b"x"), "is empty or damaged"),
    "a token beyond the dictionary": (overwrite("bin", 0, b"\xff\x7f"), "does not fit its dictionary of 64 types"),
    "a folder": (
        lambda folder: (folder / "test.de-en.en.bin").unlink() or (folder / "test.de-en.en.bin").mkdir(),
        "is empty or damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_subset(case: str, folder: Path, capfd):
    harm, expected = DAMAGED[case]
    loaded = task(folder)
    harm(folder)
    if expected is None:
        assert len(binarised.subset(loaded, "test", (1024, 1024))) == 64
    else:
        with pytest.raises(UserError, match=expected):
            binarised.subset(loaded, "test", (1024, 1024))
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err  # from fairseq's destructors


def test_any_byte(folder: Path):
    """Random damage leads to a UserError or to data that can still be read, never to another exception."""
    rng = random.Random(1)
    loaded = task(folder)
    whole = {file: file.read_bytes() for file in folder.glob("test.*")}
    for _ in range(150):
        file = rng.choice(sorted(whole))
        content = bytearray(whole[file])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.2 else content)
        with contextlib.suppress(UserError):
            assert len(binarised.subset(loaded, "test")) == 64
        file.write_bytes(whole[file])


def test_sentences_that_are_too_long(folder: Path):
    """Sentences that are longer than the model takes are an error; they are not skipped silently."""
    with pytest.raises(
        UserError, match=r"of 64 sentences that are longer than the model takes \(\(5, 1024\) tokens; the"
    ):
        binarised.subset(task(folder), "test", (5, 1024))


def test_the_first_shard_is_the_one(data: Path, tmp_path: Path):
    assert binarised.first_shard(f"{data}:{tmp_path}/gone") == str(data)
    for named in ("", f"{tmp_path}/gone:{data}", str(data / "dict.de.txt")):
        with pytest.raises(UserError, match="is no folder; name the one that fairseq-preprocess wrote"):
            binarised.first_shard(named)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a 1\nb 2\n", None),
        (b"", None),
        (b"a\n", "Incorrect dictionary format"),
        (b"a b\n", "Incorrect dictionary format"),
        (b"\n", "Incorrect dictionary format"),
        (b"a 1\na 2\n", "Duplicate word"),
        (b"<unk> 1\n", "Duplicate word"),
        (b"a " + b"9" * 5000, "Incorrect dictionary format"),
        (b"\xff 1\n", "Incorrect encoding"),
        (b"\x00\n", "Incorrect dictionary format"),
        (None, "does not exist"),
    ],
)
def test_dictionary(content: bytes | None, expected: str | None, tmp_path: Path):
    file = tmp_path / "dict.de.txt"
    if content is not None:
        file.write_bytes(content)
    if expected is None:
        assert len(binarised.dictionary(str(file))) == 4 + content.count(b"\n")
        return
    with pytest.raises(UserError, match=expected):
        binarised.dictionary(str(file))
