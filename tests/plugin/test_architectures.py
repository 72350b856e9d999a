"""Tests of a teacher whose architecture is registered by another plugin."""

import subprocess
import sys
from pathlib import Path

import command_line as cl
import pytest

REGISTERED = """
from fairseq.models import register_model_architecture
from fairseq.models.transformer import base_architecture

@register_model_architecture("transformer", "transformer_of_others")
def of_others(args):
    args.encoder_layers = args.decoder_layers = 1
    args.encoder_embed_dim = args.decoder_embed_dim = args.encoder_ffn_embed_dim = args.decoder_ffn_embed_dim = 32
    args.encoder_attention_heads = args.decoder_attention_heads = 2
    base_architecture(args)
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the plugin `others`, and the plugin `both`, which imports `others` and this package."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, content in (("others", "from . import models_of_others"), ("both", "import others, hgkd_fairseq.tasks")):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(content)
    (folder / "others" / "models_of_others.py").write_text(REGISTERED)
    return folder


@pytest.fixture(scope="module")
def taught(data: Path, plugins: Path) -> cl.Run:
    short = ("--max-update", 6, *cl.KEEP_LAST)
    own = ("--arch", "transformer_of_others")
    return cl.train(data, plugins / "teacher", *short, "--user-dir", plugins / "others", size=own)


def hgkd(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hgkd_fairseq.cli", *map(str, words)]
    return subprocess.run(command, env=cl.environment(), capture_output=True, text=True, check=False)


def test_training(taught: cl.Run, plugins: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", f"{plugins}:{cl.ROOT}")
    run = cl.train(data, tmp_path, *cl.distil(taught.path()), "--user-dir", plugins / "both", "--max-update", 6)
    (log,) = run.result.logs("train")
    assert 0 < log["teacher_share"] < 1


def test_commands(taught: cl.Run, plugins: Path, data: Path, tmp_path: Path):
    usual = ("calibration", "temperature", data, "--path", taught.path(), "--cpu")
    unknown = hgkd(*usual)
    assert unknown.returncode == 1
    assert "has the architecture 'transformer_of_others', which this fairseq does not know; give the plugin" in (
        unknown.stderr
    )
    done = hgkd(*usual, "--user-dir", plugins / "others")
    assert done.returncode == 0, done.stderr
    assert "temperature" in done.stdout


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is no plugin: it has no __init__.py; name the folder for fairseq-train"),
        ("import of_nobody", "cannot be imported: ModuleNotFoundError: No module named 'of_nobody'"),
    ],
)
def test_what_is_no_plugin(content: str | None, complaint: str, data: Path, tmp_path: Path):
    folder = tmp_path / "plugin_of_nobody"
    folder.mkdir()
    if content:
        (folder / "__init__.py").write_text(content)
    done = hgkd("translate", data, "--teacher-path", "x.pt", "--output", tmp_path / "set", "--user-dir", folder)
    assert done.returncode == 1
    assert done.stderr.strip() == f"hgkd: error: --user-dir {folder} {complaint}"
