"""A teacher's translations and the training data made of them: what fairseq-generate would give, whoever was killed,
and nothing that was damaged or has moved is trained on."""

import json
import math
import os
import shutil
import sys
from array import array
from pathlib import Path

import command_line as cl
import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, indexed_dataset
from processes import content, fill_and_kill, full_disk, start

from hgkd_fairseq import cli, methods, sequence_level
from hgkd_fairseq.data import distilled, translations
from hgkd_fairseq.data.filters import CODES, SWITCHES, Filters, loops
from hgkd_fairseq.data.shards import MANIFEST
from hgkd_fairseq.data.translations import Hypothesis, hash_of
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced, selection
from hgkd_fairseq.evaluation.backward import BackwardModel
from hgkd_fairseq.evaluation.distil_data import translated_data
from hgkd_fairseq.evaluation.sampling import SeededSampling, uniform
from hgkd_fairseq.evaluation.translate import CTranslate2Engine
from hgkd_fairseq.files import sha256

SEARCH = ("--beam", 4, "--max-len-b", 12, "--lenpen", 0.6)
SHARDS = ("--shard-size", 100, "--nbest", 2)


def hgkd(*words) -> int:
    return cli.main([str(word) for word in words])


def command(data: Path, teacher: Path, folder: Path, *more) -> tuple:
    return ("translate", data, "--teacher-path", teacher, "--output", folder, "--cpu", *SEARCH, *SHARDS, *more)


def translate(data: Path, teacher: Path, folder: Path, *more) -> int:
    return hgkd(*command(data, teacher, folder, *more))


def distil(folder: Path, data: Path, output: Path, *more) -> int:
    return hgkd("distil-data", folder, data, "--output", output, "--cpu", *more)


@pytest.fixture(scope="module")
def path(teacher: cl.Run) -> Path:
    return teacher.path("checkpoint_best.pt")


@pytest.fixture(scope="module")
def translated(data: Path, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training set, in six shards, two translations a sentence."""
    folder = tmp_path_factory.mktemp("translated") / "set"
    assert translate(data, path, folder) == 0
    return folder


@pytest.fixture
def own(translated: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(translated, tmp_path / "set"))


def read(folder: Path) -> list[translations.Translated]:
    return list(translations.read(translations.opened(str(folder))))


def backward_of(path: Path, folder: Path) -> Path:
    """The same model, said to translate the other way: the dictionaries are the same ones."""
    state = cl.load(path)
    state["cfg"]["task"] |= {"source_lang": "en", "target_lang": "de"}
    torch.save(state, folder / "backward.pt")
    return folder / "backward.pt"


def error(capsys) -> str:
    """The one line of a command that failed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: ")]
    assert len(lines) == 1
    return lines[0]


# Translating


@pytest.fixture(scope="module")
def runs(data: Path, path: Path, translated: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    """fairseq-generate of the validation set, and a training on the translations by the same teacher, side by side."""
    folder = tmp_path_factory.mktemp("runs")
    assert distil(translated, data, folder / "bin", "--select", "bleu") == 0
    hybrid = methods.options("hybrid", str(path))
    words = (data, "--path", path, "--gen-subset", "valid", *SEARCH, "--nbest", 2, "--cpu", *cl.USER_DIR)
    return cl.together(
        lambda: cl.fairseq("generate", *words, "--required-batch-size-multiple", 1),
        lambda: cl.train(folder / "bin", folder / "run", *cl.distil(path, *hybrid, "--max-update", 2)),
    )


def test_translations_are_those_of_fairseq_generate(runs: list, data: Path, path: Path, tmp_path: Path):
    """Of the validation set: both rank alike, with the same scores."""
    assert translate(data, path, tmp_path / "set", "--subset", "valid", "--shard-size", 25) == 0
    result = runs[0]
    expected: dict[int, list[tuple[float, str]]] = {}
    for line in result.output.splitlines():
        if line.startswith("H-"):
            number, score, text = line[2:].split("\t")
            expected.setdefault(int(number), []).append((float(score) * math.log(2), text))
    found = read(tmp_path / "set")
    assert [one.number for one in found] == sorted(expected) == list(range(64))
    for one in found:
        assert [" ".join(each.pieces) for each in one.hypotheses] == [text for _, text in expected[one.number]]
        assert [each.score for each in one.hypotheses] == pytest.approx([s for s, _ in expected[one.number]], abs=2e-4)


def test_killed_five_times_by_two_processes(data: Path, path: Path, tmp_path: Path):
    assert translate(data, path, tmp_path / "unbroken", "--beam", 10) == 0
    fill_and_kill(tmp_path / "set", lambda: start(*command(data, path, tmp_path / "set", "--beam", 10)))
    assert content(tmp_path / "set") == content(tmp_path / "unbroken")


def test_a_full_disk(data: Path, path: Path, tmp_path: Path, capsys):
    """Nothing unfinished is left, and the next run goes on."""
    folder = tmp_path / "set"
    with full_disk(4000):
        assert translate(data, path, folder, "--beam", 10) == 1
    assert "File too large" in error(capsys)
    assert [file.name for file in folder.iterdir()] == [MANIFEST]
    assert translate(data, path, folder, "--beam", 10) == 0
    assert len(read(folder)) == 600


@pytest.mark.parametrize("option", [{"truncate_source": True, "max_source_positions": 6}, {"num_batch_buckets": 2}])
def test_a_teacher_that_reads_other_sources_than_the_data_hold(
    option: dict, data: Path, path: Path, tmp_path: Path, capsys
):
    """Truncated, or padded to the length of a bucket; the translations are still those of the data's sentences."""
    state = cl.load(path)
    state["cfg"]["task"] |= option
    torch.save(state, tmp_path / "teacher.pt")
    words = ("--beam", 1, "--nbest", 1, "--shard-size", 600)
    assert translate(data, tmp_path / "teacher.pt", tmp_path / "set", *words) == 0, capsys.readouterr().err
    assert all(one.hypotheses for one in read(tmp_path / "set"))
    assert distil(tmp_path / "set", data, tmp_path / "bin") == 0, capsys.readouterr().err


def test_another_teacher_or_search_is_refused(own: Path, plain: cl.Run, path: Path, data: Path, capsys):
    assert translate(data, plain.path(), own) == 1
    assert f"{own} was made with another teacher (" in error(capsys)
    assert translate(data, path, own, "--lenpen", 0.5) == 1
    assert "another decoding.lenpen (0.6, now 0.5)" in error(capsys)
    assert translate(data, path, own, "--subset", "valid") == 1
    assert "another subset (" in error(capsys)


@pytest.mark.parametrize("engine", ["fairseq", "ctranslate2"])
def test_a_teacher_that_is_replaced_while_it_is_loaded(
    engine: str, data: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Nothing is translated by a model that the manifest does not name, and no folder is made."""
    if engine == "ctranslate2":
        pytest.importorskip("ctranslate2")
    place = (forced, "load") if engine == "fairseq" else (CTranslate2Engine, "__init__")
    teacher, load = tmp_path / "teacher.pt", getattr(*place)
    shutil.copy(path, teacher)

    def load_and_replace(*words, **more):
        found = load(*words, **more)
        torch.save(cl.load(path) | {"extra_state": {}}, teacher)
        return found

    monkeypatch.setattr(*place, load_and_replace)
    assert translate(data, teacher, tmp_path / "set", "--engine", engine) == 1
    assert f"{teacher} was replaced or removed while it was loaded; wait" in error(capsys)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("none.pt", "none.pt does not exist; name a fairseq"), (".", "is a folder, not a checkpoint")]
)
def test_a_teacher_that_is_none(name: str, message: str, data: Path, tmp_path: Path, capsys):
    assert translate(data, tmp_path / name, tmp_path / "set") == 1
    assert message in error(capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--nbest", 5), "--nbest 5 is more than --beam 4"),
        (("--sampling-topk", 5), "are of --sampling"),
        (("--engine", "ctranslate2", "--sampling"), "--sampling needs --engine fairseq"),
        (("--quantization", "int8"), "--quantization is of --engine ctranslate2"),
        (("--dtype", "fp16"), "--dtype fp16 needs a GPU"),
        (("--max-len-b", 0), "leave no room for a translation"),
        (("--seed", 2), "--seed is of --sampling; add it, or drop --seed"),
        (("--subset", "none"), "name another with --subset"),
        (("--sampling",), "--beam 4 is of a search, and --sampling draws --nbest translations; drop it"),
    ],
)
def test_options_that_do_not_go_together(more, message, data: Path, path: Path, tmp_path: Path, capsys):
    assert translate(data, path, tmp_path / "set", *more) == 1
    assert message in error(capsys)
    assert not (tmp_path / "set").exists()


def test_an_ensemble_of_both_directions(data: Path, path: Path, tmp_path: Path, capsys):
    """The dictionaries are the same ones; the mean of both would be no distribution of either."""
    other = backward_of(path, tmp_path)
    assert translate(data, f"{path}:{other}", tmp_path / "set") == 1
    assert f"{other} was trained on en-de and not on de-en; name one that was" in error(capsys)
    assert hgkd("calibration", "forced", data, "--path", f"{other}:{path}", "--cpu") == 1
    assert f"{path} was trained on de-en and not on en-de" in error(capsys)
    assert not (tmp_path / "set").exists()


def test_without_ctranslate2(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Told before the teacher is looked at."""
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert translate(data, tmp_path / "gone.pt", tmp_path / "set", "--engine", "ctranslate2") == 1
    assert "needs CTranslate2: pip install 'hgkd-fairseq[export]'" in error(capsys)


def test_parts_of_a_set(data: Path, path: Path, translated: Path, tmp_path: Path, capsys):
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            translate(data, path, tmp_path / "set", "--shard", wrong)
        assert f"{wrong} is no part I/N, with I from 1 to N" in capsys.readouterr().err
    for part in ("2/2", "1/2"):
        assert translate(data, path, tmp_path / "set", "--shard", part) == 0
    assert content(tmp_path / "set") == content(translated)


def test_samples_depend_on_seed_and_sentence_alone(data: Path, path: Path, tmp_path: Path):
    """Not on shards and batches; scores may differ by a rounding."""
    found = {}
    for name, more in {
        "one": ("--shard-size", 40, "--max-tokens", 100), "other": ("--shard-size", 64), "seed": ("--seed", 2),
    }.items():  # fmt: skip
        words = ("--subset", "valid", "--max-len-b", 12, *SHARDS, "--sampling", "--sampling-topk", 5, *more)
        assert hgkd("translate", data, "--teacher-path", path, "--output", tmp_path / name, "--cpu", *words) == 0
        found[name] = [[each.pieces for each in one.hypotheses] for one in read(tmp_path / name)]
    assert found["one"] == found["other"]
    assert sum(one != other for one, other in zip(found["one"], found["seed"], strict=True)) > 32
    assert sum(first != second for first, second in found["one"]) > 20


def test_sampling_draws_what_it_should():
    """In proportion to the probabilities, of the top k or the smallest set of probability p."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.1])
    sentences = torch.arange(4000)
    lprobs = probability.log().expand(4000, 2, 4)

    def shares(**options) -> list[float]:
        search = SeededSampling(Dictionary(), 1, **options)
        scores, types, beams = search.step(0, lprobs.clone(), torch.zeros(4000, 2, 0), None, sentences)
        assert torch.equal(scores, lprobs.gather(2, types[..., None]).squeeze(2))
        assert beams.tolist() == [[0, 1]] * 4000
        return (types.flatten().bincount(minlength=4) / types.numel()).tolist()

    assert shares() == pytest.approx(probability.tolist(), abs=0.02)
    assert shares(topk=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.02)
    assert shares(topp=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.02)
    assert shares(topp=0.8) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0], abs=0.02)
    drawn = torch.cat([uniform(1, sentences[:, None], step, torch.arange(2)).flatten() for step in range(3)])
    assert drawn.unique().numel() > 0.999 * drawn.numel()
    assert 0 < drawn.min() < 0.001 < 0.999 < drawn.max() < 1


def test_ctranslate2(data: Path, path: Path, tmp_path: Path):
    """In float32 it finds what fairseq finds, with the same scores but where the length limit cuts it off: fairseq adds
    the end of sentence there, CTranslate2 does not."""
    pytest.importorskip("ctranslate2")
    found = {}
    for engine in ("fairseq", "ctranslate2"):
        assert translate(data, path, tmp_path / engine, "--subset", "valid", "--engine", engine) == 0
        found[engine] = [one.hypotheses[0] for one in read(tmp_path / engine)]
    pairs = [pair for pair in zip(*found.values(), strict=True) if not pair[0].limit]
    assert len(pairs) > 32
    same = [(one.score, other.score) for one, other in pairs if one.pieces == other.pieces]
    assert len(same) > 0.9 * len(pairs)
    assert [one for one, _ in same] == pytest.approx([other for _, other in same], abs=5e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_on_a_gpu(dtype: str, data: Path, path: Path, translated: Path, tmp_path: Path):
    """In each precision it finds what the CPU finds, but where hypotheses are nearly alike."""
    words = ("--teacher-path", path, "--output", tmp_path / "set", *SEARCH, *SHARDS, "--dtype", dtype)
    assert hgkd("translate", data, *words) == 0
    pairs = zip(read(tmp_path / "set"), read(translated), strict=True)
    same = sum(one.hypotheses[0].pieces == other.hypotheses[0].pieces for one, other in pairs)
    assert same > (590 if dtype == "fp32" else 500)


# Training data


def sides(folder: Path) -> list[indexed_dataset.MMapIndexedDataset]:
    return [indexed_dataset.MMapIndexedDataset(str(folder / f"train.de-en.{language}")) for language in ("de", "en")]


def test_training_data(data: Path, translated: Path, tmp_path: Path, capsys):
    """Each row has the source of its sentence, and its reference or its translation; the other subsets are copied."""
    output = tmp_path / "bin"
    assert distil(translated, data, output, "--mix-original", 0.25, "--worst-score", 0.1) == 0
    table = capsys.readouterr().out
    before, after = sides(data), sides(output)
    found = {one.number: one.hypotheses for one in read(translated)}
    dictionary = Dictionary.load(str(data / "dict.en.txt"))
    rows = [line.split("\t") for line in (output / "sentences.tsv").read_text().splitlines()[1:]]
    assert len(rows) == len(after[0]) == len(after[1])
    for place, (row, number, origin, rank) in enumerate(rows):
        assert int(row) == place
        assert torch.equal(after[0][place], before[0][int(number)])
        target = after[1][place]
        if origin == "reference":
            assert torch.equal(target, before[1][int(number)])
        else:
            assert rank == "0"
            assert [dictionary[index] for index in target[:-1]] == found[int(number)][0].pieces
            assert target[-1] == dictionary.eos()
    assert sum(row[2] == "reference" for row in rows) == 150
    dropped = dict(line.split("\t") for line in (output / "dropped.tsv").read_text().splitlines()[1:])
    kept = [int(row[1]) for row in rows if row[2] == "translation"]
    assert sorted([*kept, *map(int, dropped)]) == list(range(600))
    others = [number for number in range(600) if dropped.get(str(number)) in (None, "score")]
    by_score = sorted(others, key=lambda number: (found[number][0].score, number))
    worst = sorted(int(number) for number, reason in dropped.items() if reason == "score")
    assert worst == sorted(by_score[: int(0.1 * len(others))])
    for name in ("valid", "test"):
        for file in data.glob(f"{name}.*"):
            assert (output / file.name).read_bytes() == file.read_bytes()
    assert table == (output / "summary.md").read_text()
    assert f"| score | {len(worst)} | among those of the worst scores |" in table
    assert f"{len(rows)} rows, 150 of them references" in table
    record = json.loads((output / "distilled.json").read_text())
    assert record["files"] == {file.name: sha256(file) for file in output.iterdir() if file.name != "distilled.json"}


def test_training_on_it_with_the_same_teacher(runs: list):
    """The hybrid: a gate that is learned, whose mean value is logged, between the two terms of a translation."""
    assert "Traceback" not in runs[1].result.output
    assert 0 < runs[1].result.logs("train")[-1]["teacher_share"] < 1
    assert runs[1].state()["criterion"]["learned_gate.sharpness"] != 1


def test_selection(translated: Path, data: Path, tmp_path: Path, capsys):
    """The hypothesis nearest to the reference, and that of the highest score of others."""
    near = [Hypothesis(text.split(), 0.0, False) for text in ("a b c d", "a b c e f", "e f")]
    for metric in ("bleu", "chrf"):
        assert selection.make(metric, lambda _: ["a", "b", "c", "e", "f"])(0, near) == 1
    counts = [len(one.hypotheses) for one in read(translated)]
    ranks = np.random.default_rng(1).integers(0, 2, 600)
    assert set(counts) == {2}
    scores = tmp_path / "scores"
    scores.write_text("".join(f"{int(rank == best)}\n" for best in ranks for rank in range(2)))
    assert distil(translated, data, tmp_path / "bin", "--select", f"scores:{scores}") == 0
    rows = [line.split("\t") for line in (tmp_path / "bin" / "sentences.tsv").read_text().splitlines()[1:]]
    assert all(int(rank) == ranks[int(number)] for _, number, _, rank in rows)
    for text, message in (
        (scores.read_text() + "1\n", "has a line 1201 and there are only 1200 hypotheses"),
        (scores.read_text()[:-2], "it ends too early"),
        (scores.read_text().replace("1", "x", 1), "is no number"),
    ):
        scores.write_text(text)
        capsys.readouterr()
        assert distil(translated, data, tmp_path / "other", "--select", f"scores:{scores}") == 1
        assert message in error(capsys)
        assert not (tmp_path / "other").exists()
        scores.write_text("".join(f"{int(rank == best)}\n" for best in ranks for rank in range(2)))


@pytest.mark.parametrize(
    ("reason", "option"),
    [
        ("ratio", ("--length-ratio", "0.5,2")),
        ("long", ("--max-pieces", 1)),
        ("loop", ("--max-repeats", 2)),
        ("score", ("--worst-score", 0.5)),
        ("backward", ("--backward-path", "none.pt")),
    ],
)
def test_a_filter_that_is_off_is_not_tuned(reason, option, own: Path, data: Path, tmp_path: Path, capsys):
    assert distil(own, data, tmp_path / "bin", "--keep", reason, *option) == 1
    assert f"{option[0]} is of what --keep {reason} does not drop for; drop one of them" in error(capsys)


def test_selection_needs_several_translations(data: Path, path: Path, own: Path, tmp_path: Path, capsys):
    """And a share of the worst by a backward model needs that model."""
    (tmp_path / "scores").write_text("1\n" * 600)
    assert distil(own, data, tmp_path / "bin", "--worst-backward", 0.5) == 1
    assert "--worst-backward is of the model of --backward-path; give it, or drop" in error(capsys)
    assert translate(data, path, tmp_path / "one", "--nbest", 1, "--beam", 1) == 0
    for select in ("bleu", "chrf", f"scores:{tmp_path / 'scores'}"):
        capsys.readouterr()
        assert distil(tmp_path / "one", data, tmp_path / "bin", "--select", select) == 1
        assert f"--select {select} chooses among several translations" in (message := error(capsys))
        assert "translate with --nbest 5" in message
    assert not (tmp_path / "bin").exists()
    assert distil(tmp_path / "one", data, tmp_path / "bin") == 0


LONG = " ".join(f"p{i}" for i in range(151))


@pytest.mark.parametrize(
    ("source", "translation", "limit", "reason"),
    [
        ("a b c", "x y z", False, None),
        ("a b c", "", False, "empty"),
        ("a b c", "x y z", True, "limit"),
        (LONG, LONG.upper(), False, "long"),
        ("a b c", "x", False, "ratio"),
        ("a b c", "x y z u v w", False, None),
        ("a b c", "x y z u v w q", False, "ratio"),
        ("a b c", "a b c", False, "copy"),
        ("ab c", "a bc", False, "copy"),
        ("a b c d", "x x x x", False, "loop"),
        ("a b c d", "x x x y", False, None),
        ("a b c d e f g h", "q x y x y x y x y z", False, "loop"),
        ("a b c", "x <unk> z", False, "unknown"),
        ("a <unk> c", "x y z", False, None),
    ],
)
def test_filters(source: str, translation: str, limit: bool, reason: str | None):
    hypothesis = Hypothesis(translation.split(), -1.0, limit)
    assert Filters().reason(source.split(), hypothesis, "<unk>") == reason
    if reason:
        off = frozenset([reason, "ratio", "empty"])
        assert Filters(off=off).reason(source.split(), hypothesis, "<unk>") is None
    assert Filters().reason(source.split(), None, "<unk>") == "skipped"


def test_reasons_of_the_command():
    """The command names them without importing the filters, and torch with them."""
    assert sequence_level.REASONS == SWITCHES


def test_loops_of_many_pieces():
    run = list("abcdefgh")
    assert loops(["x", *run, *run, *run, "y"], 3)
    assert not loops([*run, *run, *run[:-1]], 3)


def test_scores_of_a_filter_that_is_off_do_not_matter():
    """As the message about scores that are no numbers advises."""
    reasons, scores = np.zeros(2, np.int8), np.array([math.nan, -1.0])
    with pytest.raises(UserError, match="leave them aside with --keep score"):
        Filters().worst("score", reasons, scores)
    Filters(off=frozenset(["score"]), worst_score=0.5).worst("score", reasons, scores)
    assert reasons.tolist() == [0, 0]


def test_worst_scores():
    reasons = np.array([0, 0, CODES["copy"], 0, 0], np.int8)
    Filters(worst_score=0.5).worst("score", reasons, np.array([-1.0, -3.0, -9.0, -3.0, -2.0]))
    assert reasons.tolist() == [0, CODES["score"], CODES["copy"], CODES["score"], 0]


def test_backward_model(data: Path, path: Path, translated: Path, tmp_path: Path, capsys):
    """The teacher itself, said to translate the other way. One that does not is refused before the work."""
    other = backward_of(path, tmp_path)
    task, dataset = translated_data(str(data), translations.opened(str(translated)))
    model = BackwardModel(str(other), task, 100, cpu=True)
    ids = {one.number: distilled.ids_of(one.hypotheses[0].pieces, task.target_dictionary) for one in read(translated)}
    found = dict(model.scores(((number, 0, ids[number]) for number in range(20)), dataset.src))
    models, _, _ = forced.load(str(data), str(other), cpu=True)
    for number in range(20):
        source, target = ids[number].long()[None], dataset.src[number].long()[None]
        previous = torch.cat([target[:, -1:], target[:, :-1]], 1)
        with torch.no_grad():
            logits, _ = models[0](source, torch.tensor([source.size(1)]), previous)
        gold = logits.log_softmax(-1).gather(2, target[..., None]).mean().item()
        assert found[number] == pytest.approx(gold, rel=1e-4)
    assert distil(translated, data, tmp_path / "bin", "--backward-path", other) == 0
    dropped = (tmp_path / "bin" / "dropped.tsv").read_text().splitlines()[1:]
    others = [line for line in dropped if not line.endswith("\tbackward")]
    assert len(dropped) - len(others) == int(0.05 * (600 - len(others)))
    capsys.readouterr()
    scores = tmp_path / "scores"  # of which the first pass would tell that it ends too early
    scores.write_text("1\n")
    more = ("--backward-path", path, "--select", f"scores:{scores}")
    assert distil(translated, data, tmp_path / "other", *more) == 1
    assert "does not translate from en to de" in error(capsys)


# Faults


def flip(folder: Path, data: Path) -> None:
    file = folder / "shard-00002" / translations.FILE
    found = bytearray(file.read_bytes())
    found[-3] ^= 1
    file.write_bytes(found)


def cut_short(folder: Path, data: Path) -> None:
    os.truncate(folder / "shard-00002" / translations.FILE, 500)


def edit(folder: Path, change) -> None:
    """Somebody edits a file and its record."""
    file = folder / "shard-00002" / translations.FILE
    file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    record = folder / "shard-00002.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "files": {file.name: sha256(file)}}))


def swap_sentences(folder: Path, data: Path) -> None:
    edit(folder, lambda lines: [*lines[2:4], *lines[:2], *lines[4:]])


def slip(folder: Path, data: Path) -> None:
    """The translations of two sentences change places, with the hashes of their sources; the numbers stay."""

    def change(lines: list[str]) -> list[str]:
        numbers, rest = zip(*[line.split("\t", 1) for line in lines], strict=True)
        moved = [*rest[2:4], *rest[:2], *rest[4:]]
        return [f"{number}\t{one}" for number, one in zip(numbers, moved, strict=True)]

    edit(folder, change)


def lose_a_sentence(folder: Path, data: Path) -> None:
    edit(folder, lambda lines: lines[:-2])


def of_another_teacher(folder: Path, data: Path) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**found, "teacher": ["0" * 64]}))


def unfinished(folder: Path, data: Path) -> None:
    (folder / "shard-00005.json").unlink()


def other_data(folder: Path, data: Path) -> None:
    """Two sources of the training set have changed places."""
    source, _ = sides(data)
    rows = [source[place] for place in range(len(source))]
    rows[7], rows[8] = rows[8], rows[7]
    prefix = data / "train.de-en.de"
    builder = indexed_dataset.make_builder(f"{prefix}.bin.new", "mmap", 60)
    for row in rows:
        builder.add_item(row)
    builder.finalize(f"{prefix}.idx")
    Path(f"{prefix}.bin.new").rename(f"{prefix}.bin")


def other_dictionary(folder: Path, data: Path) -> None:
    lines = (data / "dict.en.txt").read_text().splitlines(keepends=True)
    (data / "dict.en.txt").write_text("".join([lines[1], lines[0], *lines[2:]]))


FAULTS = {
    flip: "is not what was written",
    cut_short: "is not what was written",
    swap_sentences: "has sentence 201 where 200 should be",
    slip: "sentence 200 of .* was another one when it was translated",
    lose_a_sentence: "ends before sentence 299 and not 300",
    of_another_teacher: "belongs to another manifest.json",
    unfinished: "shard-00005 is not finished",
    other_data: r"made with another data\.train\.de-en\.de\.bin",
    other_dictionary: r"made with another dictionaries\.dict\.en\.txt",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_is_trained_on(fault, own: Path, data: Path, tmp_path: Path, capsys):
    """One error message, and no data."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    fault(own, copy)
    assert distil(own, copy, tmp_path / "bin") == 1
    with pytest.raises(UserError, match=FAULTS[fault]):
        raise UserError(error(capsys))
    assert not (tmp_path / "bin").exists()
    assert not list(tmp_path.glob(".hgkd-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, None),
        ("swap", "row 0 of .* is not what was to be written"),
        ("lose", "has 3 rows and .* 3, to be written were 2"),
        ("cut", "row 2 of .* is not what was to be written"),
    ],
)
def test_what_was_written_is_read_again(change: str | None, message: str | None, tmp_path: Path):
    """Row by row, on both sides: a source and a target that do not belong together are no training data."""
    rows = [torch.tensor(ids, dtype=torch.int32) for ids in ([4, 5, 2], [6, 2], [7, 8, 9, 2])]
    prefixes = [tmp_path / f"train.de-en.{language}" for language in ("de", "en")]
    for prefix in prefixes:
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", 60)
        for row in rows:
            builder.add_item(row)
        builder.finalize(f"{prefix}.idx")
    sources, targets = (array("Q", [int(hash_of(row), 16) for row in rows]) for _ in range(2))
    if change == "swap":
        targets[0], targets[1] = targets[1], targets[0]
    elif change == "lose":
        sources, targets = sources[:2], targets[:2]
    elif change == "cut":
        os.truncate(f"{prefixes[1]}.bin", os.path.getsize(f"{prefixes[1]}.bin") - 2)
    if message is None:
        distilled.check(*prefixes, (sources, targets))
        return
    with pytest.raises(UserError, match=message):
        distilled.check(*prefixes, (sources, targets))


def test_a_full_disk_while_training_data_are_written(data: Path, translated: Path, tmp_path: Path, capsys):
    with full_disk(4000):
        assert distil(translated, data, tmp_path / "bin") == 1
    assert "File too large" in error(capsys)
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_has_diverged(tmp_path: Path):
    with pytest.raises(UserError, match="gives sentence 3 a translation with the score nan"):
        translations.write(tmp_path, [translations.Translated(3, "0", [Hypothesis(["a"], math.nan, False)])])
    assert not list(tmp_path.iterdir())


def test_validation_sets_are_not_distilled(data: Path, path: Path, tmp_path: Path, capsys):
    assert translate(data, path, tmp_path / "set", "--subset", "valid") == 0
    capsys.readouterr()
    assert distil(tmp_path / "set", data, tmp_path / "bin") == 1
    assert "has translations of valid: only train is distilled" in error(capsys)


def test_a_hash_tells_sentences_apart():
    assert hash_of([4, 5, 2]) == hash_of(torch.tensor([4, 5, 2])) != hash_of([5, 4, 2])
    assert len(hash_of([2])) == 16
