"""Cut-down copies of the recipes' original downloads, in their formats: same names, same markup, made-up sentences."""

import gzip
import hashlib
import io
import random
import tarfile
from pathlib import Path

WORDS = """der the, die this, ein a, Mann man, Frau woman, Hund dog, Straße street, läuft runs, sitzt sits, über over,
grün green, schwarz black, Ball ball, Wasser water, spielt plays, und and, mit with, groß big, klein small, Haus home"""
GERMAN, OTHER = zip(*(pair.split() for pair in WORDS.split(",")), strict=True)
# Sentences by hand, the first of each test set: a quotation mark, an apostrophe and a hyphenated compound.
BY_HAND = {
    "de": 'Er sagt: "Das ist Peter\'s Fußball-Verein."',
    "en": "He says: \"That's Peter's football-club.\"",
}


def sentences(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Pairs that can be learnt: the other side has the word of the same number, now and then another one."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = [rng.randrange(len(GERMAN)) for _ in range(rng.randint(4, 10))]
        german = " ".join(GERMAN[i] for i in words).capitalize() + "."
        other = [i if rng.random() < 0.9 else rng.randrange(len(OTHER)) for i in words]
        pairs.append((german, " ".join(OTHER[i] for i in other).capitalize() + "."))
    return [german for german, _ in pairs], [other for _, other in pairs]


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def tgz(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def segments(texts: list[str]) -> str:
    """A test set as WMT's .sgm and IWSLT's .xml files have it."""
    body = "".join(f'<seg id="{i}"> {text} </seg>\n' for i, text in enumerate(texts, 1))
    return f'<?xml version="1.0"?>\n<doc docid="1">\n<talkid>1</talkid>\n{body}</doc>\n'


def iwslt14(folder: Path) -> None:
    """de-en.tgz: 230 usable training pairs (and 4 that cleaning drops), 5 test sets of 4."""
    german, english = sentences(229, 1)
    # Dropped: an empty side, a side too long, a side more than 1.5 times the other. The 230th is the title.
    german += ["", "lang " * 180, "kurz", "eins zwei drei vier fünf sechs"]
    english += ["nothing there", "long " * 180, "three words here", "one two"]
    head = "<url>http://talk</url>\n<keywords>talks</keywords>\n<talkid>1</talkid>\n<title>{} </title>\n"
    files = {}
    for language, texts in (("de", german), ("en", english)):
        files[f"de-en/train.tags.de-en.{language}"] = head.format(BY_HAND[language]) + lines(texts)
    for number, name in enumerate(("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")):
        for language, texts in zip(("de", "en"), sentences(3, 10 + number), strict=True):
            files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = segments([BY_HAND[language], *texts])
    tgz(folder / "de-en.tgz", files)


def iwslt15(folder: Path) -> None:
    """Six files of tokens; one training pair has an empty side."""
    for name, count in (("train", 230), ("tst2012", 16), ("tst2013", 16)):
        for language, texts in zip(("vi", "en"), sentences(count, count), strict=True):
            tokens = [text.replace(".", " .").replace("ß", "ộ") for text in texts]
            empty = ["" if language == "vi" else "nothing there"] if name == "train" else []
            (folder / f"{name}.{language}").write_text(lines(tokens + empty))


def wmt14(folder: Path) -> None:
    """Five archives; one training pair is too uneven."""
    corpora = {
        "training-parallel-europarl-v7.tgz": ("training/europarl-v7.de-en", 120),
        "training-parallel-commoncrawl.tgz": ("commoncrawl.de-en", 80),
        "training-parallel-nc-v12.tgz": ("training/news-commentary-v12.de-en", 30),
        "dev.tgz": ("dev/newstest2013", 16),
    }
    for archive, (prefix, count) in corpora.items():
        german, english = sentences(count, count)
        if archive.endswith("crawl.tgz"):
            # A carriage return and a line separator inside a line, as Common Crawl has them, end no line.
            german += [f"{german[0]}\r{german[1]}\u2028", "eins " * 30]
            english += [f"{english[0]} {english[1]}", "one"]
        tgz(folder / archive, {f"{prefix}.de": lines(german), f"{prefix}.en": lines(english)})
    german, english = sentences(15, 99)
    tgz(
        folder / "test-full.tgz",
        {
            "test-full/newstest2014-deen-ref.de.sgm": segments([BY_HAND["de"], *german]),
            "test-full/newstest2014-deen-src.en.sgm": segments([BY_HAND["en"], *english]),
        },
    )


def multi30k(folder: Path) -> dict[str, str]:
    """Six .gz files. Returns the environment that makes get_data.sh expect their hashes."""
    sums = ""
    for name, count in (("train", 230), ("val", 16), ("test_2016_flickr", 15)):
        for language, texts in zip(("de", "en"), sentences(count, count), strict=True):
            first = [BY_HAND[language]] if name.startswith("test") else []
            content = gzip.compress(lines(first + texts).encode(), mtime=0)
            (folder / f"{name}.{language}.gz").write_bytes(content)
            sums += f"{hashlib.sha256(content).hexdigest()}  {name}.{language}.gz\n"
    hashes = folder.with_name(f"{folder.name}.sha256")
    hashes.write_text(sums)
    return {"HGKD_MULTI30K_SHA256": str(hashes)}
