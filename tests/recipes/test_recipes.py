"""scripts/recipes, run for real: every recipe on a cut-down copy of its data, 20 updates, to a score."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import command_line as cl
import corpora
import pytest
from fairseq.data import Dictionary, indexed_dataset

from hgkd_fairseq.sequence_level import REASONS as SWITCHES

RECIPES = cl.ROOT / "scripts" / "recipes"
UPDATES = 20
# Of the recipe's size, only the architecture's name stays; a short warm-up, so that something is learnt.
SMALL = (*cl.SIZE[2:], "--max-tokens", 512, "--lr", 0.01, "--warmup-updates", 4)
TRIAL = ("--gpus", 0, "--max-update", UPDATES, "--average", 0)
BLEU = r"BLEU\|nrefs:1\|case:{case}\|eff:no\|tok:{tok}\|smooth:exp\|version:\S+ = \d"


@dataclass
class Recipe:
    write: Callable[[Path], dict[str, str] | None]  # its data
    pairs: tuple[int, int, int]  # train, valid, test, after cleaning
    first_source: str  # the first test sentence as the recipe prepares it
    first_target: str
    scores: tuple[tuple[str, str], ...]  # case and tokeniser of each BLEU
    vocabulary: str  # of source and target: "joined" or "separate"
    options: tuple = ()


RECIPE = {
    "iwslt14-de-en": Recipe(
        corpora.iwslt14,
        (220, 10, 20),
        "er sagt : &quot; das ist peter &apos; s fußball-verein . &quot;",
        "he says : &quot; that &apos;s peter &apos;s football-club . &quot;",
        (("mixed", "none"), ("lc", "13a")),
        "separate",
    ),
    "iwslt15-en-vi": Recipe(
        corpora.iwslt15,
        (230, 16, 16),
        "",
        "",
        (("mixed", "none"),),
        "separate",
    ),
    "wmt14-en-de": Recipe(
        corpora.wmt14,
        (231, 16, 16),
        "He says : &quot; That &apos;s Peter &apos;s football @-@ club . &quot;",
        "Er sagt : &quot; Das ist Peter &apos; s Fußball @-@ Verein . &quot;",
        (("mixed", "none"), ("mixed", "13a")),
        "joined",
    ),
    "multi30k-de-en": Recipe(
        corpora.multi30k,
        (230, 16, 16),
        "er sagt : &quot; das ist peter &apos; s fußball-verein . &quot;",
        "he says : &quot; that &apos;s peter &apos;s football-club . &quot;",
        (("mixed", "none"), ("lc", "13a")),
        "joined",
    ),
}
LANGUAGES = {name: name.split("-")[1:] for name in RECIPE}


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    own = ("HGKD_DATA", "HGKD_MULTI30K_URL", "CUDA_VISIBLE_DEVICES")
    kept = {key: value for key, value in os.environ.items() if key not in own}
    path = os.pathsep.join(filter(None, (str(cl.ROOT), os.environ.get("PYTHONPATH"))))  # for the command hgkd
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": path} | (extra or {})


def recipe(name: str, *arguments, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPES / f"{name}.sh"), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(env), capture_output=True, text=True, timeout=cl.TIMEOUT_S, stdin=subprocess.DEVNULL
    )


def original(name: str, folder: Path) -> dict[str, str]:
    """Writes the recipe's data; returns the environment that it needs."""
    folder.mkdir()
    return RECIPE[name].write(folder) or {}


@dataclass
class Trial:
    name: str
    folder: Path
    planned: list[str]  # what --dry-run printed
    output: str

    def lines(self, file: str) -> list[str]:
        return (self.folder / file).read_text(encoding="utf-8").split("\n")[:-1]


def trial(name: str, folder: Path) -> Trial:
    """A whole recipe: Base, but for Multi30K, where a teacher is trained, and HKD-T and Seq-KD learn from it."""
    env = original(name, folder / "from")
    where = ("--dir", folder / "run", "--from", folder / "from", *TRIAL)
    planned = []
    steps = {"base": "scores"}
    if name == "multi30k-de-en":
        steps = {"teacher": "training", "seq-kd": "training", "hkd-t": "scores"}
    for method, step in steps.items():
        # A teacher of 20 updates says the same again and again.
        keep = ("--distil", " ".join(f"--keep {reason}" for reason in SWITCHES)) if method == "seq-kd" else ()
        arguments = (*where, "--method", method, "--until", step, *keep, "--", *SMALL)
        dry = recipe(name, "--dry-run", *arguments, env=env)
        assert dry.returncode == 0, dry.stderr
        planned += dry.stdout.splitlines()
        done = recipe(name, *arguments, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    return Trial(name, folder / "run", planned, done.stdout)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    calls = [lambda name=name: trial(name, tmp_path_factory.mktemp(name)) for name in reversed(RECIPE)]
    return {done.name: done for done in cl.together(*calls)}


@pytest.mark.parametrize("name", RECIPE)
def test_prepares(name: str, trials: dict[str, Trial]):
    run, expected, (source, target) = trials[name], RECIPE[name], LANGUAGES[name]
    for split, pairs in zip(("train", "valid", "test"), expected.pairs, strict=True):
        for language in (source, target):
            assert len(run.lines(f"pieces/{split}.{language}")) == pairs
    for language, first in ((source, expected.first_source), (target, expected.first_target)):
        for split in ("valid", "test"):
            text, pieces = run.lines(f"text/{split}.{language}"), run.lines(f"pieces/{split}.{language}")
            assert [line.replace("@@ ", "") for line in pieces] == text
        assert not first or text[0] == first
    dictionaries = [run.lines(f"data-bin/dict.{language}.txt") for language in (source, target)]
    assert (dictionaries[0] == dictionaries[1]) == (expected.vocabulary == "joined")
    assert not list(run.folder.glob("*.partial"))


@pytest.mark.parametrize("name", RECIPE)
def test_trains_and_scores(name: str, trials: dict[str, Trial]):
    run, expected = trials[name], RECIPE[name]
    student = "hkd-t-1" if name == "multi30k-de-en" else "base-1"
    assert cl.load(run.folder / student / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == UPDATES
    printed = run.output[run.output.index(f"{student}\n") :]
    for line, (case, tok) in zip(printed.splitlines()[1:], expected.scores, strict=False):
        assert re.match(BLEU.format(case=case, tok=tok), line), printed
    assert len(re.findall("^BLEU", printed, flags=re.MULTILINE)) == len(expected.scores)
    # Calibration as it is, and at the temperature that the validation set gives.
    assert len(re.findall(r"^ECE\|bins:20\|mode:forced\|eos:yes\|tok:bpe\|version", printed, re.MULTILINE)) == 1
    assert len(re.findall(r"^ECE\|bins:20\|mode:forced\|eos:yes\|tok:bpe\|temp:", printed, re.MULTILINE)) == 1
    # One hypothesis for each reference, in the corpus' order; fairseq cannot print a piece that training did not hold.
    written = (run.folder / student / "generate-test.txt").read_text(encoding="utf-8").replace("@@ ", "")
    by_number = {int(number): text for number, text in re.findall(r"^T-(\d+)\t(.*)$", written, re.MULTILINE)}
    told = [by_number[i] for i in range(expected.pairs[2])]
    known = [(text, line) for text, line in zip(told, run.lines(f"text/test.{LANGUAGES[name][1]}"), strict=True)
             if "<<unk>>" not in text]  # fmt: skip
    assert len(known) >= len(told) - 1
    assert all(text == line for text, line in known)
    by_number = {int(number): text for number, text in re.findall(r"^H-(\d+)\t\S+\t(.*)$", written, re.MULTILINE)}
    assert [by_number[i] for i in range(expected.pairs[2])] == [
        text.replace(" ##AT##-##AT## ", "-") for text in run.lines(f"{student}/test.hypothesis")
    ]


@pytest.mark.parametrize("name", RECIPE)
def test_dry_run_says_what_runs(name: str, trials: dict[str, Trial]):
    run = trials[name]
    assert run.planned == run.lines("commands")
    programs = [Path(shlex.split(line)[0]).name for line in run.planned]
    assert programs.count("fairseq-train") == (3 if name == "multi30k-de-en" else 1)
    assert programs[0] == "fairseq-preprocess"


def test_a_teacher_is_plain_cross_entropy_and_taught_the_student(trials: dict[str, Trial]):
    run = trials["multi30k-de-en"]
    settings = run.lines("teacher/settings")
    assert settings[settings.index("--gate") + 1] == "none"
    teacher = cl.load(run.folder / "teacher" / "checkpoint_best.pt")["cfg"]
    assert (teacher["criterion"]["label_smoothing"], teacher["criterion"]["confidence_penalty"]) == (0, 0)
    assert teacher["task"]["_name"] == "translation"  # any fairseq loads it
    student = run.lines("hkd-t-1/settings")
    assert student[student.index("--teacher-path") + 1] == str(run.folder / "teacher" / "checkpoint_best.pt")
    assert "teacher_share" in (run.folder / "hkd-t-1" / "train.log").read_text()


def test_goes_on_where_it_was(trials: dict[str, Trial]):
    """All is there: nothing is trained, translated or calibrated again. Other settings are refused, not mixed in."""
    run = trials["multi30k-de-en"]
    before = len(run.lines("commands"))
    where = ("--dir", run.folder, "--method", "hkd-t")
    again = recipe(run.name, *where, *TRIAL, "--", *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stdout == run.output
    programs = [Path(shlex.split(line)[0]).name for line in run.lines("commands")[before:]]
    assert programs == ["hgkd", "sacrebleu", "sacrebleu"]
    assert (run.folder / "hkd-t-1" / "scores").read_text().splitlines()[0] == str(run.folder / "hkd-t-1")  # from files
    for arguments, refused in (
        ((*where, *TRIAL), "hkd-t-1 was begun with other settings"),
        ((*where, *TRIAL, "--precision", "bf16", "--", *SMALL), "hkd-t-1 was begun with other settings"),
        ((*where, "--gpus", 0, "--max-update", 30, "--", *SMALL), "teacher was trained with other settings"),
        ((*where, "--style", "cased"), "holds multi30k-de-en --style paper: choose another --dir"),
    ):
        done = recipe(run.name, *arguments)
        assert done.returncode == 1
        assert refused in done.stderr.splitlines()[-1]


def test_seq_kd_trains_on_the_teachers_translations(trials: dict[str, Trial]):
    run = trials["multi30k-de-en"]
    made, data = run.folder / "data-bin-best", run.folder / "data-bin"
    rows = [line.split("\t") for line in run.lines("translations/shard-00000/translations.tsv")]
    hypotheses = [row[5] for row in rows if row[2] == "0"]
    assert len(hypotheses) == RECIPE[run.name].pairs[0]
    dictionary = Dictionary.load(str(data / "dict.en.txt"))
    sides = {
        side: indexed_dataset.MMapIndexedDataset(str(made / f"train.de-en.{side}")) for side in ("de", "en")
    }  # fmt: skip
    sources = indexed_dataset.MMapIndexedDataset(str(data / "train.de-en.de"))
    assert [dictionary.string(row) for row in sides["en"]] == hypotheses
    assert [row.tolist() for row in sides["de"]] == [row.tolist() for row in sources]
    for name in ("valid.de-en.en.bin", "dict.en.txt"):
        assert (made / name).read_bytes() == (data / name).read_bytes()
    trained_on = shlex.split(next(line for line in run.lines("commands") if "seq-kd-1" in line))
    assert trained_on[1] == str(made)
    refused = recipe(run.name, "--dir", run.folder, *TRIAL, "--method", "seq-kd", "--distil", "--mix-original 1")
    assert refused.returncode == 1
    assert "data-bin-best was made by" in refused.stderr.splitlines()[-1]


def test_a_killed_preparation_restarts_cleanly(trials: dict[str, Trial], tmp_path: Path):
    """Killed in every stage and started again: the same data as of a run that was not killed."""
    name, whole = "iwslt14-de-en", trials["iwslt14-de-en"].folder
    run = tmp_path / "run"
    arguments = ["--dir", run, "--from", whole.parent / "from", "--until", "data", "--gpus", 0]
    command = ["bash", str(RECIPES / f"{name}.sh"), *map(str, arguments)]
    for stage in ("text.partial/tok.de.partial", "text.partial/test.en.partial", "pieces.partial", "data-bin.partial"):
        running = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (run / stage).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        assert (run / stage).exists()
        assert not (run / "data-bin").exists()
    done = recipe(name, *arguments)
    assert done.returncode == 0, done.stderr
    for folder in ("text", "pieces", "data-bin"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (parent / folder).iterdir() if path.name != "preprocess.log"}
            for parent in (run, whole)
        )
        assert ours == theirs


def test_two_at_once_prepare_the_data_once(tmp_path: Path):
    """The second waits for the first and says so; the lock of a run's own folder is no wait."""
    original("iwslt15-en-vi", tmp_path / "from")
    arguments = ("--dir", tmp_path / "run", "--from", tmp_path / "from", "--until", "data", "--gpus", 0)
    done = cl.together(*[lambda: recipe("iwslt15-en-vi", *arguments)] * 2)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    said = "".join(one.stderr for one in done)
    assert len(re.findall(r"waiting: \S+/run is being worked on by process \d+ \(\S+\)", said)) == 1
    assert said.count("train: 230 pairs") == said.count("pieces (log: ") == 1


def test_cased_multi30k(tmp_path: Path):
    """Sentencepiece on the text as it is."""
    env = original("multi30k-de-en", tmp_path / "from") | {"pieces": "150"}
    where = ("--style", "cased", "--dir", tmp_path / "run", "--from", tmp_path / "from", "--gpus", 0)
    done = recipe("multi30k-de-en", *where, "--until", "data", env=env)
    assert done.returncode == 0, done.stderr
    pieces = (tmp_path / "run" / "pieces" / "test.en").read_text(encoding="utf-8").splitlines()
    assert pieces[0].replace(" ", "").replace("\u2581", " ").strip() == corpora.BY_HAND["en"]
    planned = recipe("multi30k-de-en", *where, "--dry-run").stdout
    assert "sacrebleu" in planned
    assert "--tokenize none" not in planned


@pytest.mark.parametrize(
    ("name", "gpus", "tokens", "turns"),
    [
        ("iwslt14-de-en", 1, 4096, 1),
        ("iwslt14-de-en", 4, 1024, 1),
        ("wmt14-en-de", 1, 4096, 8),
        ("wmt14-en-de", 8, 4096, 1),
        ("wmt14-en-de", 3, 3640, 3),  # 3 x 3 x 3,640 = 32,760
    ],
)
def test_any_number_of_gpus_makes_the_same_batch(name: str, gpus: int, tokens: int, turns: int):
    line = next(line for line in planned_lines(name, "--gpus", gpus) if "fairseq-train" in line)
    assert f" --max-tokens {tokens} --update-freq {turns} --distributed-world-size {gpus} --fp16 " in line


def planned_lines(name: str, *arguments) -> list[str]:
    dry = recipe(name, "--dry-run", *arguments)
    assert dry.returncode == 0, dry.stderr
    return dry.stdout.splitlines()


@pytest.mark.parametrize(("gpus", "expected"), [(0, "1"), (1, "unset")])
def test_memory_on_the_cpu(gpus: int, expected: str):
    settings = "files=() title= batch_tokens=4096 gpu_tokens=4096 updates=1 average=0"
    code = f"source {RECIPES}/common.sh; {settings}; options --gpus {gpus}; echo ${{THP_MEM_ALLOC_ENABLE-unset}}"
    done = subprocess.run(["bash", "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_launchers():
    def started(*arguments) -> str:
        return next(line for line in planned_lines("wmt14-en-de", *arguments) if "fairseq-train" in line)

    bin_folder = Path(sys.executable).parent
    assert started("--gpus", 2, "--torchrun").startswith(
        f"{bin_folder}/torchrun --standalone --nproc-per-node 2 --no-python {bin_folder}/fairseq-train "
    )
    nodes = started("--gpus", 8, "--nodes", 2)
    assert nodes.startswith(f"srun --nodes 2 --ntasks 2 --ntasks-per-node 1 {bin_folder}/fairseq-train ")
    assert " --max-tokens 2048 --update-freq 1 --distributed-world-size 16 --distributed-port 29500 --fp16 " in nodes
    assert " --bf16 " in started("--gpus", 1, "--precision", "bf16")
    assert not re.search("--(fp16|bf16)", started("--gpus", 1, "--precision", "fp32"))
    assert " --cpu --bf16 " in started("--gpus", 0, "--precision", "bf16")
    assert not re.search("--(fp16|bf16)", started("--gpus", 0))


def test_every_method_of_the_table_is_one_that_fairseq_knows(capsys):
    """Names and options, against the criterion's and the task's own parsers; what they do is tested with the gates."""
    from fairseq import options

    from hgkd_fairseq import cli, plugin
    from hgkd_fairseq.gates import GATES

    plugin.register()

    def listed(*arguments: str) -> list[str]:
        assert cli.main(["methods", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    rows = [line.split("\t") for line in listed()]
    assert len(rows) > 20
    ours = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
    planned = cl.together(*[lambda name=name: planned_lines("iwslt14-de-en", "--method", name) for name, _, _ in rows])
    for (name, _, given), lines in zip(rows, planned, strict=True):
        words = listed(name, "--teacher", "/some/where & else.pt")
        assert words == [word.replace("TEACHER", "/some/where & else.pt") for word in given.split()]
        assert listed(name) == given.split()
        assert listed(name, "--data") == [
            "best" if name.startswith(("seq-kd", "hybrid")) else "bleu" if name == "seq-inter" else ""
        ]
        arguments = ["data", *ours, "--arch", "transformer_iwslt_de_en", *words]
        args = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
        assert args.gate in GATES
        line = next(line for line in lines if f"{name}-1" in line)
        typed = " ".join(shlex.split(line))
        assert given.replace("TEACHER", str(cl.ROOT / "runs/iwslt14-de-en/teacher/checkpoint_best.pt")) in typed
    assert cli.main(["methods", "hkd"]) == 1
    assert "hkd is no method; known are: base, ls-uniform" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--method", "hkd"], 2, "--method hkd: unknown; known are: teacher base ls-uniform"),
        (["--methods"], 2, "unknown argument --methods: see --help"),
        (["--seed"], 2, "--seed needs a value"),
        (["--seed", "one"], 2, "--seed one: needs a whole number"),
        (["--from", "{empty}"], 2, "--from {empty}: lacks dev.tgz: it must hold training-parallel-europarl-v7.tgz"),
        (["--from", "{empty}/no"], 2, "--from {empty}/no: no such folder"),
        (["--teacher", "{empty}/no.pt"], 2, "--teacher {empty}/no.pt: no such file"),
        (["--style", "paper"], 2, "--style: this recipe has no styles"),
        (["--precision", "half"], 2, "--precision half: must be fp16, bf16 or fp32"),
        (["--gpus", "0", "--precision", "fp16"], 2, "--precision fp16: needs a GPU; give bf16 or fp32"),
        (["--dir", "{empty}/x:y"], 2, "--dir {empty}/x:y: fairseq takes a ':' for the end of a path; choose a folder"),
        (["--until", "train"], 2, "--until train: must be data, training or scores"),
        (["--average", "11"], 2, "--average 11: the last 10 epochs are kept; give at most 10"),
        (["--gpus", "128"], 2, "--gpus 128: too many for updates of 32768 tokens: give at most 64"),
        (["--gpus", "2", "--nodes", "2"], 2, "--nodes 2: works in a Slurm job only: see slurm.sh"),
        (["--gpus", "2", "--nodes", "2", "--torchrun"], 2, "--torchrun: works on one machine"),
    ],
)
def test_one_error_message(arguments: list[str], status: int, expected: str, tmp_path: Path):
    corpora.wmt14(tmp_path)
    (tmp_path / "dev.tgz").unlink()
    run = tmp_path / "run"
    done = recipe("wmt14-en-de", "--dir", run, *(word.format(empty=tmp_path) for word in arguments))
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"wmt14-en-de.sh: {expected.format(empty=tmp_path)}")
    assert not run.exists()


def test_a_damaged_archive_is_named(tmp_path: Path):
    original("iwslt14-de-en", tmp_path / "from")
    archive = tmp_path / "from" / "de-en.tgz"
    archive.write_bytes(archive.read_bytes()[:-500])
    done = recipe("iwslt14-de-en", "--dir", tmp_path / "run", "--from", tmp_path / "from", "--until", "data")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (f"iwslt14-de-en.sh: {archive} is no archive that holds de-en: get it anew")


def test_a_slurm_job_is_queued_again(tmp_path: Path):
    """Slurm's signal goes to the shell alone, which waits for all that it started."""
    folder = tmp_path / "scripts" / "recipes"
    folder.mkdir(parents=True)
    training = "(trap 'sleep 0.5; echo saved >saved; exit 75' USR1; echo >ready; while :; do sleep 0.05; done)"
    (folder / "long.sh").write_text(f"{training}\necho scored\n")
    (folder / "short.sh").write_text('echo "$@"; exit 3\n')
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\ncat saved; echo "scontrol $*"\n')
    scontrol.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "8"}
    command = ["bash", str(RECIPES / "slurm.sh")]
    with subprocess.Popen([*command, "long"], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as job:
        while job.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.communicate(timeout=20)[0] == "saved\nscontrol requeue 7\n"
    assert job.returncode == 0
    short = subprocess.run([*command, "short", "--seed", "2"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (short.returncode, short.stdout) == (3, "--nodes 1 --gpus 8 --seed 2\n")
