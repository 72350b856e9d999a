"""Train a joint sentencepiece BPE and encode a parallel corpus with it: encode_text.py TEXTDIR OUTDIR [options].

OUTDIR gets ``{train,valid,test}.LANG`` (pieces, separated by spaces; ``valid1.LANG`` too where TEXTDIR has it),
``sentencepiece.model`` and ``dict.txt``, the dictionary of both languages for fairseq. The same text and options give
the same bytes, whatever the names of the folders. With ``--model FILE`` the text is encoded with that model and none
is trained. With ``--vocab N`` as well, the model is first reduced to a dictionary of N symbols, and
``sentencepiece.model`` is the reduced model.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).parents[1]))  # use this checkout even if it is not installed

from hgkd_fairseq import files
from hgkd_fairseq.arguments import number
from hgkd_fairseq.errors import UserError, guarded

SPLITS = ("train", "valid", "test")
FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>, which fairseq puts before the entries of a dictionary file


def paper_style(language: str) -> Callable[[str], str]:
    """Return a function that tokenises and lowercases a line, as fairseq's recipe for IWSLT does. Lowercasing comes
    second because the tokeniser recognises abbreviations by their capitals."""
    from sacremoses import MosesTokenizer

    tokenizer = MosesTokenizer(language)
    return lambda line: tokenizer.tokenize(line, aggressive_dash_splits=False, escape=False, return_str=True).lower()


def train_model(sentences: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model with `vocab` pieces, including <unk>, <s> and </s>, and return it serialised.

    It has no byte fallback: ``--remove-bpe sentencepiece`` joins pieces as text, and would leave bytes as <0xE2>.
    """
    model = io.BytesIO()
    # An iterator and a writer, because file names would be stored in the model, whose bytes would depend on the folder.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Model:
    """A sentencepiece model that is checked when it is loaded.

    Args:
        serialised: content of the model file.
        name: name of the model for error messages.

    Raises:
        UserError: the model is damaged, or has a piece with white space, which separates pieces in fairseq's text.
    """

    def __init__(self, serialised: bytes, name: str):
        self.damaged = UserError(f"{name}: is no model of sentencepiece")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=serialised)
            pieces = [self.processor.id_to_piece(i) for i in range(self.processor.get_piece_size())]
        except (RuntimeError, UnicodeDecodeError):
            raise self.damaged from None
        if not pieces:  # an empty file
            raise self.damaged
        if split := next((piece for piece in pieces if piece.split() != [piece]), None):
            raise UserError(f"{name}: its piece {split!r} holds white space, which ends a piece in fairseq's text")

    def encode(self, lines: list[str]) -> list[list[str]]:
        try:
            return self.processor.encode(lines, out_type=str)
        except UnicodeDecodeError:  # the model's normalisation rules are damaged
            raise self.damaged from None


def pruned(serialised: bytes, text: Iterable[list[str]], vocab: int, name: str) -> bytes:
    """Reduce a model to a dictionary of `vocab` symbols. All characters stay, and of the longer pieces those that are
    most frequent in the text. The others are marked as unused, so that BPE splits them into the remaining ones.

    Args:
        serialised: content of the model file.
        text: lists of lines of the training text.
        vocab: size of the dictionary, including fairseq's special symbols.
        name: name of the model for error messages.

    Returns: the reduced model, serialised.

    Raises:
        UserError: `vocab` is less than the number of characters and special symbols or more than that of all symbols,
            or protobuf is not installed.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(f"--vocab {vocab} with --model needs protobuf: pip install protobuf") from None
    known = Model(serialised, name)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(serialised)
    removable = [piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    most = len(dictionary_lines(known.processor, Counter(), pad=False)) + FAIRSEQ_SPECIALS
    least = most - len(removable)
    if not least <= vocab <= most:
        raise UserError(f"--vocab {vocab}: {name} has {least} symbols that all must stay, and {most} in all")
    counts = Counter(piece for lines in text for line in known.encode(lines) for piece in line)
    removable.sort(key=lambda piece: -counts[piece.piece])
    for piece in removable[vocab - least :]:
        piece.type = piece.UNUSED
    return model.SerializeToString(deterministic=True)


def dictionary_lines(model: sentencepiece.SentencePieceProcessor, counts: Counter[str], pad: bool) -> list[str]:
    """Return the lines "piece count" of fairseq's dictionary: all pieces of the model, in its order.

    The pieces are those of the model and not those of the encoded training text, which lacks pieces that are always
    merged with others there. In validation and test text, such a piece would become <unk>; with all pieces, only
    characters that are not in the training text do. If `pad` is true, the dictionary is padded to a multiple of 8
    entries, as fairseq does for the matrix units of GPUs.
    """
    ids = range(model.get_piece_size())
    special = (model.is_control, model.is_unknown, model.is_unused)
    pieces = [model.id_to_piece(i) for i in ids if not any(is_one(i) for is_one in special)]
    padding = -(len(pieces) + FAIRSEQ_SPECIALS) % 8 if pad else 0
    return [f"{piece} {counts[piece]}" for piece in pieces] + [f"madeupword{i:04d} 0" for i in range(padding)]


def encode(args: argparse.Namespace) -> int:
    if files.same_file(args.textdir, args.outdir):
        raise UserError(f"OUTDIR {args.outdir} is TEXTDIR, whose text would be written over; name another folder")
    languages = (args.source, args.target)
    splits = [*SPLITS, *(["valid1"] if (args.textdir / f"valid1.{args.source}").exists() else [])]
    text = {}
    for language in languages:
        style = paper_style(language) if args.style == "paper" else str
        for split in splits:
            text[split, language] = [style(line) for line in files.read_lines(args.textdir / f"{split}.{language}")]
    for split in splits:
        sizes = [len(text[split, language]) for language in languages]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"TEXTDIR {args.textdir}: {split}.{args.source} has {sizes[0]} lines and "
                f"{split}.{args.target} {sizes[1]}: give a pair on each line"
            )

    if args.model is not None:
        serialised = args.model.read_bytes()
        if args.vocab:
            training = (text["train", language] for language in languages)
            serialised = pruned(serialised, training, args.vocab, f"--model {args.model}")
    else:
        args.vocab = args.vocab or 4000
        print(f"encode_text.py: training sentencepiece, {args.vocab} pieces", file=sys.stderr)
        try:
            serialised = train_model((line for language in languages for line in text["train", language]), args.vocab)
        except RuntimeError as error:  # "Vocabulary size too high (4000). Please set it to ... <= 512."
            reason = " ".join(str(error).split())
            raise UserError(f"--vocab {args.vocab} does not suit train.*: {reason}") from None
    model = Model(serialised, f"--model {args.model}")
    processor = model.processor

    args.outdir.mkdir(parents=True, exist_ok=True)
    with files.writing(args.outdir / "sentencepiece.model", "wb") as file:
        file.write(serialised)
    counts: Counter[str] = Counter()
    for (split, language), lines in text.items():
        encoded = model.encode(lines)
        pieces = Counter(piece for line in encoded for piece in line)
        unknown = sum(n for piece, n in pieces.items() if processor.piece_to_id(piece) == processor.unk_id())
        if split == "train":
            counts += pieces
        with files.writing(args.outdir / f"{split}.{language}") as file:
            file.writelines(" ".join(line) + "\n" for line in encoded)
        print(
            f"encode_text.py: {split}.{language}: {len(lines)} lines, {pieces.total()} pieces, {unknown} unknown",
            file=sys.stderr,
        )
    with files.writing(args.outdir / "dict.txt") as file:
        file.writelines(line + "\n" for line in dictionary_lines(processor, counts, pad=args.model is None))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("textdir", type=Path)
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--vocab", type=number(1, 2**31 - 1), help="default: 4000; with --model, all of its pieces")
    parser.add_argument(
        "--model", type=Path, help="a sentencepiece model to encode with, in place of one of --vocab pieces"
    )
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en")
    parser.add_argument("--style", choices=("cased", "paper"), default="cased")
    args = parser.parse_args()
    return guarded("encode_text.py", lambda: encode(args))


if __name__ == "__main__":
    sys.exit(main())
