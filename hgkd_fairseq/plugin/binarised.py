"""Reading and checking the dictionaries and subsets that fairseq-preprocess wrote.

fairseq maps the files to memory without checking them, so that a truncated file, or one of another data set, causes an
error in an unrelated place or none at all.
"""

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
    """Return the first of the folders in `data`, separated by ':', which holds the validation and test data.

    Raises:
        UserError: if it is not a folder.
    """
    folder = utils.split_paths(data)[0] if data else data
    if not os.path.isdir(folder):
        raise UserError(f"{folder or 'an empty name'} is no folder; name the one that fairseq-preprocess wrote")
    return folder


def translation_task(data: str, of: str, options: dict[str, Any]) -> TranslationTask:
    """Create fairseq's plain translation task for some data.

    Args:
        data: folder that fairseq-preprocess wrote, or several separated by ':'.
        of: what the data are for, for the error message.
        options: options of the task, which take precedence over the defaults set here.

    Raises:
        UserError: if there are no such data or none of these languages, or the options are invalid.
    """
    # The defaults of options that fairseq's data loading needs and a checkpoint may lack.
    given: dict[str, Any] = {"train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1, **options}
    given |= {"_name": "translation", "data": str(data), "eval_bleu": False}
    try:
        return TranslationTask.setup_task(OmegaConf.merge(TranslationConfig, given))
    except Exception as error:  # fairseq raises a plain Exception for an unknown language pair
        raise UserError(
            f"{data} is no data for {of}: {error}; name the folder that fairseq-preprocess wrote"
        ) from error


def dictionary(file: str) -> Dictionary:
    """Load a dictionary, dict.LANGUAGE.txt.

    Raises:
        UserError: if the file is missing, cannot be read, or is not a dictionary.
    """
    try:
        return Dictionary.load(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; name the folder that fairseq-preprocess wrote") from None
    except Exception as error:  # from the operating system, or from fairseq's parser
        raise UserError(f"{file} is no dictionary of fairseq-preprocess ({error}); {ANEW}") from error


MAGIC = indexed_dataset.MMapIndexedDataset.Index._HDR_MAGIC
HEAD = struct.Struct("<QBQ")  # after MAGIC: version, code of the token ids' dtype, number of sentences


def check_index(prefix: str) -> None:
    """Check that PREFIX.idx and PREFIX.bin fit together: the sentences must be contiguous and fill PREFIX.bin.

    Files in another format than fairseq's mmap format are not checked.

    Raises:
        ValueError: if the files are damaged, do not fit together, or hold no or empty sentences.
        OSError: if a file cannot be read.
    """
    start = len(MAGIC) + HEAD.size
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(start)
    known = MAGIC[:8]  # fairseq recognises the format by these bytes, and fails an assertion if the others differ
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
    """Raised if the data have no subset of the given name."""


def subset(task, name: str, max_positions=None, combine: bool = False, option: str = "--gen-subset"):
    """Load a subset of a translation task's data and check that all its sentences can be read.

    Args:
        task: fairseq translation task; the subset replaces one of the same name that it has loaded.
        name: name of the subset: "test", "valid", ...
        max_positions: limits of the model on the lengths of source and target, in tokens; None: no limits.
        combine: whether NAME1, NAME2, ... are part of the subset, as fairseq has it for training data.
        option: option that names the subset, for error messages.

    Returns:
        The data set.

    Raises:
        NoSubset: if there is no such subset.
        UserError: if it lacks targets, is empty or damaged, or has sentences longer than the limits.
    """
    where = f"subset {name} of {task.cfg.data}"
    try:
        if task.cfg.dataset_impl in (None, "mmap"):
            for prefix in glob.glob(f"{glob.escape(first_shard(task.cfg.data))}/{glob.escape(name)}.*-*.*.idx"):
                check_index(prefix.removesuffix(".idx"))
        task.datasets.pop(name, None)  # fairseq's multilingual task cannot load a subset twice
        task.load_dataset(name, combine=combine)
        dataset = task.dataset(name)
        for part in pairs.parts(dataset):
            check_part(getattr(part, "dataset", part), where)
    except UserError:
        raise
    except (FileNotFoundError, KeyError):  # KeyError: from fairseq's multilingual task
        raise NoSubset(f"there is no subset {name} in {task.cfg.data}; name another with {option}") from None
    except Exception as error:  # damaged files may cause any error of numpy or fairseq
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
    """Check the data of one language pair.

    Raises:
        UserError: if there are no targets or not one for each source, a sentence is empty, or a token id is outside
            its dictionary.
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
