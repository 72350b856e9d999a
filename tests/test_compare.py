"""hgkd compare: what it refuses, before anything is translated. What it measures is tested with the export."""

import command_line as cl
import pytest

from hgkd_fairseq import cli, compare


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        (["{tmp}/folder"], [], "name at least one fairseq checkpoint beside the CTranslate2 folders"),
        (["{tmp}/none.pt"], [], "none.pt does not exist; name a fairseq checkpoint"),
        (["{model}", "{tmp}/folder"], [], "folder is no model of CTranslate2 ("),
        (["{model}"], ["--gen-subset", "dev"], "there is no subset dev in "),
        (["{model}"], ["--reference", "{tmp}/none.en"], "none.en does not exist; name a text file"),
        (["{model}"], ["--reference", "{tmp}/two.en"], "two.en has 2 lines and subset test 64 sentences"),
    ],
)
def test_refused(models, options, expected, data, plain: cl.Run, tmp_path, capsys, monkeypatch):
    if "CTranslate2 (" in expected:
        pytest.importorskip("ctranslate2")
    (tmp_path / "folder").mkdir()
    (tmp_path / "two.en").write_text("one\ntwo\n")
    monkeypatch.setattr(compare, "translate_all", lambda *_: pytest.fail("translated"))
    known = {"tmp": tmp_path, "model": plain.path("checkpoint_best.pt")}
    arguments = [word.format(**known) for word in [*models, *options]]
    assert cli.main(["compare", str(data), *arguments, "--cpu"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: "))
    assert expected in line
