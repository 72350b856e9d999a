"""Align the German and English LibreOffice help into a parallel corpus: align_libreoffice.py HELPDIR OUTDIR.

HELPDIR holds ``de/`` and ``en-US/``, two trees of HTML pages with the same paths and the same element ids (in the
packages ``libreoffice-help-de`` and ``libreoffice-help-en-us``: ``usr/share/libreoffice/help``). OUTDIR gets
``{train,valid,test}.{de,en}``, one sentence a line. Standard library only; the same HELPDIR gives the same bytes.

The split is by PAGE: sentences of one page are near copies of each other, so a split by sentence would test on what
was trained on. Pages are ordered by a hash of their path, so a page keeps its place when other pages come or go.
"""

import argparse
import hashlib
import re
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "dt", "dd"}
CODE = {"script", "style", "pre", "code"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}

# Stands where code was cut out of a paragraph, so that the sentence with the hole is recognised and dropped.
HOLE = "\ufffc"

MIN_WORDS, MAX_WORDS = 3, 60
MIN_RATIO, MAX_RATIO = 0.45, 2.6  # words of German / words of English
MIN_LETTERS = 0.8  # of the characters that are not spaces
MAX_OVERLAP = 0.6  # of the shorter side's distinct words also found on the other side: more is not a translation


# ---------------------------------------------------------------------------------------------------- reading a page


class Page(HTMLParser):
    """Collects the text of every element of BLOCKS that has an id: ``paragraphs[id, n]`` is the n-th with that id.

    A paragraph may hold variants for one system or application, of which the browser shows one::

        <span class="switchinline"><span hidden class="MAC">A</span><span hidden>B</span></span>

    Kept is the default (no class), else the first that is not MAC; MAC never.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: dict[tuple[str, int], str] = {}
        self._seen: Counter[str] = Counter()
        # Open elements, innermost last: (tag, role, detail). Roles: "block" and "variant" collect text, for the id or
        # the class in `detail`; "switch" holds variants; nothing inside "cut" is read; "" is any other element.
        self._open: list[tuple[str, str, str]] = []
        self._text: list[list[str]] = []  # one list per open "block" or "variant"
        self._variants: list[list[tuple[str, str]]] = []  # one list of (class, text) per open "switch"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_data(" ")
            return
        attributes = dict(attrs)
        classes = (attributes.get("class") or "").split()
        role, detail = "", ""
        if tag in CODE:
            role = "cut"
            self.handle_data(HOLE)
        elif tag in BLOCKS and attributes.get("id"):
            role, detail = "block", attributes["id"] or ""
            self._text.append([])
        elif self._text and {"switchinline", "switch"} & set(classes):
            role = "switch"
            self._variants.append([])
        elif tag == "span" and "hidden" in attributes:
            # A switch outside of a paragraph holds whole paragraphs: MAC's are cut, all others are text.
            if "MAC" in classes:
                role = "cut"
            elif self._open and self._open[-1][1] == "switch":
                role, detail = "variant", " ".join(classes)
                self._text.append([])
        self._open.append((tag, role, detail))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _, _ in self._open):
            return
        while self._open:
            name, role, detail = self._open.pop()
            if role == "block":
                text = "".join(self._text.pop())
                self.paragraphs[detail, self._seen[detail]] = text
                self._seen[detail] += 1
            elif role == "variant":
                self._variants[-1].append((detail, "".join(self._text.pop())))
            elif role == "switch":
                variants = self._variants.pop()
                if variants:
                    self.handle_data(min(variants, key=lambda variant: variant[0] != "")[1])  # min: the first of equals
            if name == tag:
                break
        if tag in BLOCKS or tag in {"div", "tr"}:
            self.handle_data(" ")  # two blocks never run together into one word

    def handle_data(self, data: str) -> None:
        if self._text and not any(role == "cut" for _, role, _ in self._open):
            self._text[-1].append(data)


def read_page(path: Path) -> dict[tuple[str, int], str]:
    page = Page()
    try:
        if not path.is_file():  # a pipe or device of that name
            raise OSError("it is no file")
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
    except (OSError, ValueError, AssertionError) as error:  # the last: of <![, in Python's parser
        fail(f"{path} cannot be read ({error}): get the packages anew")
    return {key: normalise(text) for key, text in page.paragraphs.items()}


def normalise(text: str) -> str:
    """NFC, no invisible characters (soft hyphen, zero-width), every run of white space one space."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = re.sub(r"\s+", " ", text)  # no-break spaces are white space too
    return text.strip()


# ------------------------------------------------------------------------------------------------ splitting sentences

# A full stop after one of these ends no sentence. Lower case; compared without the stop.
ABBREVIATIONS = {
    "abb", "abs", "allg", "art", "bspw", "bzgl", "bzw", "ca", "d", "dgl", "ebd", "engl", "etc", "evtl", "gegr", "ggf",
    "h", "inkl", "insb", "max", "min", "mind", "mio", "mrd", "nr", "o", "s", "sog", "std", "str", "tab", "u", "usw",
    "v", "vgl", "z", "zb", "zzgl", "a", "b", "e", "g", "i", "approx", "cf", "dr", "fig", "incl", "inc", "jr", "mr",
    "mrs", "no", "p", "pp", "prof", "resp", "vs",
}  # fmt: skip
# Where a sentence may end: . ! ? or …, perhaps a closing quote or bracket, a space, and what can begin a sentence.
BOUNDARY = re.compile(r"""(?<=[.!?…])([)\]"'”“’«»]*)\s+(?=[("'“„‚‘«»\[]*[A-ZÄÖÜ0-9])""")


def split_sentences(text: str) -> list[str]:
    """Sentences of a normalised paragraph; the same rules for both languages, so that both sides split alike."""
    sentences, start = [], 0
    for match in BOUNDARY.finditer(text):
        before = text[start : match.start()]
        word = re.search(r"([^\s(\[\"'“„]+)\.$", before)  # the word that the full stop follows
        if word:
            last = word[1].lower().rsplit(".", 1)[-1]  # "z.B." -> "b"
            if last in ABBREVIATIONS or last.isdigit():  # "3. Januar": an ordinal, or a numbered list
                continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


# --------------------------------------------------------------------------------------------------- keeping a pair

PLACEHOLDER = re.compile(r"%[A-Z][A-Z0-9]+|%\d+|\$\[\w+\]|\$\{\w+\}|\$\(\w+\)|\{\w*\}")
URL = re.compile(r"\w+://|\bwww\.|\S@\S+\.\w|\bmailto:", re.IGNORECASE)
# A drive, a backslash, a name between two slashes, a name that begins with a slash, a file name. "and/or" and the
# German "Kopf-/Fußzeile" are no paths.
PATH = re.compile(
    r"""\b[A-Z]:[\\/]|\\\w|[\\/][\w.{}$~-]+[\\/]|(?:^|[\s"'(„])[~.]*/\w|"""
    r"""\b[\w-]+\.(?:html?|xml|xhp|xcu|ini|exe|dll|py|sh)\b"""
)
MARKUP = re.compile(r"</?\w|\w>|/>|&\w+;")
# Characters that no prose has; calls, but "file(s)" and "Datei(en)" are none; operators; names_with_underscores and
# camelCase; the keywords of BASIC that are no words.
CODE_LIKE = re.compile(
    r"[{}|^`\\~" + HOLE + r"]|\w\((?!(?:s|e|es|n|en|er|r)\))\S|\)\s*;|;\s*\S+;|==|:=|<>|\w=\w|\w_\w|\b[a-z]{2,}[A-Z]|"
    r"\b(?:End (?:Sub|Function|If)|Dim|ByVal|MsgBox|com\.sun\.star)\b"
)


def reason_to_drop(de: str, en: str) -> str | None:
    """The name of the first rule that the pair breaks, None for a good pair."""
    words_de, words_en = de.split(), en.split()
    if not all(MIN_WORDS <= len(words) <= MAX_WORDS for words in (words_de, words_en)):
        return "length"
    if not MIN_RATIO <= len(words_de) / len(words_en) <= MAX_RATIO:
        return "length ratio"
    placeholders_de, placeholders_en = PLACEHOLDER.findall(de), PLACEHOLDER.findall(en)
    if len(placeholders_de) > 1 or placeholders_de != placeholders_en:
        return "placeholder"
    for side in (de, en):
        text = PLACEHOLDER.sub("", side)
        if URL.search(text):
            return "URL"
        if PATH.search(text):
            return "path"
        if MARKUP.search(text):
            return "markup"
        if CODE_LIKE.search(text):
            return "code"
        characters = side.replace(" ", "")
        if sum(c.isalpha() for c in characters) < MIN_LETTERS * len(characters):
            return "letters"
    tokens_de, tokens_en = (set(re.findall(r"\w+", side.lower())) for side in (de, en))
    shorter = min(len(tokens_de), len(tokens_en))
    if len(tokens_de & tokens_en) > MAX_OVERLAP * shorter:
        return "untranslated"
    return None


def align(page_de: dict[tuple[str, int], str], page_en: dict[tuple[str, int], str]) -> list[tuple[str, str]]:
    """Sentence pairs of two pages, in the English page's order; unfiltered.

    Where the two sides of a paragraph split into different numbers of sentences, the paragraph stays whole: it is a
    translation still, only a longer one.
    """
    pairs = []
    for key, en in page_en.items():
        de = page_de.get(key, "")
        if not de or not en:
            continue
        sentences_de, sentences_en = split_sentences(de), split_sentences(en)
        if len(sentences_de) == len(sentences_en):
            pairs.extend(zip(sentences_de, sentences_en, strict=True))
        else:
            pairs.append((de, en))
    return pairs


# ----------------------------------------------------------------------------------------------------- the corpus


def collect(helpdir: Path) -> tuple[dict[str, list[tuple[str, str]]], Counter[str]]:
    """Kept pairs of each page that has any, unique over all pages (ignoring case), and how many each rule dropped.

    Pages are visited, and returned, in the order of a hash of their path. Of a pair that many pages have, the first
    page keeps it.
    """
    paths = sorted(
        (path.relative_to(helpdir / "en-US").as_posix() for path in (helpdir / "en-US").rglob("*.html")),
        key=lambda path: hashlib.sha256(path.encode()).hexdigest(),
    )
    pages: dict[str, list[tuple[str, str]]] = {}
    dropped: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for path in paths:
        if not (helpdir / "de" / path).is_file():
            dropped["page in one language only"] += 1
            continue
        kept = []
        for de, en in align(read_page(helpdir / "de" / path), read_page(helpdir / "en-US" / path)):
            reason = reason_to_drop(de, en)
            if reason is None and (de.casefold(), en.casefold()) in seen:
                reason = "duplicate"
            if reason is None:
                seen.add((de.casefold(), en.casefold()))
                kept.append((de, en))
            else:
                dropped[reason] += 1
        if kept:
            pages[path] = kept
    return pages, dropped


def split_by_page(
    pages: list[list[tuple[str, str]]], test_pages: int, valid_pages: int, max_pairs: int
) -> dict[str, list[tuple[str, str]]]:
    """The first pages for test, the next for validation (the first `max_pairs` pairs of each), the rest for training.

    Pages share stock phrases whose translation, or only its punctuation, differs: a pair goes if either of its sides
    is in a split that was filled before, so that no test sentence was trained on.
    """
    parts = {
        "test": pages[:test_pages],
        "valid": pages[test_pages : test_pages + valid_pages],
        "train": pages[test_pages + valid_pages :],
    }
    held_out: set[str] = set()
    splits = {}
    for name, part in parts.items():
        pairs = [(de, en) for page in part for de, en in page if held_out.isdisjoint({words_of(de), words_of(en)})]
        splits[name] = pairs if name == "train" else pairs[:max_pairs]
        held_out.update(words_of(side) for pair in splits[name] for side in pair)
    return splits


def words_of(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def fail(sentence: str) -> NoReturn:
    sys.exit(f"align_libreoffice.py: {sentence}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("helpdir", type=Path)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--test-pages", type=int, default=80, metavar="N")
    parser.add_argument("--valid-pages", type=int, default=70, metavar="N")
    parser.add_argument("--max-pairs", type=int, default=1000, metavar="N", help="of test and of valid (default 1000)")
    parser.add_argument("--min-train", type=int, default=30000, metavar="N", help="fail with less (default 30000)")
    args = parser.parse_args()
    for language in ("de", "en-US"):
        if not (args.helpdir / language).is_dir():
            fail(f"HELPDIR {args.helpdir} has no folder {language}: give the folder usr/share/libreoffice/help")

    pages, dropped = collect(args.helpdir)
    splits = split_by_page(list(pages.values()), args.test_pages, args.valid_pages, args.max_pairs)
    print(f"align_libreoffice.py: {len(pages)} pages; dropped: {dict(dropped.most_common())}", file=sys.stderr)
    for split, pairs in splits.items():
        if len(pairs) < (args.min_train if split == "train" else 1):
            fail(f"HELPDIR {args.helpdir} gives only {len(pairs)} pairs for {split}: it is not the whole help")
    args.outdir.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        for side, language in enumerate(("de", "en")):
            text = "".join(pair[side] + "\n" for pair in pairs)
            try:
                (args.outdir / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
            except OSError as error:
                fail(f"{args.outdir / split}.{language} cannot be written: {error.strerror}")
        print(f"align_libreoffice.py: {split}: {len(pairs)} pairs", file=sys.stderr)


if __name__ == "__main__":
    main()
