"""Tests of fairseq's commands with the plugin's patches: checkpoints of fairseq and of the plugin load, those that hold
code do not."""

import os
import pickle
import sys
import time
from argparse import Namespace
from pathlib import Path

import command_line as cl
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, utils
from fairseq import trainer as fairseq_trainer
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from processes import full_disk

from hgkd_fairseq import plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import checkpoints

SOURCE = "w1 w2 w3\nw4 w5\n"


@pytest.fixture(scope="module", params=["plain, tracked by loss", "plain, tracked by BLEU", "ours, teacher deleted"])
def uses(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return (run, resumed, generated, validated, interactive), a run and uses of its checkpoint with --user-dir."""
    fixture = {
        "plain, tracked by loss": "plain",
        "plain, tracked by BLEU": "teacher",
        "ours, teacher deleted": "student",
    }
    run: cl.Run = request.getfixturevalue(fixture[request.param])
    best = run.path("checkpoint_best.pt")
    folder = tmp_path_factory.mktemp("resumed")
    teacher: cl.Run = request.getfixturevalue("teacher")
    options = {
        "plain": ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1, "--max-epoch", 4),
        "teacher": ("--criterion", "cross_entropy", "--max-tokens", 400, "--max-epoch", 31, *cl.BEST_BLEU),
        "student": cl.distil(teacher.path(), "--max-epoch", 7, *cl.BEST_BLEU),
    }[fixture[request.param]]
    restore = ("--restore-file", run.path(), *cl.KEEP_LAST)
    common = (data, *cl.USER_DIR, "--path", best, "--cpu")
    validate = ("--task", "translation", "--max-tokens", 4000)
    if run.folder.name.startswith("student"):
        validate = (*validate, "--criterion", "hard_gate_kd", "--gate", "none")
    return run, *cl.together(
        lambda: cl.train(data, folder, *options, *cl.USER_DIR, *restore),
        lambda: cl.fairseq("generate", *common, "--beam", 2, "--gen-subset", "valid", "--scoring", "sacrebleu"),
        lambda: cl.fairseq("validate", *common, "--log-format", "json", *validate),
        lambda: cl.fairseq("interactive", *common, "--beam", 2, stdin=SOURCE),
    )


def test_checkpoint_resumes(uses):
    run, resumed, *_ = uses
    before, after = (r.state()["optimizer_history"][-1]["num_updates"] for r in (run, resumed))
    per_epoch = before // int(run.result.logs("train")[-1]["epoch"])
    assert after == before + per_epoch
    assert f"Loaded checkpoint {run.path()}" in resumed.result.output
    assert resumed.result.logs("train")[0]["epoch"] == run.result.logs("train")[-1]["epoch"] + 1


def test_checkpoint_generates(uses):
    _, _, generated, _, _ = uses
    assert generated.code == 0, generated.end()
    assert len(generated.hypotheses()) == 64
    assert "BLEU = " in generated.output


def test_validation_bleu_is_that_of_the_model_itself(uses):
    """BLEU by --eval-bleu at the best epoch equals that of fairseq-generate for the same checkpoint: the sequence
    generator of the task holds the student, not the teacher."""
    run, _, generated, _, _ = uses
    if "bleu" not in run.result.logs("valid")[-1]:
        assert run.folder.name.startswith("plain")
        return
    best = max(row["bleu"] for row in run.result.logs("valid"))
    found = float(generated.output.rsplit("BLEU = ", 1)[1].split()[0])
    assert found == pytest.approx(best, abs=0.0051)
    if run.folder.name.startswith("student"):
        assert best < 5
    else:
        assert best > 20


def test_checkpoint_validates(uses):
    run, _, _, validated, _ = uses
    assert validated.code == 0, validated.end()
    (found,) = validated.logs("valid")
    # The training log has the same number for the epoch of the best checkpoint.
    name = "loss" if run.folder.name.startswith("teacher") else "nll_loss"
    assert found[name] in [pytest.approx(row[name], abs=0.0011) for row in run.result.logs("valid")]


def test_checkpoint_answers_interactively(uses):
    *_, interactive = uses
    assert interactive.code == 0, interactive.end()
    assert len(interactive.hypotheses()) == 2


class Code:
    """Unpickling an instance runs a command."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def refused(plain: cl.Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, cl.Result], Path]:
    """Return the results of using malicious and truncated checkpoints, and the file that their code would create."""
    folder = tmp_path_factory.mktemp("refused")
    file, malicious, half = folder / "code_has_run", folder / "malicious.pt", folder / "half.pt"
    torch.save({**plain.state(), "extra": Code(file)}, malicious)
    half.write_bytes(plain.path().read_bytes()[: plain.path().stat().st_size // 2])
    train = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", folder, "--max-epoch", 1)
    options = plain.state()
    options["cfg"]["model"].encoder_xformers_att_config = f"open({str(file)!r}, 'w')"
    torch.save(options, folder / "options.pt")
    interactive = (data, *cl.USER_DIR, "--path", folder / "options.pt", "--cpu")
    old = folder / "malicious_in_the_old_format.pt"
    torch.save({**plain.state(), "extra": Code(file)}, old, _use_new_zipfile_serialization=False)
    calls = {
        "--teacher-path": ("train", *train, *cl.distil(malicious)),
        "--path": ("generate", data, *cl.USER_DIR, "--path", malicious, "--cpu"),
        "--restore-file": ("train", *train, *cl.USER_DIR, "--restore-file", malicious),
        "old format": ("train", *train, *cl.distil(old)),
        "options, generate": ("generate", *interactive),
        "options, validate": ("validate", *interactive, "--task", "translation", "--max-tokens", 4000),
        "options, interactive": ("interactive", *interactive),
        "half": ("train", *train, *cl.distil(half)),
        "half, --path": ("generate", data, *cl.USER_DIR, "--path", half, "--cpu"),
    }
    results = cl.together(*[lambda call=call: cl.fairseq(*call) for call in calls.values()])
    return dict(zip(calls, results, strict=True)), file


@pytest.mark.parametrize("use", ["--teacher-path", "--path", "--restore-file", "old format"])
def test_code_in_a_checkpoint_is_refused(use: str, refused):
    results, file = refused
    cl.one_error_message(results[use], ["malicious", "refused", f"wants to import {os.system.__module__}.system"])
    assert not file.exists()


def test_the_malicious_checkpoint_is_one(plain: cl.Run, tmp_path: Path):
    """The code in the checkpoints of the tests above does run when it is unpickled without protection."""
    file = tmp_path / "code_has_run"
    pickle.loads(pickle.dumps(Code(file)))
    assert file.exists()


@pytest.mark.parametrize("use", ["generate", "validate", "interactive"])
def test_code_in_options_is_refused(use: str, refused):
    results, file = refused
    cl.one_error_message(
        results[f"options, {use}"], ["options.pt", "is no Python literal, and fairseq would run it as code"]
    )
    assert not file.exists()


@pytest.mark.parametrize("use", ["half", "half, --path"])
def test_half_a_checkpoint_is_one_error_message(use: str, refused):
    cl.one_error_message(refused[0][use], ["half.pt cannot be read: it is cut short or damaged"])


@pytest.mark.parametrize("run", ["plain", "teacher", "student"])
def test_options_are_all_that_torch_must_allow(run: str, request: pytest.FixtureRequest):
    """With only argparse.Namespace allowed, torch >= 2.6 loads plain fairseq's checkpoints and the plugin's, the latter
    also after validation with calibration and BLEU; plain fairseq's with --eval-bleu hold arrays and do not load."""
    file = request.getfixturevalue(run).path()
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([Namespace]):
            if run == "teacher":
                with pytest.raises(pickle.UnpicklingError, match=r"numpy\.?_?core"):
                    torch.load(file, weights_only=True)
            else:
                state = torch.load(file, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    if run == "student":
        names = {name for _, name, *_ in state["extra_state"]["metrics"]["valid"]}
        assert {"_calibration", "_bleu_counts"} <= names


def test_no_variable_lets_code_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, the usual workaround for fairseq under torch 2.6, is removed with a warning."""
    from hgkd_fairseq.plugin import compat

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    compat.allow_fairseq_options()
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no effect" in caplog.text


def test_a_copied_checkpoint_takes_its_place_in_one_step(tmp_path: Path):
    """If fairseq's copy to checkpoint_last.pt cannot be finished, the file that was there before stays intact."""
    plugin.register()
    new, last = tmp_path / "new.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(bytes(range(250)) * 40)
    last.write_bytes(b"old")
    with full_disk(4000), pytest.raises(UserError, match=r"checkpoint_last\.pt cannot be written: File too large"):
        PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_last.pt", "new.pt"]
    PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == new.read_bytes()


def test_a_full_disk_keeps_the_checkpoint_that_is_there(tmp_path: Path):
    """A failed save keeps the previous checkpoint and ends with one error; a temporary file that a killed process left
    is overwritten. (fairseq alone waits 5 s, appends a second attempt to the first and ends in call stacks.)"""
    plugin.register()
    last = tmp_path / "checkpoint_last.pt"
    state = {"model": {"a": torch.ones(5000)}, "extra_state": {}}
    last.write_bytes(b"old")
    (tmp_path / "checkpoint_last.pt.tmp").write_bytes(b"half of one")
    with full_disk(4000), pytest.raises(UserError, match=r"checkpoint_last\.pt cannot be written: File too large"):
        checkpoint_utils.torch_persistent_save(state, str(last))
    assert last.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]
    (tmp_path / "checkpoint_last.pt.tmp").write_bytes(b"half of one")
    checkpoint_utils.torch_persistent_save(state, str(last))
    assert torch.equal(torch.load(last, weights_only=True)["model"]["a"], torch.ones(5000))
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]


def test_a_clock_that_is_set_changes_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that is set back or forward by days does not change the training time that --stop-time-hours counts, and
    a negative time in a checkpoint of plain fairseq is read as 0."""
    plugin.register()
    for moved in (-1e6, 1e6):
        trainer = Trainer.__new__(Trainer)
        trainer._start_time, trainer._previous_training_time = fairseq_trainer.time.time() - 5, 60
        now = time.time()
        monkeypatch.setattr(time, "time", lambda then=now + moved: then)
        assert trainer._local_cumulative_training_time() == pytest.approx(65, abs=1)
        monkeypatch.undo()
    state = {"args": Namespace(), "model": {}, "optimizer_history": [{"num_updates": 3}], "extra_state": {}}
    assert checkpoints.Checkpoint("a.pt", {**state, "extra_state": {"previous_training_time": -9.0}}).seconds == 0


def test_a_checkpoint_is_saved_without_arrays(tmp_path: Path):
    """Arrays, as which fairseq logs n-gram counts, are saved as tensors, so that torch loads them with weights_only."""
    plugin.register()
    counts = {"metrics": [np.arange(4), np.float64(2.5)]}
    checkpoint_utils.torch_persistent_save({"model": {}, "extra_state": counts}, str(tmp_path / "a.pt"))
    found = torch.load(tmp_path / "a.pt", weights_only=True)["extra_state"]["metrics"]
    assert torch.equal(found[0], torch.arange(4))
    assert found[1] == 2.5
    assert type(counts["metrics"][0]) is np.ndarray


def test_torch_loads_what_fairseq_saves(tmp_path: Path):
    """torch.load with weights_only accepts fairseq's options, a Namespace, as CTranslate2's converter needs it to, also
    after the plugin's loader has read a checkpoint."""
    plugin.register()
    torch.save({"args": Namespace(arch="lstm")}, tmp_path / "a.pt")
    for _ in range(2):
        assert torch.load(tmp_path / "a.pt", weights_only=True)["args"].arch == "lstm"
        checkpoints.read(Path(__file__).parent / "fairseq_runs" / "version_0_1_0" / "teacher.pt")


def test_a_colon_in_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fairseq's own commands accept existing files whose names contain ':', as the plugin's commands do."""
    plugin.register()
    monkeypatch.chdir(tmp_path)
    Path("a:b").touch()
    assert utils.split_paths("a:b:c") == ["a:b", "c"]


def test_patches_are_applied_once():
    from hgkd_fairseq.plugin import compat

    compat.apply()
    patched = checkpoint_utils.load_checkpoint_to_cpu
    hook = sys.excepthook
    compat.apply()
    assert checkpoint_utils.load_checkpoint_to_cpu is patched
    assert sys.excepthook is hook


def test_another_fairseq_is_left_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from hgkd_fairseq.plugin import compat

    monkeypatch.setattr(compat, "APPLIED", {})  # written_for() adds to it, for `hgkd doctor`

    def unknown():
        return 1

    assert compat.written_for(unknown, "return 1", "nothing") is True
    assert caplog.messages == []
    assert compat.written_for(unknown, "return 2", "bf16 means something else") is False
    (message,) = caplog.messages
    assert "unknown differs" in message
    assert "bf16 means something else" in message
    assert compat.written_for(unknown, "return 1", "nothing") is True
    (applied,) = compat.APPLIED.values()
    assert applied is False  # one of the patches of this function is missing
