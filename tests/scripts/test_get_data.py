"""scripts/get_data.sh, run for real on small corpora made here: out of folders, a local server, a stand-in for apt."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "get_data.sh"
MULTI30K = "multi30k-de-en"
LIBREOFFICE = "libreoffice-help-de-en"
PAIRS = {"train": 5, "val": 3, "test_2016_flickr": 2}
TEXTS = sorted(f"{split}.{language}" for split in ("train", "valid", "test") for language in ("de", "en"))
UNREACHABLE_S = 20.0  # an unreachable source is given up before


def lines_of(split: str, language: str) -> list[str]:
    return [f"{split}, Satz {i} auf {language}, größer ." for i in range(PAIRS[split])]


def write_gz(path: Path, lines: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))


def write_hashes(folder: Path, path: Path) -> Path:
    """sha256sum's file for the .gz in `folder`."""
    sums = (f"{hashlib.sha256(gz.read_bytes()).hexdigest()}  {gz.name}\n" for gz in sorted(folder.glob("*.gz")))
    path.write_text("".join(sums))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small corpus with Multi30K's file names; its hashes lie beside it in `hashes`."""
    folder = tmp_path / "data" / "multi30k"
    folder.mkdir(parents=True)
    for split in PAIRS:
        for language in ("de", "en"):
            write_gz(folder / f"{split}.{language}.gz", lines_of(split, language))
    write_hashes(folder, tmp_path / "hashes")
    return folder


def environment(tmp_path: Path, **extra: object) -> dict[str, str]:
    """This process's environment without the script's own variables, except `extra`."""
    own = ("HGKD_DATA", "HGKD_MULTI30K_URL", "HGKD_MULTI30K_SHA256", "PYTHON")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {name: value for name, value in os.environ.items() if name not in (*own, *proxies)}
    if (tmp_path / "hashes").exists():
        env["HGKD_MULTI30K_SHA256"] = str(tmp_path / "hashes")
    return env | {name: str(value) for name, value in extra.items()}


def get_data(*args: object, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]


def assert_is_corpus(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE", *TEXTS]
    for ours, theirs in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        for language in ("de", "en"):
            text = (folder / f"{ours}.{language}").read_text(encoding="utf-8")
            assert text == "".join(line + "\n" for line in lines_of(theirs, language))
    source = (folder / "SOURCE").read_text()
    assert source.startswith("multi30k-de-en: ")
    assert source.count("\n") == 1
    assert "for research and education, non-commercial" in source
    assert not folder.with_name(folder.name + ".partial").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Server:
    """Serves a folder on 127.0.0.1; `requests` are the names of the files asked for, in order.

    With `stop_in` set to a file's name, it sends half of that file and then nothing more until `stop` is called.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.stop_in = ""
        self.stopped_in = threading.Event()  # half of the file `stop_in` is sent
        self._end = threading.Event()
        owner = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                owner.requests.append(name)
                if name != owner.stop_in:
                    super().do_GET()
                    return
                content = (folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                owner.stopped_in.set()
                owner._end.wait(60)

            def log_message(self, *_: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


# ----------------------------------------------------------------------------------------------------- local folders


@pytest.mark.parametrize("subfolder", ["", "multi30k"], ids=["the folder itself", "its parent"])
@pytest.mark.parametrize("how", ["--from", "HGKD_DATA"])
def test_local_folder(how: str, subfolder: str, corpus: Path, tmp_path: Path) -> None:
    folder = corpus.parent if subfolder else corpus
    options = ("--from", folder) if how == "--from" else ()
    env = environment(tmp_path, HGKD_MULTI30K_URL="http://127.0.0.1:1")  # would fail if it were asked
    if how == "HGKD_DATA":
        env["HGKD_DATA"] = str(folder)
    before = snapshot(corpus)
    result = get_data(MULTI30K, tmp_path / "new" / "out", *options, env=env)
    assert result.returncode == 0, result.stderr
    assert "for research and education, non-commercial" in result.stderr
    assert_is_corpus(tmp_path / "new" / "out")
    assert snapshot(corpus) == before


def test_relative_paths_and_trailing_slash(corpus: Path, tmp_path: Path) -> None:
    result = get_data(MULTI30K, "out/", "--from", "data", env=environment(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_is_corpus(tmp_path / "out")


def test_known_hashes_are_expected_by_default(corpus: Path, tmp_path: Path) -> None:
    env = environment(tmp_path)
    del env["HGKD_MULTI30K_SHA256"]
    result = get_data(MULTI30K, tmp_path / "out", "--from", corpus, env=env)
    assert result.returncode == 1
    assert last_line(result).startswith(f"get_data.sh: {corpus}/train.de.gz: wrong sha256: replace it")
    assert not (tmp_path / "out").exists()


def test_both_sides_need_as_many_lines(corpus: Path, tmp_path: Path) -> None:
    write_gz(corpus / "val.en.gz", lines_of("val", "en")[:-1])
    write_hashes(corpus, tmp_path / "hashes")
    result = get_data(MULTI30K, tmp_path / "out", "--from", corpus, env=environment(tmp_path))
    assert result.returncode == 1
    assert "val: 3 German and 2 English lines" in last_line(result)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- downloads


def only_program(folder: Path, program: str) -> str:
    """A PATH with one program for downloads, and what else the script needs."""
    folder.mkdir()
    needed = ("bash", "cat", "cp", "dirname", "du", "env", "gzip", "mkdir", "mv", "rm", "sha256sum", "sleep", "wc")
    for name in (*needed, program):
        target = os.path.realpath(sys.executable) if name == "python3" else shutil.which(name)
        assert target, f"this test needs the program {name}"
        (folder / name).symlink_to(target)
    return str(folder)


@pytest.mark.parametrize("program", [name for name in ("curl", "wget") if shutil.which(name)] + ["python3"])
def test_download(program: str, corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    server = serve(corpus)
    path = only_program(tmp_path / "bin", program)
    env = environment(tmp_path, HGKD_MULTI30K_URL=server.url + "/", PATH=path)
    result = get_data(MULTI30K, tmp_path / "out", env=env)
    assert result.returncode == 0, result.stderr
    assert_is_corpus(tmp_path / "out")
    assert server.requests == [f"{split}.{language}.gz" for split in PAIRS for language in ("de", "en")]
    assert f", from {server.url}; " in (tmp_path / "out" / "SOURCE").read_text()

    missing = get_data(MULTI30K, tmp_path / "other", env=env | {"HGKD_MULTI30K_URL": server.url + "/nowhere"})
    assert missing.returncode == 3
    assert "/nowhere/train.de.gz cannot be had" in last_line(missing)
    assert not (tmp_path / "other").exists()


def test_data_folder_without_the_set_downloads(corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    (tmp_path / "empty").mkdir()
    server = serve(corpus)
    env = environment(tmp_path, HGKD_DATA=tmp_path / "empty", HGKD_MULTI30K_URL=server.url)
    result = get_data(MULTI30K, tmp_path / "out", env=env)
    assert result.returncode == 0, result.stderr
    assert len(server.requests) == 6
    assert_is_corpus(tmp_path / "out")


def test_killed_and_restarted(corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    """Killed in the middle of the third file: the first two are used again, the third is fetched anew."""
    first = serve(corpus)
    first.stop_in = "val.de.gz"
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    env = environment(tmp_path, HGKD_MULTI30K_URL=first.url)
    run = subprocess.Popen(
        ["bash", str(SCRIPT), MULTI30K, str(out)], env=env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert first.stopped_in.wait(30)
    os.killpg(run.pid, 9)
    run.wait()
    assert not out.exists()
    assert (partial / "train.en.gz").read_bytes() == (corpus / "train.en.gz").read_bytes()
    # Whether the half had been written when the process was killed is chance: make it so.
    whole = (corpus / "val.de.gz").read_bytes()
    (partial / "val.de.gz").write_bytes(whole[: len(whole) // 2])

    second = serve(corpus)
    result = get_data(MULTI30K, out, env=env | {"HGKD_MULTI30K_URL": second.url})
    assert result.returncode == 0, result.stderr
    assert_is_corpus(out)
    assert second.requests == ["val.de.gz", "val.en.gz", "test_2016_flickr.de.gz", "test_2016_flickr.en.gz"]


def test_terminated_leaves_no_download_running(corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    server = serve(corpus)
    server.stop_in = "train.de.gz"
    env = environment(tmp_path, HGKD_MULTI30K_URL=server.url)
    with subprocess.Popen(
        ["bash", str(SCRIPT), MULTI30K, str(tmp_path / "out")], env=env, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        assert server.stopped_in.wait(30)
        run.terminate()
        run.communicate(timeout=10)  # stderr ends when the last process that holds it does
    assert run.returncode != 0
    assert not (tmp_path / "out").exists()


def test_wrong_hash_of_a_download(corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    write_gz(corpus / "val.en.gz", ["something else"] * PAIRS["val"])  # after its hash was taken
    env = environment(tmp_path, HGKD_MULTI30K_URL=serve(corpus).url)
    result = get_data(MULTI30K, tmp_path / "out", env=env)
    assert result.returncode == 1
    assert last_line(result).startswith("get_data.sh: val.en.gz: wrong sha256")
    assert "--from FOLDER" in last_line(result)
    assert not (tmp_path / "out").exists()

    write_gz(corpus / "val.en.gz", lines_of("val", "en"))  # the remedy that it names: run it again
    assert get_data(MULTI30K, tmp_path / "out", env=env).returncode == 0
    assert_is_corpus(tmp_path / "out")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def test_unreachable_is_given_up(corpus: Path, tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    """A closed port, a port that never answers, a server that stops in mid-file, an apt-get that waits for ever.

    All at once, for each of the last three takes its full time.
    """
    silent = socket.create_server(("127.0.0.1", 0), backlog=8)  # accepts, as nobody calls accept it says nothing
    closed = socket.create_server(("127.0.0.1", 0))
    closed_port = closed.getsockname()[1]
    closed.close()
    stopping = serve(corpus)
    stopping.stop_in = "train.en.gz"
    write_program(tmp_path / "bin" / "apt-get", "exec sleep 300\n")
    write_program(tmp_path / "bin" / "apt-cache", "exit 0\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    cases = {
        "closed": (MULTI30K, {"HGKD_MULTI30K_URL": f"http://127.0.0.1:{closed_port}"}),
        "silent": (MULTI30K, {"HGKD_MULTI30K_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}),
        "stopping": (MULTI30K, {"HGKD_MULTI30K_URL": stopping.url}),
        "apt": (LIBREOFFICE, {"PATH": path, "PYTHON": sys.executable}),
    }
    results: dict[str, tuple[float, subprocess.CompletedProcess[str]]] = {}

    def run(case: str) -> None:
        start = time.monotonic()
        name, extra = cases[case]
        result = get_data(name, tmp_path / case, env=environment(tmp_path, **extra))
        results[case] = (time.monotonic() - start, result)

    threads = [threading.Thread(target=run, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    silent.close()
    assert sorted(results) == sorted(cases)
    for case, (seconds, result) in results.items():
        assert result.returncode == 3, (case, result.stderr)
        assert seconds < UNREACHABLE_S, case
        assert "use --from FOLDER" in last_line(result) or "with --from" in last_line(result)
        assert not (tmp_path / case).exists()
    assert results["closed"][0] < 5.0
    assert stopping.requests == ["train.de.gz", "train.en.gz"]  # no further file was tried


# ----------------------------------------------------------------------------------------------- what is there already


def test_finished_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    env = environment(tmp_path)
    assert get_data(MULTI30K, tmp_path / "out", "--from", corpus, env=env).returncode == 0
    before = snapshot(tmp_path / "out")
    env["HGKD_MULTI30K_URL"] = "http://127.0.0.1:1"  # nothing answers there
    start = time.monotonic()
    result = get_data(MULTI30K, tmp_path / "out", env=env)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert f"{tmp_path / 'out'} is there already: multi30k-de-en: " in result.stderr
    assert time.monotonic() - start < 5.0
    assert snapshot(tmp_path / "out") == before

    other = get_data(LIBREOFFICE, tmp_path / "out", env=env)
    assert other.returncode == 1
    assert last_line(other).endswith("out holds multi30k-de-en, not libreoffice-help-de-en: choose another DIR")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["files", "empty folder", "file", "dangling link"])
def test_foreign_folder_is_refused(kind: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
    if kind == "files":
        (out / "train.de").write_text("mine")
    before = snapshot(tmp_path)
    result = get_data(MULTI30K, out, "--from", corpus, env=environment(tmp_path))
    assert result.returncode == 1
    assert result.stderr == f"get_data.sh: {out} exists but has no file SOURCE: remove it or choose another DIR\n"
    assert snapshot(tmp_path) == before
    assert os.path.lexists(out)
    assert not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------------------- usage errors


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["no-such-set", "out"], "unknown NAME no-such-set; known are: multi30k-de-en, libreoffice-help-de-en"),
        ([], "NAME and DIR are missing; NAME is one of: multi30k-de-en, libreoffice-help-de-en"),
        ([MULTI30K], "DIR is missing: give the folder to make"),
        ([MULTI30K, "out", "more"], "unexpected argument more: give one NAME and one DIR"),
        ([MULTI30K, "out", "--form", "data"], "unknown option --form: only --from FOLDER is known"),
        ([MULTI30K, "out", "--from"], "--from needs a folder"),
        ([MULTI30K, "out", "--from", "nowhere"], "--from nowhere: no such folder"),
        (
            [MULTI30K, "out", "--from", "."],
            "--from .: no train.de.gz there, nor in its subfolder multi30k: name the folder that holds it",
        ),
        (
            [LIBREOFFICE, "out", "--from", "."],
            "--from .: needs libreoffice-help-de_*.deb and libreoffice-help-en-us_*.deb, one of each, or the folders "
            "de and en-US of usr/share/libreoffice/help",
        ),
    ],
)
def test_usage_errors(args: list[str], complaint: str, tmp_path: Path) -> None:
    result = get_data(*args, env=environment(tmp_path, PYTHON=sys.executable), cwd=tmp_path)
    assert (result.returncode, last_line(result)) == (2, f"get_data.sh: {complaint}")
    assert not (tmp_path / "out").exists()


def test_hash_file_must_be_whole(corpus: Path, tmp_path: Path) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_text("".join(line for line in hashes.read_text().splitlines(True) if "val.en" not in line))
    result = get_data(MULTI30K, tmp_path / "out", "--from", corpus, env=environment(tmp_path))
    assert result.returncode == 2
    assert last_line(result) == f"get_data.sh: HGKD_MULTI30K_SHA256={hashes}: no line for val.en.gz: add it"


# --------------------------------------------------------------------------------------------------- LibreOffice help

DIGITS = {
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "en-US": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}


@pytest.fixture
def help_tree(tmp_path: Path) -> Path:
    """A help just large enough: 15 pairs on each of the 150 pages for test and validation, 520 on each of 60 more."""
    root = tmp_path / "help"
    for language, sentence in (("de", "Hier steht Satz {}."), ("en-US", "Here comes sentence {}.")):
        folder = root / "usr/share/libreoffice/help" / language / "text"
        folder.mkdir(parents=True)
        paths = sorted((f"text/page{i}.html" for i in range(210)), key=lambda p: hashlib.sha256(p.encode()).hexdigest())
        for page, path in enumerate(paths):
            paragraphs = []
            for i in range(15 if page < 150 else 520):
                number = " ".join(DIGITS[language][int(digit)] for digit in f"{page:03d}{i:03d}")
                paragraphs.append(f'<p id="par_{i}">{sentence.format(number)}</p>')
            (folder.parent / path).write_text("\n".join(paragraphs), encoding="utf-8")
    return root


def assert_is_help(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE", *TEXTS]
    text = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in TEXTS}
    for split, pairs in (("train", 60 * 520), ("valid", 1000), ("test", 1000)):
        assert (len(text[f"{split}.de"]), len(text[f"{split}.en"])) == (pairs, pairs)
    number = dict(zip(DIGITS["de"], DIGITS["en-US"], strict=True))
    for de, en in zip(text["train.de"], text["train.en"], strict=True):
        words = de.removeprefix("Hier steht Satz ").removesuffix(".").split()
        assert en == f"Here comes sentence {' '.join(number[word] for word in words)}."
    source = (folder / "SOURCE").read_text()
    assert source.startswith("libreoffice-help-de-en: ")
    assert source.endswith("; MPL-2.0\n")
    assert source.count("\n") == 1
    assert not folder.with_name(folder.name + ".partial").exists()


def write_debs(tree: Path, folder: Path) -> None:
    """Stand-ins for the two packages, each with one language: archives that the `dpkg` of `fake_apt` can unpack."""
    folder.mkdir()
    for package, language in (("libreoffice-help-de", "de"), ("libreoffice-help-en-us", "en-US")):
        archive = folder / f"{package}_4%3a7.4.7_all.deb"
        subprocess.run(["tar", "-cf", archive, "-C", tree, f"usr/share/libreoffice/help/{language}"], check=True)


def fake_apt(folder: Path, debs: Path, root: bool, known: bool) -> str:
    """A PATH with an apt that has the packages of `debs`; `known`: before `apt-get update` too."""
    lists = folder / "lists"
    write_program(folder / "id", f"echo {0 if root else 1000}\n")
    write_program(folder / "apt-cache", f"[[ {'yes' if known else 'no'} == yes || -e {lists} ]]\n")
    write_program(
        folder / "apt-get",
        f'case "$*" in *update*) touch {lists} ;; *download*) cp {debs}/* . ;; esac\n',
    )
    write_program(folder / "dpkg", 'mkdir -p "$3"; tar -xf "$2" -C "$3"\n')
    return f"{folder}:{os.environ['PATH']}"


def test_libreoffice(help_tree: Path, tmp_path: Path) -> None:
    """From packages that apt downloads after an update, over the leavings of a run that was killed."""
    write_debs(help_tree, tmp_path / "debs")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".made-by-hgkd").touch()
    for language, text in (("de", "Ein alter Satz."), ("en-US", "One old sentence.")):
        folder = partial / "tree/usr/share/libreoffice/help" / language / "text"
        folder.mkdir(parents=True)
        (folder / "old.html").write_text(f'<p id="par_0">{text}</p>')
    (partial / "libreoffice-help-de_1.0_all.deb").write_text("half")
    (partial / "train.de").write_text("half")
    path = fake_apt(tmp_path / "bin", tmp_path / "debs", root=True, known=False)
    env = environment(tmp_path, PATH=path, PYTHON=sys.executable)
    result = get_data(LIBREOFFICE, tmp_path / "out", env=env)
    assert result.returncode == 0, result.stderr
    assert "get_data.sh: apt-get update\n" in result.stderr
    assert "MPL-2.0" in result.stderr
    assert "libreoffice-help-en-us_4%3a7.4.7_all.deb" in (tmp_path / "out" / "SOURCE").read_text()
    assert_is_help(tmp_path / "out")


@pytest.mark.parametrize("given", ["packages", "tree", "help folder"])
def test_libreoffice_that_is_not_whole(given: str, tmp_path: Path) -> None:
    """Each kind of --from is found and read, here with one page only, which is an error."""
    helpdir = tmp_path / "tree/usr/share/libreoffice/help"
    for language, text in (("de", "Ein Satz steht hier."), ("en-US", "Here is a sentence.")):
        (helpdir / language).mkdir(parents=True)
        (helpdir / language / "a.html").write_text(f'<p id="par_0">{text}</p>')
    write_debs(tmp_path / "tree", tmp_path / "debs")
    folder, read = {
        "packages": (tmp_path / "debs", tmp_path / "out.partial/tree/usr/share/libreoffice/help"),
        "tree": (tmp_path / "tree", helpdir),
        "help folder": (helpdir, helpdir),
    }[given]
    path = fake_apt(tmp_path / "bin", tmp_path / "debs", root=False, known=True)
    env = environment(tmp_path, PATH=path, PYTHON=sys.executable)
    result = get_data(LIBREOFFICE, tmp_path / "out", "--from", folder, env=env)
    assert result.returncode == 1
    assert last_line(result) == (
        f"align_libreoffice.py: HELPDIR {read} gives only 0 pairs for valid: it is not the whole help"
    )
    assert not (tmp_path / "out").exists()


def test_libreoffice_without_package_lists(tmp_path: Path) -> None:
    (tmp_path / "debs").mkdir()
    path = fake_apt(tmp_path / "bin", tmp_path / "debs", root=False, known=False)
    env = environment(tmp_path, PATH=path, PYTHON=sys.executable)
    result = get_data(LIBREOFFICE, tmp_path / "out", env=env)
    assert result.returncode == 3
    assert last_line(result) == (
        "get_data.sh: apt knows no package libreoffice-help-de libreoffice-help-en-us: "
        "run `apt-get update` as root first, or use --from FOLDER"
    )
    assert not (tmp_path / "out").exists()


# Packages and archives that hold more than files


def ar(members: dict[str, bytes]) -> bytes:
    """The archive that a .deb is."""
    made = b"!<arch>\n"
    for name, content in members.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        made += b"\n" * (len(content) % 2)
    return made


def tar_of(entries: list[tuple[str, bytes, str]]) -> bytes:
    """A .tar.gz of (name, kind of entry, what it holds or links to)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as file:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = kind, 0o755
            entry.devmajor, entry.devminor = 1, 5  # /dev/zero
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                entry.linkname = content
            elif kind == tarfile.REGTYPE:
                entry.size = len(content)
            file.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


def deb(entries: list[tuple[str, bytes, str]]) -> bytes:
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    parts = {"control.tar.gz": tar_of([("./control", tarfile.REGTYPE, control)]), "data.tar.gz": tar_of(entries)}
    return ar({"debian-binary": b"2.0\n", **parts})


PAGES = "./usr/share/libreoffice/help/de"
HOSTILE = {
    "a name with ..": [("../../../../evil", tarfile.REGTYPE, "x")],
    "an absolute name": [("{outside}/evil", tarfile.REGTYPE, "x")],
    "through a link": [("./way", tarfile.SYMTYPE, "{outside}"), ("./way/evil", tarfile.REGTYPE, "x")],
    "through a link with ..": [("./way", tarfile.SYMTYPE, "../../../outside"), ("./way/evil", tarfile.REGTYPE, "x")],
    "a hard link": [("./way", tarfile.LNKTYPE, "{outside}/mine"), ("./way", tarfile.REGTYPE, "x")],
    "a page that is a link": [(f"{PAGES}/a.html", tarfile.SYMTYPE, "{outside}/mine")],
    "a page that is a device": [(f"{PAGES}/a.html", tarfile.CHRTYPE, "")],
    "a page that is a pipe": [(f"{PAGES}/a.html", tarfile.FIFOTYPE, "")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_packages_reach_nothing_outside(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (tmp_path / "debs").mkdir()
    entries = [(one.format(outside=outside), kind, link.format(outside=outside)) for one, kind, link in HOSTILE[name]]
    (tmp_path / "debs" / "libreoffice-help-de_1_all.deb").write_bytes(deb(entries))
    english = deb([(f"{PAGES[:-2]}en-US/a.html", tarfile.REGTYPE, "<p id=a>This is a page.</p>")])
    (tmp_path / "debs" / "libreoffice-help-en-us_1_all.deb").write_bytes(english)
    before = snapshot(outside)
    env = environment(tmp_path, HGKD_DATA="")
    run = get_data("libreoffice-help-de-en", tmp_path / "out", "--from", tmp_path / "debs", env=env)
    unpacked = shutil.which("dpkg") is not None
    assert run.returncode == (1 if unpacked else 3)
    assert snapshot(outside) == before
    assert all(tmp_path / "out.partial" in one.parents for one in tmp_path.rglob("evil"))
    assert not (tmp_path / "out").exists()
    if unpacked and "a page" in name:
        assert "is no file but a link or device" in last_line(run)


def test_an_archive_of_a_recipe_holds_files_alone(tmp_path: Path) -> None:
    for kind, link in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.FIFOTYPE, ""), (tarfile.REGTYPE, "text")):
        folder = tmp_path / kind.decode()
        folder.mkdir()
        (folder / "a.tgz").write_bytes(tar_of([("de-en", tarfile.DIRTYPE, ""), ("de-en/train.de", kind, link)]))
        script = 'fail() { echo "$2"; exit "$1"; }\n' + function("unpack")
        script += f"\noriginal={folder}; unpack a.tgz {folder}/to de-en"
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert run.returncode == (0 if kind == tarfile.REGTYPE else 1), run.stderr
        assert ("holds links or devices" in run.stdout) == (kind != tarfile.REGTYPE)


def function(name: str) -> str:
    """Of the recipes' common part."""
    text = (ROOT / "scripts" / "recipes" / "common.sh").read_text()
    return text[text.index(f"{name}() {{") :].split("\n}\n")[0] + "\n}"


def test_what_a_folder_says_of_itself_steers_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "SOURCE").write_bytes(b"multi30k-de-en: \x1b]0;title\x07\x1b[2J here\n")
    run = get_data("multi30k-de-en", tmp_path / "out", env=environment(tmp_path))
    assert run.returncode == 0
    assert "\x1b" not in run.stderr
    assert "here" in run.stderr
