"""Align the German and English LibreOffice help into a parallel corpus: align_libreoffice.py HELPDIR OUTDIR.

HELPDIR holds ``de/`` and ``en-US/``, two trees of HTML pages with the same paths and the same element ids (in the
packages ``libreoffice-help-de`` and ``libreoffice-help-en-us``: ``usr/share/libreoffice/help``). OUTDIR gets
``{train,valid,test}.{de,en}``, one sentence a line. Standard library only; the same HELPDIR gives the same bytes.

The corpus is split by page: the sentences of a page are similar to each other, so that a split by sentence would put
near copies of training sentences into the test set. Pages are ordered by a hash of their path, so that their order does
not change when pages are added or removed.
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

# Placeholder for code that is cut out of a paragraph, by which the incomplete sentence is recognised and dropped.
HOLE = "\ufffc"

MIN_WORDS, MAX_WORDS = 3, 60
MIN_RATIO, MAX_RATIO = 0.45, 2.6  # words of German / words of English
MIN_LETTERS = 0.8  # share of the characters other than spaces
MAX_OVERLAP = 0.6  # share of the shorter side's distinct words that are also on the other side


# ---------------------------------------------------------------------------------------------------- reading a page


class Page(HTMLParser):
    """Collects the text of every element of BLOCKS that has an id: ``paragraphs[id, n]`` is the n-th with that id.

    A paragraph may hold variants for one system or application, of which the browser shows one::

        <span class="switchinline"><span hidden class="MAC">A</span><span hidden>B</span></span>

    Only one variant is kept: the default (without a class) if there is one, else the first. MAC variants are ignored.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: dict[tuple[str, int], str] = {}
        self._seen: Counter[str] = Counter()
        # Open elements, innermost last: (tag, role, detail). The roles "block" and "variant" collect text, and `detail`
        # is their id or class; a "switch" contains variants; text inside a "cut" is ignored; "" is any other element.
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
            # A switch outside of a paragraph contains whole paragraphs, of which only those for MAC are cut.
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
                    self.handle_data(min(variants, key=lambda variant: variant[0] != "")[1])  # the first of equals
            if name == tag:
                break
        if tag in BLOCKS or tag in {"div", "tr"}:
            self.handle_data(" ")  # separates the words of adjacent blocks

    def handle_data(self, data: str) -> None:
        if self._text and not any(role == "cut" for _, role, _ in self._open):
            self._text[-1].append(data)


def read_page(path: Path) -> dict[tuple[str, int], str]:
    page = Page()
    try:
        if not path.is_file():  # a pipe or device
            raise OSError("it is no file")
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
    except (OSError, ValueError, AssertionError) as error:  # AssertionError: raised by HTMLParser for <![
        fail(f"{path} cannot be read ({error}): get the packages anew")
    return {key: normalise(text) for key, text in page.paragraphs.items()}


def normalise(text: str) -> str:
    """Normalise to NFC, remove invisible characters (soft hyphens, zero-width) and reduce white space to one space."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = re.sub(r"\s+", " ", text)  # \s includes no-break spaces
    return text.strip()


# ------------------------------------------------------------------------------------------------ splitting sentences

# Abbreviations, in lower case and without the full stop, which does not end a sentence after them.
ABBREVIATIONS = {
    "abb", "abs", "allg", "art", "bspw", "bzgl", "bzw", "ca", "d", "dgl", "ebd", "engl", "etc", "evtl", "gegr", "ggf",
    "h", "inkl", "insb", "max", "min", "mind", "mio", "mrd", "nr", "o", "s", "sog", "std", "str", "tab", "u", "usw",
    "v", "vgl", "z", "zb", "zzgl", "a", "b", "e", "g", "i", "approx", "cf", "dr", "fig", "incl", "inc", "jr", "mr",
    "mrs", "no", "p", "pp", "prof", "resp", "vs",
}  # fmt: skip
# A possible sentence boundary: . ! ? or …, optional closing quotes or brackets, white space, optional opening quotes or
# brackets, and a capital letter or a digit.
BOUNDARY = re.compile(r"""(?<=[.!?…])([)\]"'”“’«»]*)\s+(?=[("'“„‚‘«»\[]*[A-ZÄÖÜ0-9])""")


def split_sentences(text: str) -> list[str]:
    """Split a normalised paragraph into sentences. Both languages have the same rules, so that they split alike."""
    sentences, start = [], 0
    for match in BOUNDARY.finditer(text):
        before = text[start : match.start()]
        word = re.search(r"([^\s(\[\"'“„]+)\.$", before)  # the word before the full stop
        if word:
            last = word[1].lower().rsplit(".", 1)[-1]  # "z.B." -> "b"
            if last in ABBREVIATIONS or last.isdigit():  # an ordinal ("3. Januar") or a numbered list
                continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


# --------------------------------------------------------------------------------------------------- keeping a pair

PLACEHOLDER = re.compile(r"%[A-Z][A-Z0-9]+|%\d+|\$\[\w+\]|\$\{\w+\}|\$\(\w+\)|\{\w*\}")
URL = re.compile(r"\w+://|\bwww\.|\S@\S+\.\w|\bmailto:", re.IGNORECASE)
# A drive letter, a backslash, a name between two slashes, a name that begins with a slash, or a file name, but not
# "and/or" and the German "Kopf-/Fußzeile".
PATH = re.compile(
    r"""\b[A-Z]:[\\/]|\\\w|[\\/][\w.{}$~-]+[\\/]|(?:^|[\s"'(„])[~.]*/\w|"""
    r"""\b[\w-]+\.(?:html?|xml|xhp|xcu|ini|exe|dll|py|sh)\b"""
)
MARKUP = re.compile(r"</?\w|\w>|/>|&\w+;")
# Characters that do not occur in prose; function calls, but not "file(s)" or "Datei(en)"; operators;
# names_with_underscores and camelCase; keywords of BASIC that are not English words.
CODE_LIKE = re.compile(
    r"[{}|^`\\~" + HOLE + r"]|\w\((?!(?:s|e|es|n|en|er|r)\))\S|\)\s*;|;\s*\S+;|==|:=|<>|\w=\w|\w_\w|\b[a-z]{2,}[A-Z]|"
    r"\b(?:End (?:Sub|Function|If)|Dim|ByVal|MsgBox|com\.sun\.star)\b"
)


def reason_to_drop(de: str, en: str) -> str | None:
    """Return the name of the first rule that a sentence pair violates, or None if it is to be kept."""
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
    """Return the sentence pairs (German, English) of two pages, unfiltered and in the order of the English page.

    A paragraph whose two sides split into different numbers of sentences becomes one pair.
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
    """Return the kept sentence pairs by page, and the number of dropped pairs, or whole pages, by reason.

    Pages are processed and returned in the order of a hash of their path; pages without a kept pair are left out. A
    pair that occurs several times, ignoring case, is kept at its first occurrence only.
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
    """Split the corpus: the first pages are the test set and the next ones the validation set, of which at most
    `max_pairs` pairs are kept each, and the others are the training set.

    Pages share stock phrases, with different translations or punctuation. So that no sentence of the test set is in
    the training set, a pair is dropped if one of its sides is already in an earlier split.
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
