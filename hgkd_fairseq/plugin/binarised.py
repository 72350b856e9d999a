"""What fairseq-preprocess wrote: dictionaries and subsets, checked when they are read. fairseq maps the files to memory
and believes them, so that one that is cut short or of another data set would fail anywhere, or nowhere."""

from __future__ import annotations

import glob
import os
import struct
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf

from hgkd_fairseq.data import pairs
from hgkd_fairseq.errors import UserError

ANEW = "run fairseq-preprocess again"


def first_shard(data: str) -> str:
    """The folder of validation and test data, where `data` names several with ':' between them.

    Raises:
        UserError: it is none.
    """
    folder = utils.split_paths(data)[0] if data else data
    if not os.path.isdir(folder):
        raise UserError(f"{folder or 'an empty name'} is no folder; name the one that fairseq-preprocess wrote")
    return folder


def translation_task(data: str, of: str, options: dict[str, Any]) -> TranslationTask:
    """fairseq's plain translation task on data.

    Args:
        data: folder of fairseq-preprocess, or several with ':' between them.
        of: what it is for, in the error message.
        options: of the task; those of a checkpoint may lack what fairseq's data loading asks for.

    Raises:
        UserError: there are no such data, or not of these languages.
    """
    given: dict[str, Any] = {"train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1, **options}
    given |= {"_name": "translation", "data": str(data), "eval_bleu": False}
    try:
        return TranslationTask.setup_task(OmegaConf.merge(TranslationConfig, given))
    except Exception as error:  # fairseq's own, for an unknown language pair
        raise UserError(
            f"{data} is no data for {of}: {error}; name the folder that fairseq-preprocess wrote"
        ) from error


def dictionary(file: str) -> Dictionary:
    """A dict.LANGUAGE.txt.

    Raises:
        UserError: it is missing, not to be read, or no dictionary.
    """
    try:
        return Dictionary.load(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; name the folder that fairseq-preprocess wrote") from None
    except Exception as error:  # of the operating system, or what fairseq finds in it
        raise UserError(f"{file} is no dictionary of fairseq-preprocess ({error}); {ANEW}") from error


MAGIC = indexed_dataset.MMapIndexedDataset.Index._HDR_MAGIC
HEAD = struct.Struct("<QBQ")  # behind it: version, type of the ids, sentences


def check_index(prefix: str) -> None:
    """Whether PREFIX.idx fits PREFIX.bin, in fairseq's mmap format (another is left to fairseq): the sentences lie one
    behind another and fill the file.

    Raises:
        ValueError, OSError: they do not.
    """
    start = len(MAGIC) + HEAD.size
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(start)
    known = MAGIC[:8]  # by which fairseq tells the format; it dies, noisily, where the rest of the mark is another
    if head and not head.startswith(known[: len(head)]):
        return
    whole = len(head) == start and head.startswith(MAGIC)
    version, code, count = HEAD.unpack(head[len(MAGIC) :]) if whole else (0, 0, 0)
    kind = indexed_dataset._code_to_dtype.get(code)
    if version != 1 or kind is None or os.path.getsize(f"{prefix}.idx") != start + 12 * count:
        raise ValueError(f"{prefix}.idx is cut short or damaged")
    sizes = np.fromfile(f"{prefix}.idx", "<i4", count=count, offset=start).astype(np.int64)
    places = np.fromfile(f"{prefix}.idx", "<i8", count=count, offset=start + 4 * count)
    ends = np.cumsum(sizes * np.dtype(kind).itemsize)
    if not count or (sizes < 1).any() or places[0] or (places[1:] != ends[:-1]).any():
        raise ValueError(f"{prefix}.idx holds no sentences, or is damaged")
    if ends[-1] != os.path.getsize(f"{prefix}.bin"):
        raise ValueError(f"{prefix}.bin has {os.path.getsize(f'{prefix}.bin')} bytes and not {ends[-1]}")


class NoSubset(UserError):
    """The data have no subset of that name."""


def subset(task, name: str, max_positions=None, combine: bool = False, option: str = "--gen-subset"):
    """A subset of a translation task's data, all of whose sentences can be read.

    Args:
        task: of fairseq.
        name: "test", "valid", ...
        max_positions: of the model, as fairseq's own function has it; None: sentences may be of any length.
        combine: whether NAME1, NAME2, ... are part of it, as they are of fairseq's training data.
        option: that names it.

    Raises:
        UserError: there is no such subset, it lacks targets or is empty or damaged, or has sentences that are too long.
    """
    where = f"subset {name} of {task.cfg.data}"
    try:
        if task.cfg.dataset_impl in (None, "mmap"):
            for prefix in glob.glob(f"{glob.escape(first_shard(task.cfg.data))}/{glob.escape(name)}.*-*.*.idx"):
                check_index(prefix.removesuffix(".idx"))
        task.datasets.pop(name, None)  # the multilingual task cannot load one twice
        task.load_dataset(name, combine=combine)
        dataset = task.dataset(name)
        for part in pairs.parts(dataset):
            check_part(getattr(part, "dataset", part), where)
    except UserError:
        raise
    except (FileNotFoundError, KeyError):  # the second of fairseq's multilingual task
        raise NoSubset(f"there is no subset {name} in {task.cfg.data}; name another with {option}") from None
    except Exception as error:  # of the operating system, of numpy, of fairseq: whatever the bytes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} is empty or damaged ({reason}); {ANEW}, or name another with {option}") from error
    if not len(dataset):
        raise UserError(f"{where} is empty; name another with {option}")
    _, ignored = dataset.filter_indices_by_size(dataset.ordered_indices(), max_positions)
    if len(ignored):
        raise UserError(
            f"{where} has {len(ignored)} of {len(dataset)} sentences that are longer than the model takes "
            f"({max_positions} tokens; the first is number {min(ignored)}); leave them out of the text, or split them"
        )
    return dataset


def check_part(dataset, where: str) -> None:
    """Of one language pair.

    Raises:
        UserError: no targets, or ids that are none of the dictionaries'.
    """
    sides = {"source": (dataset.src, dataset.src_dict), "target": (dataset.tgt, dataset.tgt_dict)}
    if dataset.tgt is None:
        raise UserError(f"{where} has no targets; binarise both languages, without --only-source")
    if len(dataset.src) != len(dataset.tgt):
        raise UserError(f"{where} has {len(dataset.src)} sources and {len(dataset.tgt)} targets; {ANEW}")
    for side, (sentences, words) in sides.items():
        for number in range(len(sentences)):
            ids = sentences[number]
            if not len(ids) or not 0 <= int(ids.min()) <= int(ids.max()) < len(words):
                raise UserError(
                    f"{where} does not fit its dictionary of {len(words)} types, or is damaged ({side} sentence "
                    f"{number}); {ANEW}"
                )
