"""scripts/study: a grid that is killed and started again, one that grows, one that changes; tables by hand."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import command_line as cl
import pytest
import torch
from sacrebleu.metrics import BLEU

from hgkd_fairseq import cli, files, methods
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation.score import LENGTH_PENALTIES

STUDY = Path(__file__).parents[2] / "scripts" / "study"
sys.path.insert(0, str(STUDY))

import run as runner  # noqa: E402
import table  # noqa: E402
from study import Grid, beam_of  # noqa: E402

UPDATES = 150
GRID = """
[data]
text = "{text}"
pairs = {pairs}
vocabulary = 36
[training]
updates = {updates}
precision = "fp32"
options = '''--arch transformer_iwslt_de_en --share-all-embeddings --optimizer adam --lr 0.005 --max-tokens 600
    --encoder-layers 1 --decoder-layers 1 --encoder-attention-heads 2 --decoder-attention-heads 2'''
[sizes.big]
options = "--encoder-embed-dim 32 --decoder-embed-dim 32 --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64"
[sizes.small]
options = "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32"
[settings.same]
teacher = "big"
student = "big"
[settings.compression]
teacher = "big"
student = "small"
[teacher]
method = "base"
seed = 0
[generation]
options = "--beam 2 --max-len-b 20"
"""


def write_grid(folder: Path, *blocks: str, updates: int = UPDATES, pairs: int = 300) -> Path:
    file = folder / "grid.toml"
    cells = "".join(f"[[cells]]\n{block}\n" for block in blocks)
    file.write_text(GRID.format(text=folder, updates=updates, pairs=pairs) + cells)
    return file


def block(settings: list[str], methods: list[str], seeds: list[int], more: str = "") -> str:
    return f"settings = {json.dumps(settings)}\nmethods = {json.dumps(methods)}\nseeds = {json.dumps(seeds)}\n{more}"


def start(grid: Path, study: Path) -> subprocess.Popen:
    command = [sys.executable, STUDY / "run.py", grid, "--dir", study]
    return subprocess.Popen(
        [str(part) for part in command], env={**cl.environment(), "PYTHONPATH": str(cl.ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=cl.TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + cl.TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.iterdir())}


def translations(study: Path, cell: Path, subset: str, penalty: float) -> list[str]:
    """fairseq-generate's, in words, with this --lenpen."""
    result = cl.fairseq(
        *("generate", study / "data-bin", "--path", cell / "checkpoint_best.pt", "--gen-subset", subset, "--cpu"),
        *("--beam", "2", "--max-len-b", "20", "--lenpen", penalty, "--required-batch-size-multiple", "1"),
        *("--max-tokens", "4000", "--post-process", "sentencepiece", "--user-dir", cl.ROOT / "hgkd_fairseq"),
    )
    assert result.code == 0, result.output
    found = {int(number): text for number, text in re.findall(r"^D-(\d+)\t\S+\t(.*)$", result.output, re.MULTILINE)}
    return [found[number] for number in range(len(found))]


@pytest.mark.slow
def test_killed_and_restarted(tmp_path):
    """A run that is killed ends with the scores of one that was not, and trains no finished teacher again. Its length
    penalty is the one with which fairseq-generate has the highest BLEU on the validation set."""
    cl.write_corpus(tmp_path, {"train": 400, "valid": 32, "test": 32})
    grid = write_grid(tmp_path, block(["same"], ["hkd-t"], [1]))
    study, moved = tmp_path / "study", tmp_path / "moved"
    teacher, cell = moved / "teacher/big/seed-0", moved / "same/hkd-t/seed-1"
    whole = start(grid, study)
    wait_for((study / "teacher/big/seed-0/scores.json").exists, whole)
    shutil.copytree(study, moved, ignore=shutil.ignore_patterns("same"))  # where a study lies does not matter
    before = stamps(teacher)
    killed = start(grid, moved)
    log = cell / "train.log"
    wait_for(lambda: log.exists() and "begin training epoch 4" in log.read_text(), killed)
    os.killpg(killed.pid, signal.SIGKILL)  # the runner and the training
    killed.communicate()
    assert not (cell / "scores.json").exists()

    output = finish(start(grid, moved))
    finish(whole)
    (resumed,) = re.findall(r"Loaded checkpoint .* @ (\d+) updates", log.read_text())
    assert 0 < int(resumed) < UPDATES
    expected = json.loads((study / "same/hkd-t/seed-1/scores.json").read_text())
    found = json.loads((cell / "scores.json").read_text())
    assert {**found, "minutes": 0} == {**expected, "minutes": 0}
    assert stamps(teacher) == before
    assert "teacher/big/seed-0: " not in output
    assert found["curve"][-1]["updates"] == UPDATES
    assert 0 < found["teacher_share"] < 1
    assert found["valid_nll_best"] == min(point["valid_nll"] for point in found["curve"])
    assert len((study / "text/train.de").read_text().splitlines()) == 300
    gold = {name: (study / f"text/{name}.en").read_text().splitlines() for name in ("valid", "test")}
    valid = {
        penalty: BLEU().corpus_score(translations(moved, cell, "valid", penalty), [gold["valid"]]).score
        for penalty in LENGTH_PENALTIES
    }
    assert valid[found["lenpen"]] == max(valid.values()) > min(valid.values())
    own = translations(moved, cell, "test", found["lenpen"])
    assert (cell / "translations-lenpen.txt").read_text().splitlines() == own
    bleu = BLEU().corpus_score(own, [gold["test"]])
    assert (found["lenpen_bleu"], found["lenpen_brevity_penalty"]) == (bleu.score, bleu.bp)
    assert json.loads((cell / "cell.json").read_text())["signature"] == (
        f"setting:same|method:hkd-t|size:big|teacher:big|temp:1.5|seed:1|updates:{UPDATES}|precision:fp32|pairs:300|"
        "vocabulary:36"
    )
    # What the folder was made with, it keeps.
    changed = Grid(write_grid(tmp_path, block(["same"], ["hkd-t"], [1]), updates=UPDATES + 1))
    with pytest.raises(UserError, match=rf"seed-0 was made with {UPDATES} and the grid says otherwise now"):
        runner.check(changed.cells(), study)
    with pytest.raises(UserError, match=r"was made with other data .* choose another --dir"):
        runner.prepare(Grid(write_grid(tmp_path, block(["same"], ["base"], [1]), pairs=301)), study, None)


def test_a_cell_is_known_by_its_training_and_search(tmp_path):
    """By whatever program it was scored; another search makes another cell."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["base"], [1]))).cells()
    train, _ = cells[0].commands
    file = tmp_path / cells[0].folder / "cell.json"
    file.parent.mkdir(parents=True)
    refusal = pytest.raises(UserError, match=r"was made with --generate=--beam 3")
    for beam, expected in ((2, contextlib.nullcontext()), (3, refusal)):
        before = f"score.py same/base/seed-1 --data data-bin '--generate=--beam {beam} --max-len-b 20'"
        file.write_text(json.dumps({**cells[0].description(), "commands": [train, before]}))
        with expected:
            runner.check(cells, tmp_path)


def test_a_cell_is_known_by_its_teachers_checkpoint(tmp_path):
    """Students of a teacher that was trained again since are not mixed with those of the new one."""
    cell = Grid(write_grid(tmp_path, block(["same"], ["word-kd"], [1]))).cells()[-1]
    teacher = tmp_path / cell.train[cell.train.index("--teacher-path") + 1]
    teacher.parent.mkdir(parents=True)
    (tmp_path / cell.folder).mkdir(parents=True)
    teacher.write_text("old")
    about = {**cell.description(), "teachers": runner.hashes_of_teachers(cell, tmp_path)}
    (tmp_path / cell.folder / "cell.json").write_text(json.dumps(about))
    runner.check([cell], tmp_path)
    teacher.write_text("new")
    with pytest.raises(
        UserError, match=r"word-kd/seed-1 was made by another teacher/big/seed-0/checkpoint_best\.pt than"
    ):
        runner.check([cell], tmp_path)


@pytest.mark.parametrize(
    ("search", "beam"), [("--beam 4", "4"), ("--lenpen 1 --beam=10", "10"), ("--max-len-a 1.2", "5")]
)
def test_beam_of_a_search(search, beam):
    assert beam_of(search) == beam


def test_what_is_run_next(tmp_path):
    """A student waits for its teacher; what is finished, being worked on or failed is left alone."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["hkd-t", "base"], [1]))).cells()
    assert [cell.folder for cell in cells] == ["teacher/big/seed-0", "same/hkd-t/seed-1", "same/base/seed-1"]
    work = runner.Runner(cells, tmp_path, jobs=2)

    def next_cell() -> tuple[str | None, bool]:
        cell, lock = work.next()
        locks.append(lock)  # as long as it is open the cell is being worked on
        return cell and cell.folder, lock is not None

    def finish_cell(folder: str) -> None:
        (tmp_path / folder / "scores.json").write_text(json.dumps(numbers(20, 0.1, 1)))

    locks: list = []
    assert next_cell() == ("teacher/big/seed-0", True)
    assert next_cell() == ("same/base/seed-1", True)
    assert next_cell() == ("teacher/big/seed-0", False)  # to wait for
    finish_cell("teacher/big/seed-0")
    finish_cell("same/base/seed-1")
    assert next_cell() == ("same/hkd-t/seed-1", True)
    finish_cell("same/hkd-t/seed-1")
    assert next_cell() == (None, False)
    # A seed more: its own cell only.
    work.cells = Grid(write_grid(tmp_path, block(["same"], ["hkd-t"], [1, 2]))).cells()
    assert next_cell() == ("same/hkd-t/seed-2", True)
    work.failed.add("same/hkd-t/seed-2")
    assert next_cell() == (None, False)


def test_cells(tmp_path):
    """Each once, teachers before their students, seed by seed; the command holds the method's options."""
    methods = ["base", "hkd-t", "annealing"]
    added = '[methods.hkd-t]\noptions = "--gate-on argmax"\n[generation]'
    blocks = [
        block(["same", "compression"], methods, [1, 2]),
        block(["same"], ["hkd-t"], [1], "temperatures = [1.5, 2]"),
    ]
    file = write_grid(tmp_path, *blocks)
    longer = "[settings.compression]\nupdates = 320"
    file.write_text(file.read_text().replace("[generation]", added).replace("[settings.compression]", longer))
    cells = Grid(file).cells()
    assert [cell.folder for cell in cells] == [
        "same/base/seed-1", "teacher/big/seed-0", "same/hkd-t/seed-1", "same/annealing/seed-1",
        "compression/base/seed-1", "compression/hkd-t/seed-1", "compression/annealing/seed-1",
        "same/base/seed-2", "same/hkd-t/seed-2", "same/annealing/seed-2",
        "compression/base/seed-2", "compression/hkd-t/seed-2", "compression/annealing/seed-2",
        "same/hkd-t-tau-2/seed-1",
    ]  # fmt: skip
    by_folder = {cell.folder: cell for cell in cells}
    train = " ".join(by_folder["compression/hkd-t/seed-2"].train)
    teacher = "--teacher-path teacher/big/seed-0/checkpoint_best.pt --gate token --gate-on argmax"
    for part in (f"{teacher} --teacher-temperature 1.5", "--encoder-embed-dim 16", "--seed 2", "--max-update 320"):
        assert part in train
    # A setting's own updates, or the study's.
    assert {cell.updates for cell in cells if cell.setting == "compression"} == {320}
    assert {cell.updates for cell in cells if cell.setting != "compression"} == {UPDATES}
    assert "--teacher-temperature 2" in " ".join(by_folder["same/hkd-t-tau-2/seed-1"].train)
    # A method's own temperature is not the study's, and Base has none.
    assert " ".join(by_folder["same/annealing/seed-1"].train).count("--teacher-temperature ") == 1
    assert by_folder["same/annealing/seed-1"].temperature is None
    assert by_folder["same/base/seed-1"].temperature is None
    assert "--teacher" not in " ".join(by_folder["same/base/seed-1"].train)


def test_precision_in_place_of_the_grids(tmp_path, monkeypatch, capsys):
    """The same grid on another device: cells say it, and fp16 is refused where no training could begin."""
    file = write_grid(tmp_path, block(["same"], ["base"], [1]))
    (cell,) = Grid(file, "bf16").cells()
    assert "--bf16" in cell.train
    assert "|precision:bf16|" in cell.signature
    (cell,) = Grid(file).cells()
    assert "--bf16" not in cell.train
    assert "|precision:fp32|" in cell.signature
    if torch.cuda.is_available():
        pytest.skip("fp16 is refused on a machine without a GPU")
    monkeypatch.setattr(sys, "argv", ["run.py", str(file), "--precision", "fp16", "--dir", str(tmp_path / "study")])
    assert runner.main() == 1
    assert capsys.readouterr().err.strip().endswith("precision fp16 needs a GPU; give --precision fp32 or bf16")
    assert not (tmp_path / "study").exists()


def test_cells_of_translations(tmp_path, monkeypatch):
    """Their data are the teacher's, made once for all of them by commands that hgkd takes."""
    methods = ["seq-kd", "seq-kd+hkd-t", "seq-inter"]
    cells = {cell.method: cell for cell in Grid(write_grid(tmp_path, block(["same"], methods, [1]))).cells()}
    assert list(cells) == ["base", *methods]
    folder = "teacher/big/seed-0"
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(parents=True)
    for method, select in zip(methods, ("best", "best", "bleu"), strict=True):
        cell = cells[method]
        assert cell.teachers == (folder,)
        assert cell.train[0] == f"{folder}/data-bin-{select}"
        assert cell.score[0] == "data-bin"
        assert "--teacher-path" not in cell.train or method == "seq-kd+hkd-t"
        translate, distil = (cli.parser().parse_args(words) for words in (cell.translate, cell.distil))
        assert (translate.output, distil.folder) == (f"{folder}/translations",) * 2
        assert (translate.nbest, translate.beam, distil.select) == (2, 2, select)
        assert (distil.data, distil.output) == (translate.data, cell.train[0])
    assert cells["base"].making == []
    assert len(cells["seq-kd"].making) == 2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", None),
        ("[generation]", "[generate]", r"has no section \[generation\]"),
        ('precision = "fp32"', 'precision = "fp8"', "precision 'fp8': it must be one of fp32, bf16, fp16"),
        ("updates = ", "epochs = ", "lacks 'updates'; multi30k.toml shows where it belongs"),
        ('text = "', 'words = "', r"\[data\] needs either corpus"),
        ('["base"]', '["bass"]', "names bass, which is none of the methods: base, "),
        ('method = "base"', 'method = "hkd-t"', r"\[teacher\] method hkd-t needs a teacher itself"),
        ("[data]", "[data", "is no TOML"),
        ("[generation]", "[methods.bass]\n[generation]", "names bass, which is none of the methods: base, "),
        ("seeds = [1]", "seeds = 1", r"cells\[0\].seeds is not a list"),
        ("seeds = [1]", "seeds = [true]", r"cells\[0\].seeds\[0\] is not a whole number"),
        ("seeds = [1]", "seeds = [-1]", r"cells\[0\].seeds\[0\] is not from 0 to"),
        ("[[cells]]", "[cells]", "is no TOML|cells is not a list"),
        ("pairs = 300", "pairs = 0", "data.pairs is not from 1 to"),
        ("vocabulary = 36", 'vocabulary = "36"', "data.vocabulary is not a whole number"),
        ("updates = 150", "updates = 1.5", "training.updates is not a whole number"),
        ('precision = "fp32"', "precision = []", "training.precision is not text"),
        ('"--beam 2', "\"--beam '2", "generation.options is no list of options: No closing quotation"),
        ('"--beam 2', '"--beam \\u0000', "generation.options is not text"),
        ("same", "../../x", r"is no TOML"),
        ('"same"', '"../../x"', r"names \.\./\.\./x, which is none of the settings"),
        ("[settings.same]", '[settings."../../x"]', r"settings\.\.\./\.\./x\]: it becomes a folder's name"),
        ("[settings.same]", "[settings.teacher]", "it becomes a folder's name"),
        ("[sizes.big]", '[sizes."a/b"]', "it becomes a folder's name"),
        ('teacher = "big"', 'teacher = "."', r"names \., which is none of the sizes"),
        ("seeds = [1]", "seeds = [1]\ntemperatures = [nan]", r"temperatures\[0\] is not a number"),
        ("seeds = [1]", "seeds = [1]\ntemperatures = [0]", r"temperatures\[0\] is not from 0.01 to 100"),
        ("seeds = [1]", "seeds = [1]\ntemperatures = [1.2000001]", "temperatures 1.2000001: give at most 6 digits"),
        ("seeds = [1]", 'seeds = [1]\ntemperatures = ["hot"]', r"temperatures\[0\] is not a number"),
        (
            "[generation]",
            '[teachers.x]\nsize = "big"\ncheckpoint = "first"\n[generation]',
            'is neither "best" nor "last"',
        ),
        ("updates = 150", 'updates = 150\ncheckpoints = ["worst"]', 'is none of "best", "best-bleu", "last"'),
        ("[generation]", '[methods.x]\nof = "y"\n[generation]', "names y, which is none of the methods"),
        (
            "vocabulary = 36",
            'vocabulary = 36\nlike = "x"',
            r"\[data\] needs either vocabulary, a number of pieces, or like",
        ),
        ("vocabulary = 36", "", r"\[data\] needs either vocabulary, a number of pieces, or like"),
        (
            "[generation]",
            "[teachers.x]\nseeds = [1]\n[generation]",
            r"\[teachers.x\] needs size, of one to train, or path alone",
        ),
        (
            "[generation]",
            '[teachers.x]\npath = "y"\nupdates = 3\n[generation]',
            r"\[teachers.x\] needs size, of one to train, or path alone, a checkpoint to take",
        ),
        ("[data]", "x = " + "[" * 5000, "is no TOML"),
        ("pairs = 300", "pairs = " + "9" * 5000, "is no TOML"),
    ],
)
def test_grids_that_make_no_study(old, new, expected, tmp_path):
    file = write_grid(tmp_path, block(["same"], ["base"], [1]), block(["same"], ["hkd-t"], [1]))
    file.write_text(file.read_text().replace(old, new))
    if expected is None:
        assert len(Grid(file).cells()) == 3
    else:
        with pytest.raises(UserError, match=expected):
            Grid(file).cells()


OWN = """
[teachers.late]
size = "big"
checkpoint = "last"
[teachers.long]
size = "big"
updates = 900
[teachers.longest]
size = "big"
updates = 900
seeds = [0, 5]
checkpoint = "last"
[settings.late]
teacher = "late"
student = "small"
[settings.long]
teacher = "long"
student = "small"
[settings.longest]
teacher = "longest"
student = "small"
[methods.mine]
of = "word-kd"
options = "--kd-weight 0.25"
"""


def test_teachers_temperatures_and_methods_of_a_grids_own(tmp_path):
    cells = block(["late", "long", "longest"], ["mine", "annealing"], [3], 'temperatures = ["auto", 1.5]')
    file = write_grid(tmp_path, cells)
    text = file.read_text().replace("[[cells]]", OWN + "[[cells]]", 1)
    file.write_text(text.replace("updates = 150", 'updates = 150\ncheckpoints = ["best", "best-bleu"]'))
    cells = {cell.folder: cell for cell in Grid(file).cells()}
    teachers = ["teacher/big/seed-0", "teacher/long/seed-0", "teacher/long/seed-5"]
    assert [name for name in cells if name.startswith("teacher/")] == teachers
    # Its temperature is its own: one cell of each setting.
    assert [name for name in cells if "annealing" in name] == [
        f"{it}/annealing/seed-3" for it in ("late", "long", "longest")
    ]
    late, longest = cells["late/mine-tau-auto/seed-3"], cells["longest/mine/seed-3"]
    assert late.title == "mine"
    assert late.teachers == ("teacher/big/seed-0",)
    words = " ".join(late.train)
    assert (
        "--teacher-path teacher/big/seed-0/checkpoint_last.pt --gate always --kd-weight 0.5 --kd-weight 0.25" in words
    )
    assert "--teacher-temperature auto" in words
    assert words.count("--teacher-temperature") == 1
    assert "--no-epoch-checkpoints" not in words
    assert late.score[-4:] == ["--checkpoint", "best-bleu", "--checkpoint", "best"]
    assert longest.teachers == ("teacher/long/seed-0", "teacher/long/seed-5")
    both = "teacher/long/seed-0/checkpoint_last.pt:teacher/long/seed-5/checkpoint_last.pt"
    assert both in longest.train
    assert "--teacher-temperature 1.5" in " ".join(longest.train)
    assert "--max-update 900" in " ".join(cells["teacher/long/seed-5"].train)
    assert "--no-epoch-checkpoints" in cells["teacher/long/seed-5"].train
    assert longest.description()["teacher"] == "teacher/long/seed-0:teacher/long/seed-5"


@pytest.mark.parametrize("grid", sorted((cl.ROOT / "scripts" / "study").glob("*.toml")), ids=lambda file: file.stem)
def test_every_grid_is_a_study(grid):
    cells = Grid(grid).cells()
    assert len({cell.folder for cell in cells}) == len(cells) > 0
    assert all(teacher in {cell.folder for cell in cells} for cell in cells for teacher in cell.teachers)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"bleu": NaN}', "cut", "nan", "text"])
def test_a_file_of_scores_alone_proves_nothing(content, tmp_path):
    """Cut short, empty or of something else: the cell is not finished, and scored again."""
    cell = Grid(write_grid(tmp_path, block(["same"], ["base"], [1]))).cells()[0]
    file = tmp_path / cell.folder / "scores.json"
    file.parent.mkdir(parents=True)
    whole = json.dumps(numbers(20, 0.1, 1))
    file.write_text(whole)
    assert runner.finished(cell, tmp_path)
    changed = {"cut": whole[:-9], "nan": whole.replace("4.0", "NaN"), "text": whole.replace("4.0", '"4.0"')}
    file.write_text(changed.get(content, content))
    assert not runner.finished(cell, tmp_path)


def test_a_cell_that_fails_somehow(tmp_path, capsys):
    """Its error is no UserError: the others go on, what needs it fails too, and so does the whole."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["hkd-t"], [1]))).cells()
    (tmp_path / "teacher/big/seed-0/train.log").mkdir(parents=True)
    assert not runner.Runner(cells, tmp_path, jobs=1).run()
    said = capsys.readouterr().out
    assert "teacher/big/seed-0: " in said
    assert "train.log: Is a directory" in said
    assert "same/hkd-t/seed-1: cannot be trained without teacher/big/seed-0" in said


def test_a_cell_that_another_run_has_begun_otherwise(tmp_path):
    """Two runs share the folder, and the grid is changed between their starts, before the cell is begun."""
    old, new = [
        runner.Runner(Grid(write_grid(tmp_path, block(["same"], ["hkd-t"], [1]), updates=updates)).cells(), tmp_path, 1)
        for updates in (UPDATES, UPDATES + 1)
    ]
    cell = tmp_path / old.cells[1].folder
    old.stopped.set()
    with runner.claim(cell) as lock:
        old.make(old.cells[1], lock)  # it is killed after this
        before = (cell / "cell.json").read_text()
        with pytest.raises(UserError, match=f"{cell} was made with {UPDATES} and"):
            new.make(new.cells[1], lock)
    assert (cell / "cell.json").read_text() == before
    new.failed.update(cell.folder for cell in new.cells)
    with pytest.raises(UserError, match=f"{cell} was made with"):
        new.run()


@pytest.mark.parametrize("teacher", ["same", "another"])
def test_translations_that_another_run_has_made_meanwhile(teacher, tmp_path, monkeypatch):
    """They are used if they were made with the same options and teacher."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["seq-kd"], [1]))).cells()
    made, lock = runner.Runner(cells, tmp_path, jobs=1), runner.claim
    cell = cells[-1]
    path = tmp_path / cell.translate[cell.translate.index("--teacher-path") + 1]
    path.parent.mkdir(parents=True)
    path.write_text("one")
    digest = files.sha256(path) if teacher == "same" else "0" * 64

    def make_and_lock(folder: Path):
        data = tmp_path / cell.train[0]
        data.mkdir(parents=True)
        wanted = {"translate": cell.translate, "distil": cell.distil, "teachers": [digest]}
        data.with_name(f"{data.name}.json").write_text(json.dumps(wanted))
        return lock(folder)

    monkeypatch.setattr(runner, "claim", make_and_lock)
    monkeypatch.setattr(made, "status", lambda *_: pytest.fail("made again"))
    if teacher == "same":
        made.distil(cell)
    else:
        with pytest.raises(UserError, match="was made with other options or another teacher"):
            made.distil(cell)


def test_a_training_that_begins_while_the_run_is_interrupted(tmp_path):
    """The interrupt comes when its process is not among those to end yet."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["hkd-t"], [1]))).cells()
    stopped = runner.Runner(cells, tmp_path, jobs=1)
    stopped.stopped.set()
    with runner.claim(tmp_path / "cell") as lock, open(tmp_path / "log", "w") as output:
        assert stopped.status(["sleep", cl.TIMEOUT_S], output, lock) == -signal.SIGTERM
    assert not stopped.children


def test_an_interrupted_run_begins_nothing_more(tmp_path, capsys):
    """Neither a training nor its scores, nor the data that it needs."""
    cells = Grid(write_grid(tmp_path, block(["same"], ["seq-kd"], [1]))).cells()
    stopped = runner.Runner(cells, tmp_path, jobs=1)
    stopped.stopped.set()
    for cell in cells:
        (tmp_path / cell.folder).mkdir(parents=True)
        with runner.claim(tmp_path / cell.folder) as lock:
            stopped.make(cell, lock)
    assert "training (cell" not in capsys.readouterr().out
    assert not stopped.failed
    assert not list(tmp_path.rglob("*.log"))


def test_a_half_finished_study(tmp_path, monkeypatch, capsys):
    """Of the teacher alone there are tables without figures; what is cut short is named."""
    study = tmp_path / "study"
    write_cell(study, "teacher/big/seed-0", 26, 0.08)
    out = make_tables(tmp_path, study, monkeypatch)
    assert (out / "tables.md").read_text().startswith("Only teachers are finished yet.\n")
    for name, expected in (("cell.json", "is no file of run.py"), ("scores.json", "is no file of")):
        file = study / "teacher/big/seed-0" / name
        whole = file.read_text()
        file.write_text(whole[:-5])
        monkeypatch.setattr(sys, "argv", ["table.py", str(study), "--output", str(tmp_path / "other")])
        capsys.readouterr()
        assert table.main() == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("table.py: error: ")
        assert expected in error
        file.write_text(whole)
    (study / "teacher/big/seed-0/translations.txt").write_text("one line\n")
    with pytest.raises(UserError, match=rf"has 1 lines and .*test\.en {len(REFERENCES)}"):
        table.Study(study)


def test_data(tmp_path, monkeypatch):
    """The first pairs of the training part alone; a held-out subset valid1 where the text has one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"train": 400, "valid": 32, "test": 24, "valid1": 16}
    cl.write_corpus(tmp_path, sizes)
    study = tmp_path / "study"
    study.mkdir()
    runner.prepare(Grid(write_grid(tmp_path, block(["same"], ["base"], [1]), pairs=300)), study, None)
    for split, size in {**sizes, "train": 300}.items():
        for language in ("de", "en"):
            given = (tmp_path / f"{split}.{language}").read_text().splitlines()
            assert (study / f"text/{split}.{language}").read_text().splitlines() == given[:size]
            assert (study / f"data-bin/{split}.de-en.{language}.bin").exists()


def test_a_teacher_that_is_there(tmp_path, monkeypatch):
    """A checkpoint from elsewhere teaches; no cell trains it, and the students' data have its pieces and dictionary."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    cl.write_corpus(tmp_path, {"train": 400, "valid": 32, "test": 24})
    study = tmp_path / "study"
    study.mkdir()
    runner.prepare(Grid(write_grid(tmp_path, block(["same"], ["base"], [1]))), study, None)

    taken = '[teachers.mine]\npath = "mine/best.pt"\n[settings.given]\nteacher = "mine"\nstudent = "small"\n'
    file = write_grid(tmp_path, block(["given"], ["base", "hkd-t", "seq-kd"], [1]))
    text = file.read_text().replace("vocabulary = 36", 'like = "study/data-bin"')
    file.write_text(text.replace("[teacher]", f"{taken}[teacher]", 1))
    base, hkd_t, seq_kd = Grid(file).cells()
    path, copy = tmp_path / "mine" / "best.pt", "teacher/mine/checkpoint.pt"
    assert hkd_t.train[hkd_t.train.index("--teacher-path") + 1] == copy
    assert seq_kd.translate[seq_kd.translate.index("--teacher-path") + 1] == copy
    assert seq_kd.train[0] == "teacher/mine/data-bin-best"
    assert [cell.teachers for cell in (base, hkd_t, seq_kd)] == [(), (), ()]
    assert hkd_t.signature.startswith("setting:given|method:hkd-t|size:small|teacher:mine|temp:1.5|seed:1|")

    complaint = f"run.py: error: {file}: [teachers.mine] path {path}: no such file; name a teacher's checkpoint"
    process = start(file, tmp_path / "other")
    assert process.communicate(timeout=cl.TIMEOUT_S)[0] == f"{complaint}\n"
    assert process.returncode == 1
    assert not (tmp_path / "other").exists()
    path.parent.mkdir()
    path.write_bytes(b"a teacher")
    other = tmp_path / "other"
    other.mkdir()
    for language in ("de", "en"):  # words that the teacher's pieces were not made of
        (tmp_path / f"train.{language}").write_text("Q\n" * 300)
    runner.prepare(Grid(file), other, None)
    for name in ("dict.de.txt", "dict.en.txt", "sentencepiece.model", "test.de-en.en.bin"):
        assert (other / "data-bin" / name).read_bytes() == (study / "data-bin" / name).read_bytes()
    # The study has the teacher now: the file may go, and another one in its place is refused.
    assert (other / copy).read_bytes() == b"a teacher"
    path.unlink()
    runner.check_teachers(Grid(file), other)
    path.write_bytes(b"another teacher")
    with pytest.raises(UserError, match=r"was begun with another teacher than .*best.pt .*; choose another --dir"):
        runner.check_teachers(Grid(file), other)


def test_a_cell_is_worked_on_once(tmp_path):
    """The lock outlives the runner with the training that it started."""
    lock = runner.claim(tmp_path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    try:
        assert runner.claim(tmp_path) is None
        lock.close()
        assert runner.claim(tmp_path) is None
    finally:
        child.kill()
        child.wait()
    assert runner.claim(tmp_path) is not None


REFERENCES = [f"the cat number {i} sat on mat number {i + 1}" for i in range(12)]
NOISE = ["x"] * len(REFERENCES)


def numbers(bleu: float, ece: float, seed: int, share: float = 0.0) -> dict:
    """What a scores.json holds."""
    curve = [{"updates": at, "valid_nll": 4.0, "valid_ece": 0.1, "teacher_share": share} for at in (20, 40)]
    found = {"chrf": 2 * bleu, "nll": 3.0, "inference_ece": 0.2, "temperature": 1.25, "scaled_ece": ece / 4}
    found |= {"scaled_nll": 2.5, "valid_nll_best": 3.5, "valid_nll_last": 4.0, "best_updates": 20, "last_updates": 40}
    found |= {"teacher_share": share, "parameters": 1234, "minutes": 2.0, "curve": curve}
    found["signatures"] = {key: f"{key}|by:hand" for key in ("bleu", "chrf", "ece", "inference_ece")}
    found |= {"brevity_penalty": 0.9, "lenpen": seed + 0.5, "lenpen_bleu": bleu + seed, "lenpen_brevity_penalty": 1}
    return {"bleu": bleu, "ece": ece, **found}


def write_cell(study: Path, folder: str, bleu: float, ece: float, **more) -> None:
    """`more`: translations, those at the cell's own length penalty (lenpen), temperature, whether it is done."""
    translations, lenpen = more.get("translations", NOISE), more.get("lenpen", NOISE)
    temperature, done = more.get("temperature"), more.get("done", True)
    setting, method, _ = folder.split("/")
    seed = int(folder.rpartition("-")[2])
    method = method.partition("-tau-")[0] if setting != "teacher" else "base"
    path = study / folder
    path.mkdir(parents=True)
    about = {"setting": setting, "method": method, "title": methods.table()[method]["title"]}
    about |= {"teacher": "teacher/big/seed-0" if temperature else None, "seed": seed, "temperature": temperature}
    updates = 30 if setting == "teacher" else 40
    signature = f"setting:{setting}|seed:{seed}|updates:{updates}|precision:fp32"
    (path / "cell.json").write_text(json.dumps({**about, "signature": signature}))
    if not done:
        return
    scores = numbers(bleu, ece, seed, share=0.5 if temperature else 0.0)
    (path / "scores.json").write_text(json.dumps(scores))
    (path / "translations.txt").write_text("".join(f"{line}\n" for line in translations))
    (path / "translations-lenpen.txt").write_text("".join(f"{line}\n" for line in lenpen))


def make_tables(folder: Path, study: Path, monkeypatch) -> Path:
    """Run table.py; the folder of what it wrote."""
    (study / "text").mkdir(parents=True, exist_ok=True)
    (study / "text/test.en").write_text("".join(f"{line}\n" for line in REFERENCES))
    monkeypatch.setattr(sys, "argv", ["table.py", str(study), "--output", str(folder / "out")])
    assert table.main() == 0
    return folder / "out"


def test_tables_by_hand(tmp_path, monkeypatch, capsys):
    study = tmp_path / "study"
    write_cell(study, "teacher/big/seed-0", 26, 0.08)
    write_cell(study, "same/base/seed-1", 20, 0.10)
    write_cell(study, "same/base/seed-2", 22, 0.12)
    write_cell(study, "same/hkd-t/seed-1", 23, 0.06, translations=REFERENCES, temperature=1.5)
    write_cell(study, "same/hkd-t/seed-2", 23, 0.06, lenpen=REFERENCES, temperature=1.5)  # else the text of Base
    write_cell(study, "same/random/seed-2", 22.5, 0.09, temperature=1.5)
    scores = study / "same/random/seed-2/scores.json"
    scores.write_text(json.dumps(json.loads(scores.read_text()) | {"nll": 2.75, "scaled_nll": 2.625}))
    write_cell(study, "same/hkd-t-tau-2/seed-1", 25, 0.03, temperature=2.0)
    write_cell(study, "same/hkd-s/seed-1", 0, 0, temperature=1.5, done=False)
    write_cell(study, "same/always/seed-1", 0, 0, temperature=1.5, done=False)
    logged = [
        {"valid_num_updates": "20", "valid_nll_loss": "4.5"},
        {"valid_num_updates": "40", "valid_nll_loss": "nan"},
    ]
    start = "2026-01-31 12:00:00 | INFO | valid | "
    (study / "same/always/seed-1/train.log").write_text("".join(f"{start}{json.dumps(row)}\n" for row in logged))

    out = make_tables(tmp_path, study, monkeypatch)
    lines = (out / "tables.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(lines) if line.startswith("| ")}
    assert rows["teacher"] == "| teacher | 1 | 26.0 | 26.0 | 52.0 | 8.00 | 2.00 | 20.00 | 3.000 |  |  |"
    base = "| Base | 2 | 21.0 ± 1.4 | 22.5 ± 2.1 | 42.0 ± 2.8 | 11.00 ± 1.41 | 2.75 ± 0.35 | 20.00 ± 0.00"
    assert f"{base} | 3.000 ± 0.000 |  |  |" in lines
    assert "| Base + temperature | 2 |  |  |  | 2.75 ± 0.35 |  |  | 2.500 ± 0.000 |  |  |" in lines
    # All right against all wrong: no resample of 1,000 is above the difference, p = 1 / 1001. The same text: p = 1.
    hkd = (
        "| HKD-T | 2 | 23.0 ± 0.0 | 24.5 ± 0.7 | 46.0 ± 0.0 | 6.00 ± 0.00 | 1.50 ± 0.00 | 20.00 ± 0.00 | 3.000 ± 0.000"
    )
    assert f"{hkd} | +2.0 | 0.001, 1.000 |" in lines
    training = "| HKD-T | 3.500 ± 0.000 | 20 ± 0 | 4.000 ± 0.000 | 10.00 ± 0.00 | 0.50 ± 0.00 | 1.25 ± 0.00"
    assert f"{training} | 1,234 | 2.0 ± 0.0 |" in lines
    # HKD-T against its control, on the seed that both have; of HKD-S no cell is finished.
    assert "| NLL minus that of | HKD-T | at own temperatures |" in lines
    assert "| random gate | +0.250 (seed 2) | -0.125 (seed 2) |" in lines
    assert "| BLEU over | HKD-T | p, each seed |" in lines
    assert "| random gate | +0.5 (seed 2) | 1.000 |" in lines
    # The same at the length penalties that the cells chose.
    assert "| HKD-T | 2 | 0.900 ± 0.000 | 1.5, 2.5 | 1.000 ± 0.000 | 24.5 ± 0.7 | +2.0 | 1.000, 0.001 |" in lines
    assert "| BLEU then, over | HKD-T | p, each seed |" in lines
    assert "| random gate | +0.5 (seed 2) | 0.001 |" in lines
    assert [line for line in lines if line.startswith(("| HKD-T | 1.5", "| HKD-T | 2 | 1"))] == [
        "| HKD-T | 1.5 | 1 | 23.0 | 24.0 | 46.0 | 6.00 | 3.000 | 0.50 |",
        "| HKD-T | 2 | 1 | 25.0 | 26.0 | 50.0 | 3.00 | 3.000 | 0.50 |",
    ]
    assert sum(line.startswith("| HKD-T | ") for line in lines) == 5  # one in each of the other tables
    assert lines[-1].startswith(
        "Diverged, and not in the tables: same/always/seed-1, whose NLL on validation is no number"
    )
    assert lines[-1].endswith("from update 40 on.")
    lines = lines[:-2]
    assert "BLEU `bleu|by:hand`" in lines[-3]
    assert "bs:1000" in lines[-3]
    assert lines[2] == "All its cells: `setting:same|updates:40|precision:fp32`."
    assert lines[-3].endswith("All cells, and those teachers that are cells: `precision:fp32`.")
    assert lines[-1] == "Not finished, and not in the tables: same/hkd-s/seed-1."
    # matplotlib writes a text of its figures as a comment too. Base never asks the teacher.
    share, nll = ((out / name).read_text() for name in ("teacher_share.svg", "validation_nll.svg"))
    assert ("<!-- HKD-T -->" in share, "<!-- Base -->" in share) == (True, False)
    assert ("<!-- HKD-T -->" in nll, "<!-- Base -->" in nll) == (True, True)


def test_rows_of_two_temperatures(tmp_path, monkeypatch):
    """Each title says which, and only rows of one temperature are compared; an ensemble has no row of a teacher."""
    study = tmp_path / "study"
    write_cell(study, "teacher/big/seed-0", 26, 0.08)
    write_cell(study, "same/base/seed-1", 20, 0.10)
    write_cell(study, "same/hkd-t/seed-1", 23, 0.06, temperature=1.5)
    write_cell(study, "same/random/seed-1", 22, 0.06, temperature=1.5)
    write_cell(study, "same/word-kd-tau-2/seed-1", 24, 0.06, temperature=2.0)
    for folder in (study / "same").glob("*/seed-1"):
        about = json.loads((folder / "cell.json").read_text())
        if about["teacher"]:
            (folder / "cell.json").write_text(json.dumps(about | {"teacher": f"{about['teacher']}:teacher/big/seed-9"}))
    lines = (make_tables(tmp_path, study, monkeypatch) / "tables.md").read_text().splitlines()
    first = [line.split(" | ")[0][2:] for line in lines[4:] if line.startswith("| ")][:5]
    assert first == ["method", "Base", "Base + temperature", "Word-KD, 0.5; 2", "HKD-T; 1.5"]
    start = lines.index("| BLEU over | HKD-T; 1.5 | p, each seed |")
    assert lines[start + 2 : start + 4] == ["| Word-KD, 0.5; 2 |  |  |", "| random gate; 1.5 | +1.0 | 1.000 |"]
    start = lines.index("| NLL minus that of | HKD-T; 1.5 | at own temperatures |")
    assert lines[start + 2 : start + 4] == ["| Word-KD, 0.5; 2 |  |  |", "| random gate; 1.5 | +0.000 | +0.000 |"]


def test_tables_of_two_checkpoints(tmp_path, monkeypatch):
    """BLEU of the checkpoint with the highest validation BLEU, NLL and ECE of the one with the least NLL."""
    study = tmp_path / "study"
    write_cell(study, "same/base/seed-1", 20, 0.10)
    best_bleu = study / "same/base/seed-1/best-bleu"
    shutil.copytree(study / "same/base/seed-1", best_bleu)
    (best_bleu / "scores.json").write_text(json.dumps(numbers(21.5, 0.14, 1) | {"nll": 3.25}))
    tables = (make_tables(tmp_path, study, monkeypatch) / "tables.md").read_text()
    assert "\n| Base | 1 | 21.5 | 22.5 | 43.0 | 10.00 | 2.50 | 20.00 | 3.000 |  |  |\n" in tables
    rule = "BLEU and chrF of the checkpoint with the highest validation BLEU, the rest, with the ECE of translations, "
    rule += "of that with the least NLL"
    assert f"Mean ± standard deviation over seeds; {rule}; scores on the test set. " in tables
    assert "\n| Base | 20.0 | 21.5 |  | 3.000 | 3.250 |  | 10.00 | 14.00 |  |\n" in tables


def test_a_share_that_no_log_tells(tmp_path, monkeypatch):
    """An empty cell, not one that says 0."""
    study = tmp_path / "study"
    write_cell(study, "same/base/seed-1", 20, 0.10)
    file = study / "same/base/seed-1/scores.json"
    scores = json.loads(file.read_text())
    curve = [{key: value for key, value in point.items() if key != "teacher_share"} for point in scores["curve"]]
    file.write_text(json.dumps({**scores, "teacher_share": None, "curve": curve}))
    tables = (make_tables(tmp_path, study, monkeypatch) / "tables.md").read_text()
    assert "\n| Base | 3.500 | 20 | 4.000 | 10.00 |  | 1.25 | 1,234 | 2.0 |\n" in tables


def test_figures_of_a_single_epoch(tmp_path, monkeypatch):
    study = tmp_path / "study"
    write_cell(study, "same/base/seed-1", 20, 0.10)
    file = study / "same/base/seed-1/scores.json"
    scores = json.loads(file.read_text())
    file.write_text(json.dumps({**scores, "curve": scores["curve"][:1]}))
    assert "<!-- Base -->" in (make_tables(tmp_path, study, monkeypatch) / "validation_nll.svg").read_text()


def test_no_study(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished cell of a study; run\.py makes them"):
        table.Study(tmp_path)


def test_cell_of_an_earlier_score(tmp_path):
    write_cell(tmp_path, "same/base/seed-1", 20, 0.10)
    file = tmp_path / "same/base/seed-1/scores.json"
    scores = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in scores.items() if key != "lenpen"}))
    with pytest.raises(UserError, match=r"same/base/seed-1 was scored by an earlier version; remove its scores\.json"):
        table.Study(tmp_path)
