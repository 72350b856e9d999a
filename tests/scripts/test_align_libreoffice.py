"""scripts/align_libreoffice.py on pages written here: what is read, how it is split, which rule drops what."""

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "align_libreoffice.py"
SPLITS = ("train", "valid", "test")


def write_page(helpdir: Path, path: str, paragraphs: list[tuple[str, str]]) -> None:
    """One page in both languages: paragraph i has the id par_i, in German and in English."""
    for language, side in (("de", 0), ("en-US", 1)):
        page = helpdir / language / path
        page.parent.mkdir(parents=True, exist_ok=True)
        body = "\n".join(f'<p id="par_{i}" class="paragraph">{pair[side]}</p>' for i, pair in enumerate(paragraphs))
        page.write_text(f"<html><head><title>Titel</title></head><body>{body}</body></html>", encoding="utf-8")


def align(helpdir: Path, outdir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(helpdir), str(outdir), *options]
    return subprocess.run(command, capture_output=True, text=True)


def read_pairs(outdir: Path, split: str) -> list[tuple[str, str]]:
    de, en = ((outdir / f"{split}.{language}").read_text(encoding="utf-8").splitlines() for language in ("de", "en"))
    return list(zip(de, en, strict=True))


def by_hash(paths: list[str]) -> list[str]:
    return sorted(paths, key=lambda path: hashlib.sha256(path.encode()).hexdigest())


def align_paragraphs(tmp_path: Path, paragraphs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The training pairs that a page gives, and how many each rule dropped. Two more pages fill valid and test."""
    fillers = [
        [("Das ist die erste Seite.", "This is the first page.")],
        [("Hier steht noch etwas.", "More is here now.")],
    ]
    test, valid, train = by_hash(["a.html", "b.html", "text/c.html"])
    write_page(tmp_path / "help", test, fillers[0])
    write_page(tmp_path / "help", valid, fillers[1])
    write_page(tmp_path / "help", train, paragraphs)
    options = ("--test-pages", "1", "--valid-pages", "1", "--min-train", "0")
    result = align(tmp_path / "help", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    assert [read_pairs(tmp_path / "out", split) for split in ("test", "valid")] == fillers
    dropped = re.search(r"dropped: (\{.*\})", result.stderr)
    assert dropped
    return read_pairs(tmp_path / "out", "train"), ast.literal_eval(dropped[1])


MAC = '<span hidden="true" class="MAC">{}</span>'
SWITCH = '<span class="switchinline">{}</span>'

# name: (German HTML, English HTML, the expected pairs)
READ = {
    "markup inside a paragraph": (
        'Wählen Sie <span class="emph">Datei</span> und\n  dann <a href="x.html">Drucken</a>.',
        'Choose <span class="emph">File</span> and\n  then <a href="x.html">Print</a>.',
        [("Wählen Sie Datei und dann Drucken.", "Choose File and then Print.")],
    ),
    "a line break is a space": (
        "Die erste Zeile<br>folgt hier.",
        "The first line<br/>comes here.",
        [("Die erste Zeile folgt hier.", "The first line comes here.")],
    ),
    "MAC is cut, the default stays": (
        "Drücken Sie " + SWITCH.format(MAC.format("Befehl") + '<span hidden="true">Strg</span>') + " und Eingabe.",
        "Please press " + SWITCH.format(MAC.format("Command") + '<span hidden="true">Ctrl</span>') + " and Enter.",
        [("Drücken Sie Strg und Eingabe.", "Please press Ctrl and Enter.")],
    ),
    "of other variants the default stays, wherever it stands": (
        "Ändern Sie "
        + SWITCH.format('<span hidden="true" class="CALC">die Tabelle</span><span hidden="true">das Dokument</span>')
        + " danach.",
        "Change "
        + SWITCH.format('<span hidden="true" class="CALC">the sheet</span><span hidden="true">the document</span>')
        + " afterwards.",
        [("Ändern Sie das Dokument danach.", "Change the document afterwards.")],
    ),
    "without a default the first that is not MAC": (
        "Siehe auch "
        + SWITCH.format(MAC.format("nichts") + '<span hidden="true" class="WRITER">den Absatz</span>')
        + " dort.",
        "See also "
        + SWITCH.format(MAC.format("none") + '<span hidden="true" class="WRITER">that paragraph</span>')
        + ".",
        [("Siehe auch den Absatz dort.", "See also that paragraph.")],
    ),
    "a switch around whole paragraphs": (
        '<span class="switch">'
        + MAC.format('<p id="par_m">Nur für einen Mac.</p>')
        + '<span hidden="true" class="WIN">'
        '<p id="par_w">Nur für dieses Windows.</p></span></span>',
        '<span class="switch">' + MAC.format('<p id="par_m">Only for a Mac.</p>') + '<span hidden="true" class="WIN">'
        '<p id="par_w">Only for this one.</p></span></span>',
        [("Nur für dieses Windows.", "Only for this one.")],
    ),
    "entities, soft hyphens, no-break and zero-width spaces, NFC": (
        "F&uuml;r &quot;Gr&ouml;&szlig;e&quot; gilt: Silben&shy;trennung&nbsp;ist a\u0308hn\u200blich.",
        "For &quot;size&quot; this holds: hyphen&#173;ation&#160;is alike.",
        [('Für "Größe" gilt: Silbentrennung ist ähnlich.', 'For "size" this holds: hyphenation is alike.')],
    ),
    "as many sentences on both sides: pairs of sentences": (
        "Öffnen Sie die Datei. Klappt das nicht? Dann „hilft“ nur Geduld.",
        "Open the file first. Does it not work? Then only patience helps.",
        [
            ("Öffnen Sie die Datei.", "Open the file first."),
            ("Klappt das nicht?", "Does it not work?"),
            ("Dann „hilft“ nur Geduld.", "Then only patience helps."),
        ],
    ),
    "another number of sentences: the paragraph stays whole": (
        "Öffnen Sie das Menü. Wählen Sie dort die Farbe.",
        "Open the menu and choose the colour there.",
        [("Öffnen Sie das Menü. Wählen Sie dort die Farbe.", "Open the menu and choose the colour there.")],
    ),
    "abbreviations and ordinals end no sentence": (
        "Das gilt z. B. Für den 3. Januar bzw. Februar. Es gilt z.B. Nicht im Mai.",
        "That holds e.g. On the 3. January or February, cf. March. It does not, e.g. Hardly, in May.",
        [
            (
                "Das gilt z. B. Für den 3. Januar bzw. Februar.",
                "That holds e.g. On the 3. January or February, cf. March.",
            ),
            ("Es gilt z.B. Nicht im Mai.", "It does not, e.g. Hardly, in May."),
        ],
    ),
    "inner elements with an id stand alone": (
        'Text der Zeile<ul><li id="li_1">Ein eigener Punkt hier</li></ul>',
        'Text of the row<ul><li id="li_1">An item of its own</li></ul>',
        [("Ein eigener Punkt hier", "An item of its own"), ("Text der Zeile", "Text of the row")],
    ),
    "one placeholder, the same on both sides": (
        "Starten Sie %PRODUCTNAME noch einmal.",
        "Start %PRODUCTNAME once more.",
        [("Starten Sie %PRODUCTNAME noch einmal.", "Start %PRODUCTNAME once more.")],
    ),
    "a placeholder in braces is no code": (
        "Ersetzen Sie {name} durch etwas.",
        "Replace {name} by something else.",
        [("Ersetzen Sie {name} durch etwas.", "Replace {name} by something else.")],
    ),
    "a plural in brackets is no code, a hyphen and a slash are no path": (
        "Wählen Sie die Zelle(n) der Kopf-/Fußzeile aus.",
        "Select the cell(s) of the header and/or footer.",
        [("Wählen Sie die Zelle(n) der Kopf-/Fußzeile aus.", "Select the cell(s) of the header and/or footer.")],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_reads(name: str, tmp_path: Path) -> None:
    de, en, expected = READ[name]
    assert align_paragraphs(tmp_path, [(de, en)]) == (expected, {})


def words(n: int, language: str) -> str:
    """n different words, spelled with letters only."""
    return " ".join(language + chr(97 + i // 26) + chr(97 + i % 26) for i in range(n))


# rule: pairs that it drops
DROPPED = {
    "length": [
        ("Zwei Worte", "Two little words"),
        ("Drei kleine Worte", "Two words"),
        (words(61, "de"), words(60, "en")),
        (words(60, "de"), words(61, "en")),
    ],
    "length ratio": [(words(4, "de"), words(9, "en")), (words(8, "de"), words(3, "en"))],
    "placeholder": [
        ("Starten Sie %PRODUCTNAME noch einmal.", "Start the program once more."),
        ("Ersetzen Sie {Datei} durch etwas.", "Replace {file} by something else."),
        ("Kopieren Sie %1 neben das $[officename].", "Then copy %1 next to $[officename]."),
    ],
    "URL": [
        ("Hilfe gibt es auf https://example.org heute.", "Find today's help on https://example.org now."),
        ("Hilfe gibt es auf www.example.org heute.", "Find help today on our own pages."),
    ],
    "path": [
        ("Sie liegt im Ordner /usr/share dort.", "You find it in the folder there."),
        (r"Sie liegt im Ordner C:\Programme dort.", "You find it in the folder there."),
        ("Löschen Sie die Datei settings.xml dort.", "Remove the file with the settings there."),
    ],
    "markup": [("Das Element &lt;table&gt; ist eine Tabelle.", "The element for tables is a table.")],
    "code": [
        ("Rufen Sie Summe(x) auf dem Blatt.", "Now call the sum on the sheet."),
        ("Der Name meine_variable ist erlaubt hier.", "The name of a variable is allowed."),
        ("Der Wert von myVariable ist nun bekannt.", "The value of it is known now."),
        ("Geben Sie <code>print</code> in die Zeile ein.", "Type the <code>print</code> command into that line."),
        ("Geben Sie <pre>print 1</pre> in die Zeile ein.", "Type the command into that line."),
    ],
    "letters": [("Das ist 100 000 mal 200", "That is 100 000 times 200"), ("Sieb oder 123", "Or the sieve of it")],
    "untranslated": [
        ("This page was never translated.", "This page was never translated."),
        ("Nicht translated was this page never.", "This page was never translated, alas."),
    ],
    "duplicate": [
        ("Das ist DIE erste Seite.", "THIS is the first page."),
        ("Ein Satz steht hier.", "Here is a Sentence."),
    ],
}


@pytest.mark.parametrize("rule", DROPPED)
def test_drops(rule: str, tmp_path: Path) -> None:
    good = ("Ein Satz steht hier.", "Here is a sentence.")
    assert align_paragraphs(tmp_path, [good, *DROPPED[rule]]) == ([good], {rule: len(DROPPED[rule])})


@pytest.mark.parametrize(
    ("n_de", "n_en"), [(3, 3), (60, 60), (5, 11), (13, 5)], ids=["shortest", "longest", "ratio 0.4545", "ratio 2.6"]
)
def test_keeps_at_the_bounds(n_de: int, n_en: int, tmp_path: Path) -> None:
    pair = (words(n_de, "de"), words(n_en, "en"))
    assert align_paragraphs(tmp_path, [pair]) == ([pair], {})


def test_keeps_80_percent_letters_and_60_percent_overlap(tmp_path: Path) -> None:
    pairs = [("Vier oder 11", "Four words altogether"), ("Alpha Beta Gamma eins zwei", "Alpha Beta Gamma one two")]
    assert align_paragraphs(tmp_path, pairs) == (pairs, {})


def test_paragraphs_are_matched_by_id(tmp_path: Path) -> None:
    """Another order, an id of one side only, elements without id, and scripts do not matter."""
    texts = {
        "de": """
            <h1 id="hd_1">Eine kleine Überschrift</h1>
            <p id="par_2">Der zweite Absatz hier.</p>
            <p>Ohne jedes Kennzeichen.</p>
            <script>var text = '<p id="par_4">Steht nur im Skript.</p>';</script>
            <p id="nur_de">Nur auf Deutsch vorhanden.</p>
            <p id="par_1">Der erste Absatz hier.</p>""",
        "en-US": """
            <h1 id="hd_1">A little heading</h1>
            <p id="par_1">The first paragraph here.</p>
            <p>Without any mark here.</p>
            <p id="par_2">The second paragraph here.</p>
            <p id="par_4">Only in English here.</p>""",
    }
    test, valid, train = by_hash(["a.html", "b.html", "c.html"])
    write_page(tmp_path / "help", test, [("Das ist die erste Seite.", "This is the first page.")])
    write_page(tmp_path / "help", valid, [("Hier steht noch etwas.", "More is here now.")])
    for language, text in texts.items():
        (tmp_path / "help" / language / train).write_text(f"<html><body>{text}</body></html>", encoding="utf-8")
    result = align(tmp_path / "help", tmp_path / "out", "--test-pages=1", "--valid-pages=1", "--min-train=0")
    assert result.returncode == 0, result.stderr
    assert read_pairs(tmp_path / "out", "train") == [
        ("Eine kleine Überschrift", "A little heading"),
        ("Der erste Absatz hier.", "The first paragraph here."),
        ("Der zweite Absatz hier.", "The second paragraph here."),
    ]


def test_splits_by_page(tmp_path: Path) -> None:
    """Whole pages in the order of the hash, the first pairs of test and valid, and no sentence in two splits."""
    names = (
        ("eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben"),
        ("one", "two", "three", "four", "five", "six", "seven"),
    )
    paths = by_hash([f"text/{name}.html" for name in names[1]])
    pairs = {
        path: [
            (f"Die {a} Seite hat {x} Sätze.", f"The {b} page has {y} sentences.") for x, y in zip(*names, strict=True)
        ][:3]
        for path, a, b in zip(paths, *names, strict=True)
    }
    # In a training page: a test sentence with other punctuation, and a validation sentence with another translation.
    leaks = [
        (pairs[paths[0]][0][0] + "..", "Quite another sentence here."),
        ("Ein ganz anderer Satz.", pairs[paths[2]][1][1]),
    ]
    for path in paths:
        write_page(tmp_path / "help", path, pairs[path] + (leaks if path == paths[-1] else []))
    # a page that only one language has
    (tmp_path / "help/en-US/only.html").write_text('<p id="par_0">This page is English only.</p>', encoding="utf-8")

    outputs = []
    for outdir in (tmp_path / "out", tmp_path / "again"):
        result = align(tmp_path / "help", outdir, "--test-pages=2", "--valid-pages=2", "--max-pairs=5", "--min-train=9")
        assert result.returncode == 0, result.stderr
        assert "'page in one language only': 1" in result.stderr
        outputs.append({path.name: path.read_bytes() for path in outdir.iterdir()})
    assert outputs[0] == outputs[1]
    assert sorted(outputs[0]) == sorted(f"{split}.{language}" for split in SPLITS for language in ("de", "en"))
    assert read_pairs(tmp_path / "out", "test") == [pair for path in paths[:2] for pair in pairs[path]][:5]
    assert read_pairs(tmp_path / "out", "valid") == [pair for path in paths[2:4] for pair in pairs[path]][:5]
    assert read_pairs(tmp_path / "out", "train") == [pair for path in paths[4:] for pair in pairs[path]]


def test_too_little_is_an_error(tmp_path: Path) -> None:
    write_page(tmp_path / "help", "a.html", [("Das ist die erste Seite.", "This is the first page.")])
    write_page(tmp_path / "help", "b.html", [("Hier steht noch etwas.", "More is here now.")])
    write_page(tmp_path / "help", "c.html", [("Und noch eine Seite.", "And one more page.")])
    for valid_pages, complaint in (("0", "only 0 pairs for valid"), ("1", "only 1 pairs for train")):
        result = align(tmp_path / "help", tmp_path / "out", "--test-pages=1", "--valid-pages", valid_pages)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == (
            f"align_libreoffice.py: HELPDIR {tmp_path / 'help'} gives {complaint}: it is not the whole help"
        )
        assert not (tmp_path / "out").exists()


def test_wrong_folder_is_an_error(tmp_path: Path) -> None:
    result = align(tmp_path, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == (
        f"align_libreoffice.py: HELPDIR {tmp_path} has no folder de: give the folder usr/share/libreoffice/help\n"
    )
