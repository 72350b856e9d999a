"""scripts/prepare_data.sh, run for real on a small corpus made here."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPLITS = ("train", "valid", "test")
VOCAB = 150
UNKNOWN, END = 3, 2  # ids of fairseq's <unk> and </s>
FIRST_PIECE = 4

WORDS = {
    "de": ["Mann", "Frau", "Straße", "Hündin", "läuft", "schwarz-weiß", "über", "grün", "sitzt", "Ball"],
    "en": ["Man", "Woman", "Street", "dog", "runs", "black-and-white", "over", "green", "sits", "ball"],
}
# Test sentences by hand: the text, and the same in the paper's style. "Θ" is in no training sentence.
BY_HAND = {
    "de": [
        ("Der Mann (alt) läuft, z.B. über die Straße.", "der mann ( alt ) läuft , z.b. über die straße ."),
        ("Eine schwarz-weiße Hündin!", "eine schwarz-weiße hündin !"),
        ("Das Zeichen Θ fehlt.", "das zeichen θ fehlt ."),
    ],
    "en": [
        ('The man\'s dog runs, e.g. over "Main Street".', 'the man \'s dog runs , e.g. over " main street " .'),
        ("A black-and-white dog & a ball!", "a black-and-white dog & a ball !"),
        ("Señor Smith misses the sign Θ.", "señor smith misses the sign θ ."),
    ],
}


@pytest.fixture
def textdir(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    rng = random.Random(1)
    for split, size in (("train", 300), ("valid", 20)):
        for language, article, letters in (("de", "Die", "äöüß"), ("en", "The", "ñ")):
            lines = [f"{article} {' '.join(rng.choices(WORDS[language], k=5))}." for _ in range(size)]
            if split == "train":  # every letter that the test sentences need, but for Θ
                lines.append(f"ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz {letters} (a), \"b\" & 'c' - x!")
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for language, pairs in BY_HAND.items():
        (folder / f"test.{language}").write_text("".join(text + "\n" for text, _ in pairs), encoding="utf-8")
    return folder


def prepare(*args: object, **env: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in env.items()}
    command = ["bash", str(SCRIPTS / "prepare_data.sh"), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]


def dictionary(databin: Path, language: str) -> list[str]:
    """Symbols of a fairseq dictionary by id."""
    lines = (databin / f"dict.{language}.txt").read_text(encoding="utf-8").splitlines()
    return ["<s>", "<pad>", "</s>", "<unk>"] + [line.rsplit(" ", 1)[0] for line in lines]


def binarised(databin: Path, split: str, language: str) -> list[list[int]]:
    """Sentences of fairseq's mmap format: 16-bit ids in a row, each sentence closed by </s>."""
    ids = np.fromfile(databin / f"{split}.de-en.{language}.bin", dtype=np.uint16).tolist()
    sentences: list[list[int]] = [[]]
    for i in ids:
        if i == END:
            sentences.append([])
        else:
            sentences[-1].append(i)
    assert sentences.pop() == []
    return sentences


def remove_bpe(symbols: list[str]) -> str:
    """What fairseq's --remove-bpe sentencepiece does."""
    return " ".join(symbols).replace(" ", "").replace("\u2581", " ").strip()


@pytest.mark.parametrize("style", ["cased", "paper"])
def test_prepares(style: str, textdir: Path, tmp_path: Path) -> None:
    splits = SPLITS
    if style == "cased":  # with a second validation subset
        splits = (*SPLITS, "valid1")
        for language in ("de", "en"):
            shutil.copy(textdir / f"valid.{language}", textdir / f"valid1.{language}")
    databin, partial = tmp_path / "new" / "bin", tmp_path / "new" / "bin.partial"
    partial.mkdir(parents=True)  # of the user
    (partial / "train.de-en.de.bin").write_text("mine")
    options = ["--vocab", VOCAB] + (["--style", style] if style == "paper" else [])
    result = prepare(textdir, f"{databin}/", *options)
    assert result.returncode == 0, result.stderr

    binaries = [f"{s}.de-en.{la}.{end}" for s in splits for la in ("de", "en") for end in ("bin", "idx")]
    others = ["PREPARED", "dict.de.txt", "dict.en.txt", "sentencepiece.model"]
    assert sorted(path.name for path in databin.iterdir()) == sorted(binaries + others)
    assert [path.read_text() for path in partial.iterdir()] == ["mine"]
    assert sorted(path.name for path in databin.parent.iterdir()) == ["bin", "bin.partial"]
    prepared = (databin / "PREPARED").read_text()
    assert prepared.startswith(f"vocab={VOCAB} source=de target=en style={style} text=")
    assert prepared.count("\n") == 1

    # One dictionary for both languages, with all pieces of the model but <unk>, <s> and </s>, padded to 8 * n entries.
    model = sentencepiece.SentencePieceProcessor(model_file=str(databin / "sentencepiece.model"))
    symbols = dictionary(databin, "de")
    assert symbols == dictionary(databin, "en")
    assert model.get_piece_size() == VOCAB
    pieces = [model.id_to_piece(i) for i in range(3, VOCAB)]
    assert symbols[FIRST_PIECE:] == pieces + [f"madeupword000{i}" for i in range(len(symbols) - VOCAB - 1)]
    assert len(symbols) == 152

    for split in splits:
        for language in ("de", "en"):
            text = (textdir / f"{split}.{language}").read_text(encoding="utf-8").splitlines()
            sentences = binarised(databin, split, language)
            assert len(sentences) == len(text)
            decoded = [remove_bpe([symbols[i] for i in sentence]) for sentence in sentences]
            unknown = sum(sentence.count(UNKNOWN) for sentence in sentences)
            if split == "test":
                expected = [pair[style == "paper"] for pair in BY_HAND[language]]
                assert decoded == [line.replace("Θ", "<unk>").replace("θ", "<unk>") for line in expected]
                assert unknown == 1  # only the character that training never saw
                pieces_of_test = sum(map(len, sentences))
                assert f"test.{language}: 3 lines, {pieces_of_test} pieces, 1 unknown\n" in result.stderr
            else:
                assert unknown == 0
                if style == "cased":
                    assert decoded == text
    # sentencepiece saw the training text only
    assert not any("Θ" in piece or "θ" in piece for piece in pieces)

    again = prepare(textdir, databin, *options, PYTHON="/nowhere")
    assert again.returncode == 0
    assert again.stderr == f"prepare_data.sh: {databin} is there already: {prepared}"

    # Other settings, or another text, are refused.
    before = {path.name: path.read_bytes() for path in databin.iterdir()}
    other = prepare(textdir, databin, "--vocab", VOCAB + 1, "--style", style)
    assert other.returncode == 1
    assert f"was prepared with other settings ({prepared.strip()}, not vocab={VOCAB + 1} " in last_line(other)
    with (textdir / "test.de").open("a") as file:
        file.write("Noch einer.\n")
    changed = prepare(textdir, databin, *options)
    assert changed.returncode == 1
    assert "was prepared with other settings" in last_line(changed)
    assert {path.name: path.read_bytes() for path in databin.iterdir()} == before


def test_like_a_teachers(textdir: Path, tmp_path: Path) -> None:
    """A student's text in the pieces, dictionary and style of its teacher's data, whatever the student's text has."""
    assert prepare(textdir, tmp_path / "teacher", "--vocab", VOCAB, "--style", "paper").returncode == 0
    own = tmp_path / "own"
    shutil.copytree(textdir, own)
    (own / "train.de").write_text("Hallo HAUS\nein Θ\n", encoding="utf-8")
    (own / "train.en").write_text("hello HOUSE\na Θ\n", encoding="utf-8")
    result = prepare(own, tmp_path / "student", "--like", tmp_path / "teacher")
    assert result.returncode == 0, result.stderr
    for name in ("dict.de.txt", "dict.en.txt", "sentencepiece.model", "test.de-en.de.bin", "valid.de-en.en.bin"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes(), name
    symbols = dictionary(tmp_path / "student", "de")
    decoded = [
        remove_bpe([symbols[i] for i in sentence]) for sentence in binarised(tmp_path / "student", "train", "de")
    ]
    assert decoded == ["hallo haus", "ein <unk>"]
    prepared = (tmp_path / "student" / "PREPARED").read_text()
    assert re.fullmatch(r"like=[0-9a-f]{12} source=de target=en style=paper text=[0-9a-f]{12}\n", prepared)

    again = prepare(own, tmp_path / "student", "--like", tmp_path / "teacher")
    assert (again.returncode, last_line(again)) == (
        0,
        f"prepare_data.sh: {tmp_path / 'student'} is there already: {prepared.strip()}",
    )
    assert prepare(textdir, tmp_path / "other", "--vocab", VOCAB).returncode == 0  # another style: other pieces
    other = prepare(own, tmp_path / "student", "--like", tmp_path / "other")
    assert other.returncode == 1
    assert "was prepared with other settings" in last_line(other)

    (tmp_path / "other" / "sentencepiece.model").write_bytes(b"no model")
    damaged = prepare(own, tmp_path / "new", "--like", tmp_path / "other")
    assert damaged.returncode == 1
    model = tmp_path / "other" / "sentencepiece.model"
    assert last_line(damaged) == f"encode_text.py: --model {model}: is no model of sentencepiece"
    assert not (tmp_path / "new").exists()


def test_some_of_a_teachers_symbols(textdir: Path, tmp_path: Path) -> None:
    """A student's dictionary is a part of its teacher's: what is left out is split into pieces that are in it."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert prepare(textdir, teacher, "--vocab", VOCAB).returncode == 0
    (textdir / "train.de").write_text("Die Frau sitzt.\n" * 40 + "Der Ball, der Mann läuft.\n", encoding="utf-8")
    (textdir / "train.en").write_text("The woman sits.\n" * 40 + "The ball, the man runs.\n", encoding="utf-8")
    for wanted in (12, 9999):
        refused = prepare(textdir, student, "--like", teacher, "--vocab", wanted)
        begin = re.escape(f"encode_text.py: --vocab {wanted}: --model {teacher / 'sentencepiece.model'}")
        told = re.fullmatch(f"{begin} has ([0-9]+) symbols that all must stay, and 151 in all", last_line(refused))
        assert told, refused.stderr
        assert not student.exists()
    wanted = int(told[1]) + 20
    result = prepare(textdir, student, "--like", teacher, "--vocab", wanted)
    assert result.returncode == 0, result.stderr
    assert re.match(rf"like=[0-9a-f]{{12}} vocab={wanted} source=de ", (student / "PREPARED").read_text())
    symbols = dictionary(student, "de")
    assert symbols == dictionary(student, "en")
    assert len(symbols) == wanted
    assert set(symbols) < set(dictionary(teacher, "de"))
    assert {"▁Die", "▁sitzt"} < set(symbols)  # frequent in the student's text
    assert "▁Straße" in set(dictionary(teacher, "de")) - set(symbols)
    sentences = [[symbols[i] for i in sentence] for sentence in binarised(student, "test", "de")]
    assert [remove_bpe(one) for one in sentences] == [text.replace("Θ", "<unk>") for text, _ in BY_HAND["de"]]
    again = prepare(textdir, tmp_path / "again", "--like", teacher, "--vocab", wanted)
    assert again.returncode == 0
    assert all((tmp_path / "again" / file.name).read_bytes() == file.read_bytes() for file in student.iterdir())
    another = prepare(textdir, student, "--like", teacher)
    assert "was prepared with other settings" in last_line(another)


def test_same_text_same_bytes(textdir: Path, tmp_path: Path) -> None:
    """Whatever the folders are called: no path gets into the model."""
    outputs = []
    for name in ("one", "another"):
        source = tmp_path / name / "text"
        source.parent.mkdir()
        textdir.rename(source)
        out = tmp_path / name / "pieces"
        subprocess.run(
            [sys.executable, str(SCRIPTS / "encode_text.py"), str(source), str(out), "--vocab", str(VOCAB)],
            check=True,
            capture_output=True,
        )
        outputs.append({path.name: path.read_bytes() for path in out.iterdir()})
        source.rename(textdir)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 8
    assert str(tmp_path).encode() not in outputs[0]["sentencepiece.model"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_foreign_folder_is_refused(kind: str, textdir: Path, tmp_path: Path) -> None:
    databin = tmp_path / "bin"
    if kind == "folder":
        databin.mkdir()
        (databin / "mine").write_text("mine")
    else:
        databin.write_text("mine")
    result = prepare(textdir, databin, "--vocab", VOCAB)
    assert result.returncode == 1
    assert result.stderr == (
        f"prepare_data.sh: {databin} exists but has no file PREPARED: remove it or choose another DATABIN\n"
    )
    assert (databin / "mine" if kind == "folder" else databin).read_text() == "mine"


def fake_python(folder: Path, preprocess: str) -> Path:
    """The real Python in a folder with another fairseq-preprocess."""
    folder.mkdir()
    for name, text in (("python", f'exec "{sys.executable}" "$@"'), ("fairseq-preprocess", preprocess)):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder / "python"


def test_failing_preprocess_leaves_no_folder(textdir: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "fake", 'printf "%s\\n" "$@"; echo no space left; exit 1')
    result = prepare(textdir, tmp_path / "bin", "--vocab", VOCAB, PYTHON=python)
    assert result.returncode == 1
    (log,) = tmp_path.glob("bin.*/pieces/log")
    assert last_line(result) == f"prepare_data.sh: fairseq-preprocess failed (no space left): {log} has all it said"
    assert "--joined-dictionary" in log.read_text().splitlines()
    assert not (tmp_path / "bin").exists()


def test_killed_or_running_elsewhere(textdir: Path, tmp_path: Path) -> None:
    """The work folder of a running process is not touched; that of a killed one is replaced."""
    started, databin = tmp_path / "started", tmp_path / "out" / "bin"
    python = fake_python(tmp_path / "fake", f"touch {started}; exec sleep 60")
    command = ["bash", str(SCRIPTS / "prepare_data.sh"), str(textdir), str(databin), "--vocab", str(VOCAB)]
    first = subprocess.Popen(
        command, env=os.environ | {"PYTHON": str(python)}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not started.exists():
            assert first.poll() is None
            time.sleep(0.05)
        result = prepare(textdir, databin, "--vocab", VOCAB)
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in databin.parent.iterdir()) == ["bin", "bin.partial"]
        assert (databin.with_name("bin.partial") / "pieces" / "train.de").exists()
    finally:
        os.killpg(first.pid, 9)
        first.wait()
    files = {file.name: file.read_bytes() for file in databin.iterdir()}
    shutil.rmtree(databin)
    result = prepare(textdir, databin, "--vocab", VOCAB)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in databin.parent.iterdir()] == ["bin"]
    assert {file.name: file.read_bytes() for file in databin.iterdir()} == files


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        (None, ["--vocab", "90000"], "encode_text.py: --vocab 90000 does not suit train.*: "),
        (
            "drop a line",
            [],
            "encode_text.py: TEXTDIR {}: valid.de has 20 lines and valid.en 19: give a pair on each line",
        ),
        (
            "remove a file",
            [],
            "prepare_data.sh: TEXTDIR {} has no valid.en: make it with get_data.sh, or name the langu",
        ),
        (
            None,
            ["--target", "fr"],
            "prepare_data.sh: TEXTDIR {} has no train.fr: make it with get_data.sh, or name the l",
        ),
    ],
)
def test_unfit_text(change: str | None, options: list[str], complaint: str, textdir: Path, tmp_path: Path) -> None:
    valid = textdir / "valid.en"
    if change == "drop a line":
        valid.write_text("".join(valid.read_text().splitlines(True)[:-1]))
    elif change == "remove a file":
        valid.unlink()
    result = prepare(textdir, tmp_path / "bin", *options)
    assert result.returncode == 1
    assert last_line(result).startswith(complaint.format(textdir))
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "TEXTDIR and DATABIN are needed"),
        (["text"], "TEXTDIR and DATABIN are needed"),
        (["text", "bin", "more"], "unexpected argument more: give one TEXTDIR and one DATABIN"),
        (["text", "bin", "--vocab", "many"], "--vocab many: needs a number of pieces, such as 4000"),
        (["text", "bin", "--vocab"], "--vocab needs a value"),
        (["text", "bin", "--style", "lower"], "--style lower: must be cased or paper"),
        (["text", "bin", "--source", "en"], "--source and --target are both en: give two languages"),
        (
            ["text", "bin", "--size", "3"],
            "unknown option --size; known are: --vocab, --source, --target, --style, --like",
        ),
        (["text", "bin", "--like", "b", "--vocab", "0"], "--vocab 0: needs a number of pieces, such as 4000"),
        (["text", "bin", "--like", "b", "--style", "cased"], "--like b has its own style: leave --style out"),
        (
            ["text", "bin", "--like", "/nowhere"],
            "--like /nowhere: holds no data that prepare_data.sh made of de and en (PREPARED, sentencepiece.model, "
            "dict.de.txt, dict.en.txt): name the DATABIN of the teacher",
        ),
    ],
)
def test_usage_errors(args: list[str], complaint: str) -> None:
    result = prepare(*args)
    assert (result.returncode, result.stderr) == (2, f"prepare_data.sh: {complaint}\n")


def test_a_line_ends_at_its_line_feed(textdir: Path, tmp_path: Path) -> None:
    """What else Python takes for the end of a line shifts no pair: not here, nor when fairseq reads the pieces, for
    which a carriage return is the end of a line too."""
    for split in SPLITS:
        file = textdir / f"{split}.en"
        lines = file.read_text(encoding="utf-8").splitlines()
        lines[0] = "\u2028".join(lines[0].split(" "))
        lines[1] = lines[1].replace(" ", "\r", 1).replace(" ", "\x0c", 1)
        file.write_bytes("".join(f"{line}\n" for line in lines).encode())
    out = tmp_path / "pieces"
    script = str(SCRIPTS / "encode_text.py")
    subprocess.run([sys.executable, script, str(textdir), str(out), "--vocab", str(VOCAB)], check=True)
    for split in SPLITS:
        text, pieces = ((folder / f"{split}.en").read_bytes().decode() for folder in (textdir, out))
        assert not {"\r", "\x0c", "\u2028"} & set(pieces)
        found = [remove_bpe(line.split(" ")) for line in pieces.removesuffix("\n").split("\n")]
        expected = [" ".join(line.split()) for line in text.removesuffix("\n").split("\n")]
        assert [line.replace("<unk>", "Θ").lower() for line in found] == [line.lower() for line in expected]
