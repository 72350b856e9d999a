"""Shards that several processes fill together: whoever is killed, the folder is the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from processes import content, owners

from hgkd_fairseq.data import shards
from hgkd_fairseq.data.claims import Claim, machine
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.errors import UserError

ROOT = Path(__file__).parents[2]
ABOUT = {"teacher": {"a.pt": "1f"}, "beam": 5}
SIZE = {"rows": 23, "shard_size": 3}
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_shards import ABOUT, SIZE, make
from hgkd_fairseq.data.shards import Shards

def slowly(shard, folder):
    rows = make(shard, folder)
    time.sleep(float(sys.argv[2]))
    return rows

Shards.create(sys.argv[1], ABOUT, **SIZE, expires=float(sys.argv[4])).fill(slowly)
"""


def make(shard: int, folder: Path) -> int:
    rows = range(shard * 3, min(shard * 3 + 3, 23))
    (folder / "text.tsv").write_text("".join(f"{row}\t{row * row}\n" for row in rows))
    ids = np.lib.format.open_memmap(folder / "ids.npy", mode="w+", dtype=np.int32, shape=(len(rows), 2))
    ids[:] = np.array([[row, -row] for row in rows])
    ids.flush()
    return len(rows)


def filled(folder: Path) -> Shards:
    found = Shards.create(folder, ABOUT, **SIZE)
    found.fill(make)
    return found


def worker(folder: Path, seconds: float = 0.02, expires: float = 60) -> subprocess.Popen:
    words = [sys.executable, "-c", WORKER, folder, seconds, Path(__file__).parent, expires]
    path = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, env={**os.environ, "PYTHONPATH": path})


def test_what_is_written_is_read(tmp_path: Path):
    filled(tmp_path / "set")
    found = Shards.open(tmp_path / "set", {"beam": 5, "teacher": {"a.pt": "1f"}})
    folders = list(found.all_files())
    assert [one.name for one in folders] == [f"shard-{n:05d}" for n in range(8)]
    text = "".join((one / "text.tsv").read_text() for one in folders)
    assert text == "".join(f"{row}\t{row * row}\n" for row in range(23))
    ids = np.concatenate([np.load(one / "ids.npy", mmap_mode="r") for one in folders])
    assert ids.tolist() == [[row, -row] for row in range(23)]
    assert sorted(file.name for file in (tmp_path / "set").iterdir() if file.is_file())[0] == "manifest.json"


def test_killed_at_random_moments_by_two_processes(tmp_path: Path):
    """Five times the one of the two that is making a shard is killed and another started."""
    whole = content(filled(tmp_path / "unbroken").folder)
    rng = random.Random(3)
    both = [worker(tmp_path / "set", seconds=0.1) for _ in range(2)]
    for _ in range(5):
        while not (at_work := [one for one in both if one.pid in owners(tmp_path / "set")]):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        killed = rng.choice(at_work)
        killed.kill()
        both.append(worker(tmp_path / "set", seconds=0.1))
        killed.wait()
        both.remove(killed)
    assert [one.wait(60) for one in both] == [0, 0]
    assert content(tmp_path / "set") == whole


def test_what_killed_processes_leave_is_taken_over_or_removed(tmp_path: Path):
    """Killed while it makes a shard; its files are there, and those of one that wrote the manifest or a record."""
    whole = content(filled(tmp_path / "unbroken").folder)
    one = worker(tmp_path / "set", seconds=60)
    while not list(tmp_path.glob("set/*.partial-*/files/ids.npy")):
        time.sleep(0.01)
    one.kill()
    assert list(tmp_path.glob("set/shard-00000.claim"))
    (tmp_path / "set" / "manifest.partial-0").mkdir()  # the killed process is a zombie here: it has not been waited for
    filled(tmp_path / "set")
    one.wait()
    assert content(tmp_path / "set") == whole


def test_two_processes_that_take_a_dead_ones_claim_over_at_once(tmp_path: Path):
    """Both see that its owner is dead; the one that comes too late leaves the files of the other alone."""
    first, second = [Shards.create(tmp_path / "set", ABOUT, **SIZE) for _ in range(2)]
    dead = {"host": machine(), "pid": os.getpid(), "started": "0", "token": "dead"}
    (tmp_path / "set" / "shard-00000.claim").write_text(json.dumps(dead))
    (tmp_path / "set" / "shard-00000.partial-dead").mkdir()
    lost, taken, partly_made = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: lost.append(first.make_one(0, make)))

    def pause(shard: int) -> bool:
        """Hold `first` between its taking of the claim and its first look at the files of others."""
        taken.set()
        return not partly_made.wait(60)

    def expired(state) -> bool:
        """`second` has read the dead one's claim; `first` takes it before `second` does."""
        thread.start()
        return taken.wait(60)

    def slowly(shard: int, folder: Path) -> int:
        assert not list(tmp_path.glob("set/*.partial-dead"))
        partly_made.set()
        thread.join(60)
        return make(shard, folder)

    first.whole, second._claims[0].expired = pause, expired
    assert second.make_one(0, slowly)
    assert lost == [False]
    assert second.whole(0)
    assert not list(tmp_path.glob("set/*partial*"))


@pytest.mark.parametrize("token", ["../../aside", "*", 7, None])
def test_a_claim_from_elsewhere_removes_nothing_else(token, tmp_path: Path):
    whole = filled(tmp_path / "set")
    (tmp_path / "aside").mkdir()
    (tmp_path / "set" / "shard-00001.json").unlink()
    dead = {"host": machine(), "pid": os.getpid(), "started": "0", "token": token}
    (tmp_path / "set" / "shard-00001.claim").write_text(json.dumps(dead))
    (tmp_path / "set" / "shard-00001.partial-x").mkdir()
    found = Shards.create(tmp_path / "set", ABOUT, **SIZE)
    assert found.make_one(1, make)
    assert (tmp_path / "aside").is_dir()
    assert (tmp_path / "set" / "shard-00001.partial-x").is_dir()
    found.fill(make)
    assert content(tmp_path / "set") == content(whole.folder)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["aside", "set"]
    assert not list(tmp_path.glob("set/*partial*"))


def test_a_file_beside_shards_that_another_process_removes_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It has finished all shards and removes what looks unfinished, while this one writes the same file once more."""
    found = filled(tmp_path / "set")
    found.beside("weight.npy", b"1")
    flush = shards.sync

    def sweep_and_sync(file: Path) -> None:
        found.sweep()
        flush(file)

    monkeypatch.setattr(shards, "sync", sweep_and_sync)
    found.beside("weight.npy", b"1")
    assert (tmp_path / "set" / "weight.npy").read_bytes() == b"1"


def test_a_damaged_shard_that_another_process_replaces(tmp_path: Path):
    """Its files vanish while this process reads them, which takes it for unfinished."""
    filled(tmp_path / "set")
    found = Shards.create(tmp_path / "set", ABOUT, **SIZE)
    described = found.described

    def then_lose(shard: int) -> dict[str, str]:
        files = described(shard)
        (found.name(shard) / "ids.npy").unlink()
        return files

    found.described = then_lose
    assert not found.whole(2)


def test_claims_that_another_process_removes_at_the_end(tmp_path: Path):
    """Another process finishes all shards, and removes what is left, while this one takes a dead one's claim over."""
    file = tmp_path / "shard-00000.claim"
    file.write_text(json.dumps({"host": machine(), "pid": os.getpid(), "started": "0", "token": "dead"}))
    claim, write = Claim(file), json.dump

    def sweep(*words) -> None:
        write(*words)
        for old in tmp_path.glob("*.claim"):
            old.unlink()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json, "dump", sweep)
        assert not claim.take()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_without_a_sign_of_life_expires(tmp_path: Path):
    """Of a process that is stopped, not dead. When it goes on it leaves the shard alone."""
    whole = content(filled(tmp_path / "unbroken").folder)
    one = worker(tmp_path / "set", seconds=0.5, expires=0.4)
    while not list(tmp_path.glob("set/*.partial-*/files/ids.npy")):
        time.sleep(0.01)
    one.send_signal(signal.SIGSTOP)
    found = Shards.create(tmp_path / "set", ABOUT, **SIZE, expires=0.4)
    began = time.monotonic()
    assert not found.make_one(0, make)
    found.fill(make)
    assert time.monotonic() - began > 0.4
    one.send_signal(signal.SIGCONT)
    assert one.wait(60) == 0
    assert content(tmp_path / "set") == whole


def test_a_living_claim_is_left_alone(tmp_path: Path):
    """It is refreshed by its owner, for longer than it takes to expire; the other process waits."""
    found = [Shards.create(tmp_path / "set", ABOUT, 1, 1, expires=0.3) for _ in range(2)]
    makers = []

    def slowly(name: str):
        def run(shard: int, folder: Path) -> int:
            makers.append(name)
            (folder / "x").write_text("x")
            time.sleep(1.0)
            return 1

        return run

    threads = [threading.Thread(target=one.fill, args=(slowly(name),)) for one, name in zip(found, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_set_takes_no_claim_away(days: int, tmp_path: Path):
    """Neither where the file's time is long ago, or still to come, nor while its owner refreshes it by such a clock."""
    file = tmp_path / "shard-00000.claim"
    own, other = Claim(file, expires=0.4), Claim(file, expires=0.4)
    assert own.take()
    for hours in range(3):
        then = time.time() + 3600 * (24 * days + hours)
        os.utime(file, (then, then))
        assert not other.take()
        time.sleep(0.2)
    assert own.held()
    own.release()
    assert other.take()


def test_parts(tmp_path: Path):
    for part in ((0, 3), (2, 3), (1, 3)):
        assert not list(tmp_path.glob("set/shard-00001"))
        Shards.create(tmp_path / "set", ABOUT, **SIZE).fill(make, part)
    assert content(tmp_path / "set") == content(filled(tmp_path / "unbroken").folder)


def flip(folder: Path) -> None:
    file = folder / "shard-00002" / "ids.npy"
    found = bytearray(file.read_bytes())
    found[-1] ^= 1
    file.write_bytes(found)


def swap_lines(folder: Path) -> None:
    file = folder / "shard-00002" / "text.tsv"
    first, second, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([second, first, *rest]))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "shard-00002" / "text.tsv", 5)


def lose_a_file(folder: Path) -> None:
    (folder / "shard-00002" / "text.tsv").unlink()


def swap_shards(folder: Path) -> None:
    for name in ("shard-00002", "shard-00002.json"):
        (folder / name).rename(folder / f"{name}.aside")
    (folder / "shard-00003").rename(folder / "shard-00002")
    (folder / "shard-00002.json.aside").rename(folder / "shard-00002.json")
    (folder / "shard-00002.aside").rename(folder / "shard-00003")


def of_another_manifest(folder: Path) -> None:
    record = json.loads((folder / "shard-00002.json").read_text())
    (folder / "shard-00002.json").write_text(json.dumps({**record, "manifest": "0" * 64}))


def cut_record(folder: Path) -> None:
    os.truncate(folder / "shard-00002.json", 20)


FAULTS = {
    flip: "ids.npy is not what was written",
    swap_lines: "text.tsv is not what was written",
    cut_short: "text.tsv is not what was written",
    lose_a_file: "holds ids.npy and not ids.npy, text.tsv",
    swap_shards: "shard-00002/ids.npy is not what was written",
    of_another_manifest: "belongs to another manifest.json",
    cut_record: "is no record of a shard",
    lambda folder: shutil.rmtree(folder / "shard-00002"): "holds nothing and not ids.npy, text.tsv",
    lambda folder: (folder / "shard-00002.json").unlink(): "shard-00002 is not finished",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_shard_is_refused_by_a_reader_and_made_anew_by_a_writer(fault, tmp_path: Path):
    whole = content(filled(tmp_path / "set").folder)
    fault(tmp_path / "set")
    with pytest.raises(UserError, match=FAULTS[fault]):
        list(Shards.open(tmp_path / "set").all_files())
    filled(tmp_path / "set")
    left = {name: value for name, value in content(tmp_path / "set").items() if ".aside" not in name}
    assert left == whole


def test_another_manifest_is_refused(tmp_path: Path):
    filled(tmp_path / "set")
    for other, names in (
        ({**ABOUT, "beam": 4}, [r"beam \(5, now 4\)"]),
        ({"teacher": {"a.pt": "2e"}, "beam": 5}, ['teacher.a.pt \\("1f", now "2e"\\)']),
    ):
        with pytest.raises(UserError, match="was made with another " + names[0]):
            Shards.create(tmp_path / "set", other, **SIZE)
        with pytest.raises(UserError, match=names[0]):
            Shards.open(tmp_path / "set", other)
    with pytest.raises(UserError, match=r"shard_size \(3, now 4\)"):
        Shards.create(tmp_path / "set", ABOUT, 23, 4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files and no manifest"):
        filled(tmp_path / "other")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path):
    def full(shard: int, folder: Path) -> int:
        if shard == 2:
            raise OSError(28, "No space left on device")
        return make(shard, folder)

    found = Shards.create(tmp_path / "set", ABOUT, **SIZE)
    with pytest.raises(UserError, match="shard-00002: No space left on device"):
        found.fill(full)
    assert not list(tmp_path.glob("set/*.partial-*")) + list(tmp_path.glob("set/*.claim"))
    filled(tmp_path / "set")
    assert content(tmp_path / "set") == content(filled(tmp_path / "unbroken").folder)


def test_too_many_shards(tmp_path: Path):
    with pytest.raises(UserError, match="would have 100,001 shards"):
        Shards.create(tmp_path / "set", ABOUT, 100_001, 1)
    assert not (tmp_path / "set").exists()


def test_rows_are_counted(tmp_path: Path):
    with pytest.raises(UserError, match="shard-00000 would have 2 rows and not 3"):
        Shards.create(tmp_path / "set", ABOUT, **SIZE).fill(lambda shard, folder: make(shard, folder) - 1)


def test_a_manifest_that_cannot_be_written_again(tmp_path: Path):
    """A number that is read as infinity; lists within lists, of which reading may bear more than writing."""
    for value in ("1e999", *("[" * depth + "]" * depth for depth in range(500, 1200, 20))):
        (tmp_path / "manifest.json").write_text(f'{{"rows": 1, "shard_size": 1, "x": {value}}}')
        if 9 < len(value) < 1200:
            assert Shards.open(tmp_path).count == 1
        else:
            with pytest.raises(UserError, match=r"is no manifest of shards: |was made with another x"):
                Shards.open(tmp_path, {"x": 1})
