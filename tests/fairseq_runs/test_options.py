"""Options that cannot be used are refused with one error message each, before training and without a traceback."""

import json
import shutil
from pathlib import Path

import command_line as cl
import pytest


@pytest.fixture(scope="module")
def data_with_another_dictionary(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return copies of the data with another target dictionary: one more type ("size") or a renamed one ("symbol")."""
    folders = {}
    for name in ("size", "symbol"):
        folder = tmp_path_factory.mktemp(name) / "bin"
        shutil.copytree(data, folder)
        file = folder / "dict.en.txt"
        lines = file.read_text().splitlines()
        if name == "size":
            lines.append("one_more 1")
        else:
            lines[2] = f"renamed {lines[2].split()[1]}"
        file.write_text("".join(f"{line}\n" for line in lines))
        folders[name] = folder
    return folders


# name: (options, parts of the message); TEACHER and FOLDER are replaced by paths
CASES = {
    "unknown gate": (["--gate", "tokens"], ["--gate", 'unknown gate "tokens"', "known gates: always", "sentence"]),
    "temperature 0": (["--teacher-temperature", 0], ["--teacher-temperature 0:", "must be above 0"]),
    "label smoothing 1": (["--label-smoothing", 1], ["--label-smoothing 1.0", "below 1"]),
    "no teacher": (["--teacher-path", ""], ["give --teacher-path CHECKPOINT"]),
    "missing teacher": (["--teacher-path", "nowhere.pt"], ["--teacher-path names nowhere.pt, which does not exist"]),
    "plain task": (["--task", "translation"], ["TranslationTask", "add --task translation_with_teacher"]),
    "overrides that are no dict": (["--teacher-model-overrides", "data=x"], ["'data=x' is not a dict"]),
    "ensemble with a missing member": (["--teacher-path", "TEACHER:gone.pt"], ["gone.pt, which does not exist"]),
    "nothing to fine-tune": (["--finetune-from-model", "gone.pt"], ["--finetune-from-model gone.pt does not exist"]),
    "another architecture to go on from": (
        ["--restore-file", "TEACHER", "--reset-optimizer", "--encoder-layers", 2],
        ["cannot go on from", "Cannot load model parameters", "give the options of the run that wrote it"],
    ),
    "no such subset": (
        ["--valid-subset", "valid,test9"],
        ["there is no subset test9 in ", "name another with --valid"],
    ),
    "no such training data": (
        ["--train-subset", "tr"],
        ["there is no subset tr in ", "name another with --train-subset"],
    ),
    "teacher for another criterion": (
        ["--criterion", "cross_entropy"],
        ["--teacher-path: nothing is distilled without --criterion hard_gate_kd; add it, or drop --teacher-path"],
    ),
    "teacher of frequencies for another criterion": (
        ["--criterion", "cross_entropy", "--teacher-path", "", "--teacher-source", "unigram"],
        ["--teacher-source unigram: nothing is distilled without --criterion hard_gate_kd"],
    ),
    "several pairs and another criterion": (
        [
            *("--task", "translation_multi_simple_epoch_with_teacher", "--lang-pairs", "de-en"),
            *("--criterion", "cross_entropy"),
        ],
        ["--teacher-path: nothing is distilled without --criterion hard_gate_kd"],
    ),
    "on-policy, too seldom": (
        ["--on-policy-share", 0.5, "--on-policy-every", 4, "--max-epoch", 3],
        ["--on-policy-every 4: the training ends before, at --max-epoch 3"],
    ),
    "weights that are never learned": (
        ["--gate", "instance", "--max-epoch", 9],
        ["--refresh-interval 10: the training ends before, at --max-epoch 9, so that no weight is ever learned"],
    ),
    "worst checkpoint": (
        ["--eval-bleu", "--best-checkpoint-metric", "bleu"],
        ["--best-checkpoint-metric bleu: ", "add --maximize-best-checkpoint-metric"],
    ),
    "folder for a teacher": (["--teacher-path", "FOLDER"], ["is a folder, not a checkpoint"]),
}


@pytest.fixture(scope="module")
def refusals(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Result]:
    folder = tmp_path_factory.mktemp("refusals")

    def start(options) -> cl.Result:
        texts = {"TEACHER": str(teacher.path()), "FOLDER": str(teacher.folder)}
        filled = []
        for option in map(str, options):
            for name, text in texts.items():
                option = option.replace(name, text)
            filled.append(option)
        arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", folder, "--max-update", 1)
        if "translation" in filled:  # this task does not know --teacher-path
            return cl.fairseq("train", *arguments, *cl.USER_DIR, "--criterion", "hard_gate_kd", *filled)
        return cl.fairseq("train", *arguments, *cl.distil(teacher.path()), *filled)

    results = cl.together(*[lambda options=options: start(options) for options, _ in CASES.values()])
    return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_wrong_option_is_one_error_message(case: str, refusals: dict[str, cl.Result]):
    cl.one_error_message(refusals[case], CASES[case][1])


def test_one_error_message_under_hydra(data: Path, tmp_path: Path):
    """fairseq-hydra-train, too, shows the error message without a traceback."""
    sections = {
        "common": {"user_dir": cl.USER_DIR[1], "cpu": True},
        "task": {"_name": "translation_with_teacher", "data": str(data), "source_lang": "de", "target_lang": "en"},
        "criterion": {"_name": "hard_gate_kd"},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "dataset": {"max_tokens": 400, "num_workers": 0},
        "checkpoint": {"save_dir": str(tmp_path / "run")},
        "model": {"_name": "transformer_iwslt_de_en", "encoder_layers": 1, "decoder_layers": 1},
    }
    (tmp_path / "kd.yaml").write_text("# @package _group_\n" + json.dumps(sections))
    options = ("--config-dir", tmp_path, "--config-name", "kd", f"hydra.run.dir={tmp_path / 'out'}")
    cl.one_error_message(cl.console_script("hydra-train", *options), ["give --teacher-path CHECKPOINT"])


def test_dictionaries_are_compared(
    data: Path, data_with_another_dictionary: dict[str, Path], teacher: cl.Run, tmp_path: Path
):
    """A teacher whose dictionary differs is refused; for one whose data folder has moved the message names an option,
    with which it can be used."""
    moved = tmp_path / "moved.pt"
    state = teacher.state()
    state["cfg"]["task"]["data"] = str(tmp_path / "no_longer_here")
    cl.torch.save(state, moved)
    usual = (
        *cl.SIZE,
        *cl.STEPS,
        *cl.LOGS,
        "--share-decoder-input-output-embed",
        "--save-dir",
        tmp_path / "s",
        "--max-update",
        1,
    )
    overrides = ("--teacher-model-overrides", f"{{'data': '{data}'}}", "--no-save")
    size, symbol, gone, given = cl.together(
        *[
            lambda folder=folder, options=options: cl.fairseq("train", folder, *usual, *options)
            for folder, options in (
                (data_with_another_dictionary["size"], cl.distil(teacher.path())),
                (data_with_another_dictionary["symbol"], cl.distil(teacher.path())),
                (data, cl.distil(moved)),
                (data, cl.distil(moved, *overrides)),
            )
        ]
    )
    types = len((data / "dict.en.txt").read_text().splitlines()) + 4  # bos, pad, eos, unk come with every dictionary
    cl.one_error_message(size, ["target dictionaries", f"teacher's has {types} types, the student's {types + 1}"])
    cl.one_error_message(
        symbol, ["target dictionaries", "type 6 of the student's, 'renamed', is none of the teacher's"]
    )
    cl.one_error_message(gone, ["folder of the dictionaries", "no_longer_here", "--teacher-model-overrides"])
    assert given.code == 0, given.end()
    assert given.logs("train")[-1]["teacher_share"] > 0
