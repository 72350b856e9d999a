"""A store that is damaged, unfinished, or of other data, another teacher or another temperature is refused."""

import hashlib
import itertools
import json
import shutil
from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq.data import Dictionary
from making_stores import CPU, FP32, FROM_A_STORE, TranslationWithTeacherTask, load, make_task, write
from processes import content

from hgkd_fairseq.data.shards import text_of
from hgkd_fairseq.errors import UserError, flag
from hgkd_fairseq.plugin.training_state import differences
from hgkd_fairseq.teacher.stored import BATCH, StoredTeacher


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DRAWS = ["ids", "ids_offsets", "counts", "counts_offsets", "distinct", "repeated"]
FILES = {
    "hidden": ["keys", "offsets", "gold", "hidden-0"],
    "sampled": ["keys", "offsets", "gold", *DRAWS],
    "topk": ["keys", "offsets", "gold", "ids", "logprobs", "rest"],
    "gold": ["keys", "offsets", "gold"],
}


def test_all_files_are_damaged_here(stores: dict[str, Path]):
    for kind, names in FILES.items():
        assert {file.name for file in stores[kind].iterdir() if file.is_file()} == {
            "manifest.json", *[f"shard-0000{n}.json" for n in range(4)], *["member-0.weight.npy"] * (kind == "hidden"),
        }  # fmt: skip
        assert sorted(file.stem for file in (stores[kind] / "shard-00001").iterdir()) == sorted(names)


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_damaged_array_is_refused(kind: str, name: str, damage, stores: dict[str, Path], data: Path, tmp_path: Path):
    """Damage in the second shard, which is not read before the training, is found when a batch has a sentence of it."""
    shutil.copytree(stores[kind], tmp_path / "store")
    damage(tmp_path / "store" / "shard-00001" / f"{name}.npy")
    task = make_task(data)
    store = StoredTeacher(str(tmp_path / "store"), task.src_dict, task.tgt_dict)
    task.load_dataset("train", combine=True)
    dataset = task.dataset("train")
    store.attach("train", 0, dataset)
    store.signal(dataset.collater([dataset[0], dataset[199]]), CPU, FP32)
    sample = dataset.collater([dataset[0], dataset[200]])
    with pytest.raises(UserError, match=f"shard-00001/{name}.npy is not what was written"):
        store.signal(sample, CPU, FP32)


DESCRIPTIONS = ("manifest.json", "member-0.weight.npy", "shard-00000.json", "shard-00003.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    # A flipped bit in the record of a shard that is not read yet is found when the shard is read, as in an array.
    [
        (name, how)
        for name in DESCRIPTIONS
        for how in (flipped, cut, Path.unlink)
        if (name, how) != (DESCRIPTIONS[-1], flipped)
    ],
)
def test_a_damaged_description_is_refused(name: str, damage, stores: dict[str, Path], data: Path, tmp_path: Path):
    shutil.copytree(stores["hidden"], tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(UserError, match=str(tmp_path / "store")):
        load(data, tmp_path / "store")


def test_a_training_that_meets_a_fault_ends(
    data: Path, plain: cl.Run, distilled: cl.Run, stores: dict[str, Path], tmp_path: Path
):
    """A damaged shard, which is read in the middle of the first epoch, and resuming with the store of another teacher
    end the training with one error message and without a checkpoint."""
    damaged = Path(shutil.copytree(stores["hidden"], tmp_path / "damaged"))
    flipped(damaged / "shard-00002" / "hidden-0.npy")
    assert write(data, plain, tmp_path / "other", "--dtype", "fp32") == 0
    resumed = Path(shutil.copytree(distilled.folder, tmp_path / "resumed"))
    before = content(resumed)
    words = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *FROM_A_STORE, "--max-epoch", 9)
    broken, other = cl.together(
        lambda: cl.fairseq("train", *words, "--teacher-store", damaged, "--save-dir", tmp_path / "broken"),
        lambda: cl.fairseq("train", *words, "--teacher-store", tmp_path / "other", "--save-dir", resumed),
    )
    cl.one_error_message(other, ["is of another run: another teacher taught its student"])
    assert content(resumed) == before
    assert broken.code != 0
    assert len(broken.errors()) == 1, broken.end()
    assert "shard-00002/hidden-0.npy is not what was written" in broken.errors()[0]
    assert not list((tmp_path / "broken").glob("checkpoint*.pt"))


def test_an_unfinished_store_is_refused(stores: dict[str, Path], data: Path, tmp_path: Path):
    shutil.copytree(stores["hidden"], tmp_path / "store")
    (tmp_path / "store" / "shard-00002.json").unlink()
    with pytest.raises(UserError, match="shard-00002 is not finished"):
        make_task(data, teacher_store=str(tmp_path / "store")).load_teacher()


def test_a_shard_that_is_gone_is_told_before_the_training(stores: dict[str, Path], data: Path, tmp_path: Path):
    """A shard that is missing although its record exists is found when the store is opened."""
    shutil.copytree(stores["hidden"], tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "shard-00003")
    with pytest.raises(UserError, match=r"shard-00003 holds nothing and not gold\.npy, .*; remove .*shard-00003\.json"):
        make_task(data, teacher_store=str(tmp_path / "store")).load_teacher()


def test_a_manifest_that_was_changed(stores: dict[str, Path], data: Path, tmp_path: Path):
    shutil.copytree(stores["topk"], tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"temperature": 1.5', '"temperature": 1.4'))
    with pytest.raises(
        UserError, match=r"belongs to another manifest\.json .*; write all of it again, to another folder"
    ):
        make_task(data, teacher_store=str(tmp_path / "store")).load_teacher()


def test_a_manifest_of_one_dictionary(stores: dict[str, Path], data: Path, tmp_path: Path):
    """Changed with the hashes in the shards' records, as by a program."""
    folder = Path(shutil.copytree(stores["topk"], tmp_path / "store"))
    manifest = json.loads((folder / "manifest.json").read_text())
    text = text_of({**manifest, "dictionaries": manifest["dictionaries"][:1]})
    old = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(text)
    for record in folder.glob("shard-*.json"):
        assert old in record.read_text()
        record.write_text(record.read_text().replace(old, hashlib.sha256(text.encode()).hexdigest()))
    with pytest.raises(UserError, match="its manifest does not name two dictionaries and two languages; write another"):
        make_task(data, teacher_store=str(folder)).load_teacher()


@pytest.mark.parametrize("option", ["--teacher-store", "--gauge-store"])
def test_what_is_no_store_is_told_with_its_option(option: str, data: Path, tmp_path: Path):
    task = make_task(data)
    for name, change, message in (
        ("nowhere", lambda folder: None, "is no store: it has no manifest.json; write one with hgkd store --output"),
        ("file", Path.touch, "is no store: it has no manifest.json"),
        ("cut", lambda folder: (folder.mkdir(), (folder / "manifest.json").write_text("{")), "cut short"),
    ):
        change(tmp_path / name)
        with pytest.raises(UserError) as caught:
            StoredTeacher(str(tmp_path / name), task.src_dict, task.tgt_dict, option=option)
        assert str(caught.value).startswith(f"{option} {tmp_path / name}")
        assert message in str(caught.value)
        assert "hgkd store --output" in str(caught.value)


def test_data_folders_without_a_store_are_told_at_the_start(stores: dict[str, Path], data: Path):
    """A store that lacks the second data folder, which is used in the second epoch, is refused at the start."""
    task = make_task(f"{data}:{data}", teacher_store=str(stores["hidden"]))
    task.load_teacher()
    with pytest.raises(UserError, match=r"has nothing of train of data folder 2; write one of all folders, with ':'"):
        task.load_dataset("train", combine=True)
    task.load_dataset("valid")


def test_stores_of_other_draws_are_other_teachers(stores: dict[str, Path], data: Path):
    """Another number of draws or of top tokens changes the fingerprint, by which resuming with the store is refused."""
    task = make_task(data)
    found = []
    for kind in ("hidden", "sampled", "topk"):
        store = StoredTeacher(str(stores[kind]), task.src_dict, task.tgt_dict)
        found.append(store.fingerprint)
        store.store.manifest |= {"draws": 4} if kind == "sampled" else {"k": 9}
        found.append(store.fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_overrides_of_a_checkpoint_that_is_not_read(stores: dict[str, Path], data: Path):
    task = make_task(data, teacher_store=str(stores["hidden"]), teacher_model_overrides="{'data': 'x'}")
    with pytest.raises(
        UserError, match="--teacher-model-overrides is for a checkpoint, and --teacher-store needs none"
    ):
        task.load_teacher()


@pytest.mark.parametrize("source", ["loras", "previous-epoch", "unigram", "ema"])
@pytest.mark.parametrize("given", [("teacher_model_overrides", "{'data': 'x'}"), ("teacher_dtype", "fp16")])
def test_options_of_a_model_for_a_source_without_one(given: tuple[str, str], source: str, data: Path):
    task = make_task(data, teacher_source=source, store_ema=True, **dict([given]))
    with pytest.raises(UserError, match=f"{flag(given[0])} is for .* --teacher-source {source} has none; drop it"):
        task.load_teacher()


def test_other_data_are_refused(stores: dict[str, Path], data: Path):
    task = make_task(data, teacher_store=str(stores["hidden"]))
    task.load_teacher()
    with pytest.raises(UserError, match=r"has the subsets train, valid and not test; .* --subset train,valid,test"):
        task.load_dataset("test")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    targets = [dataset.tgt[index] for index in range(len(dataset))]
    dataset.tgt = targets[::-1]
    with pytest.raises(UserError, match="sentence 0 of valid is another one there"):
        task.teacher.attach("valid", 0, dataset)
    dataset.tgt = targets[:-1]
    with pytest.raises(UserError, match="was written for 64 sentences of valid, and the data have 63"):
        task.teacher.attach("valid", 0, dataset)
    for side in ("src", "tgt"):  # one other sentence, in source or target: found when it is read
        task.load_dataset("valid")
        dataset = task.dataset("valid")
        sentences = [getattr(dataset, side)[index] for index in range(len(dataset))]
        sentences[5] = torch.cat([sentences[5][:1], sentences[5]])
        setattr(dataset, side, sentences)
        sample = dataset.collater([dataset[4], dataset[5]])
        assert "sentence 5 of valid is another one there" in sample[BATCH]["problem"]
        with pytest.raises(UserError, match="sentence 5 of valid"):
            task.teacher.signal(sample, CPU, FP32)


def test_what_does_not_fit_is_refused(stores: dict[str, Path], data: Path, teacher: cl.Run):
    task = make_task(data)
    other = Dictionary()
    for symbol in task.tgt_dict.symbols[4:][::-1]:
        other.add_symbol(symbol)
    with pytest.raises(UserError, match="another target dictionary"):
        StoredTeacher(str(stores["hidden"]), task.src_dict, other)
    with pytest.raises(UserError, match="is of the languages de-en, the student of en-de"):
        StoredTeacher(str(stores["hidden"]), task.src_dict, task.tgt_dict, languages=("en", "de"))
    with pytest.raises(UserError, match="--teacher-path and --teacher-store are two teachers"):
        make_task(data, teacher_store=str(stores["hidden"]), teacher_path=str(teacher.path())).load_teacher()
    with pytest.raises(UserError, match="needs --teacher-store STORE"):
        make_task(data, teacher_source="store").load_teacher()
    asked = {
        "teacher_temperature": 1.5, "teacher_temperature_start": None, "gate_on": "gold", "divergence": "kl",
        "gate": "token", "untempered_gate": False,
    }  # fmt: skip
    stored = {kind: StoredTeacher(str(stores[kind]), task.src_dict, task.tgt_dict) for kind in ("hidden", "sampled")}
    for option, value in (("teacher_temperature", 2.0), ("teacher_temperature_start", 3.0), ("gate_on", "argmax"),
                          ("divergence", "js"), ("gate", "instance"), ("gate", "expected")):  # fmt: skip
        cfg = Namespace(**asked | {option: value})
        stored["hidden"].check_options(cfg)
        with pytest.raises(UserError, match="of the kind sampled"):
            stored["sampled"].check_options(cfg)
    for gate in ("token", "typical"):
        stored["sampled"].check_options(Namespace(**asked | {"gate": gate}))
    for kind in ("sampled", "topk"):
        gauged = make_task(data, teacher_store=str(stores[kind]), gauge_store=str(stores["gold"])).load_teacher()
        with pytest.raises(UserError, match=f"--gauge-store .* needs .* --teacher-store .* {kind} .* --kind hidden"):
            gauged.check_options(Namespace(**asked))


def test_a_store_resumes_its_teachers_run(stores: dict[str, Path], live: TranslationWithTeacherTask):
    """A store of hidden states has the fingerprint of its teacher, which training compares, so that either resumes a
    run of the other; stores of a part of the distribution have others."""
    found = {
        kind: StoredTeacher(str(folder), live.src_dict, live.tgt_dict).fingerprint for kind, folder in stores.items()
    }
    assert found["hidden"] == found["bf16"] == live.teacher.fingerprint
    assert len({found["hidden"], found["sampled"], found["topk"]}) == 3
    # Also where --teacher-source is given. Other sources are other methods.
    methods = {name: {"gate": "token", "teacher_source": name} for name in ("checkpoint", "store", "ema")}
    for one, other in itertools.permutations(methods, 2):
        assert bool(differences(methods[one], methods[other])) == ("ema" in (one, other))
