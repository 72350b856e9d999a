"""Dictionaries, language pairs and added tokens of fairseq's translation tasks, read from a task's options.

They determine the token ids that a model receives. Student and teacher read the same batches, so theirs must agree.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.data import Dictionary, data_utils
from fairseq.data.multilingual.multilingual_utils import augment_dictionary
from omegaconf import OmegaConf

from hgkd_fairseq import files
from hgkd_fairseq.data import pairs
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.plugin.checkpoints import split_paths

MULTILINGUAL, BART = "translation_multi_simple_epoch", "translation_from_pretrained_bart"
ADDS_TOKENS = (MULTILINGUAL, BART)  # tasks that add language tokens to sentences
FOLDER = "give its folder with --teacher-model-overrides \"{'data': 'DIR'}\""


def plain(options: Any) -> dict[str, Any]:
    """Return a task's options as a dict, from a dict, an OmegaConf configuration or a Namespace."""
    if isinstance(options, dict):
        return options
    if OmegaConf.is_config(options):
        return dict(OmegaConf.to_container(options, resolve=False, enum_to_str=True))  # type: ignore[arg-type]
    return dict(vars(options))


def token_pairs(value: Any) -> str | None:
    """Check a value of the option `langtoks`; a schema function of `files.mismatch`.

    The value must map names to pairs: the kind of language token, or None, of the source and of the target.

    Returns:
        What is wrong with the value, or None.
    """
    pairs = value.values() if isinstance(value, dict) else [value]
    fit = all(type(one) in (list, tuple) and all(part is None or type(part) is str for part in one) for one in pairs)
    return None if isinstance(value, dict) and fit else "is no table of two kinds of language tokens each"


TEXTS, LISTS = (str, None), ([str], str, None)
OPTIONS = {
    **dict.fromkeys(
        ("_name?", "task?", "data?", "source_lang?", "target_lang?", "lang_dict?", "lang_tok_style?"), TEXTS
    ),
    **dict.fromkeys(("fixed_dictionary?", "source_dict?", "target_dict?", "encoder_langtok?"), TEXTS),
    **dict.fromkeys(("langs?", "lang_pairs?", "langtoks_specs?"), LISTS),
    "extra_lang_pairs?": ({str: str}, None),
    "langtoks?": (token_pairs, None),
}


def kind(task: dict[str, Any]) -> str:
    """Return the name of fairseq's task; for a task of this package, the name of the task that it extends.

    Raises:
        UserError: an option that this module reads has the wrong type.
    """
    if problem := files.mismatch(task, OPTIONS):
        raise UserError(
            f"of the options of a checkpoint's task {problem}; name a checkpoint of fairseq-train, or take that option "
            "out of --teacher-model-overrides"
        )
    return str(task.get("_name") or task.get("task") or "translation").removesuffix("_with_teacher")


def added(options: Any) -> dict[str, Any]:
    """Return the options that decide which tokens a task adds to sentences, by name, with normalised values.

    The dict is empty for tasks that add none, such as fairseq's plain translation task.

    Raises:
        UserError: an option has the wrong type, or the file of --lang-dict cannot be read.
    """
    task = plain(options)
    if kind(task) == BART:
        pair = {name: task.get(name) for name in ("source_lang", "target_lang")}
        return {"task": BART, "prepend_bos": bool(task.get("prepend_bos")), **pair}
    if kind(task) != MULTILINGUAL:
        return {}
    main = (task.get("encoder_langtok"), "tgt" if task.get("decoder_langtok") else None)
    tokens = {name: tuple(one) for name, one in {"main": main, **(task.get("langtoks") or {})}.items()}
    found: dict[str, Any] = {}
    if any(any(one) for one in tokens.values()):
        style = str(task.get("lang_tok_style") or "multilingual")
        replacing = bool(task.get("lang_tok_replacing_bos_eos"))
        found |= {"langtoks": tokens, "lang_tok_style": style, "lang_tok_replacing_bos_eos": replacing}
    if task.get("enable_lang_ids"):
        found["enable_lang_ids"] = languages(task)
    return found


def check_added(path: str, teacher: dict[str, Any], student: dict[str, Any]) -> None:
    """Check that a teacher's task adds the same tokens to sentences as the student's.

    Args:
        path: the teacher's checkpoint, for the error message.
        teacher: options of the teacher's task.
        student: what :func:`added` returns for the student's task.

    Raises:
        UserError: an option differs.
    """
    theirs = added(teacher)
    for name in {**student, **theirs}:
        one, other = (found.get(name, "nothing") for found in (theirs, student))
        if one != other:
            raise UserError(
                f"the teacher {path} was trained with {name} {one}, the student has {other}: both read the same "
                "batches, so that they need the same language tokens; train with the teacher's task and options"
            )


def languages(task: dict[str, Any]) -> list[str]:
    """Return the languages of a multilingual task, in the order of their language tokens.

    Raises:
        UserError: the file of --lang-dict cannot be read.
    """
    if task.get("lang_dict"):
        text = files.read_found(str(task["lang_dict"]), "name the teacher's --lang-dict")
        return [line.strip() for line in text.split("\n") if line.strip()]
    given = task.get("langs")
    if isinstance(given, str):
        return given.split(",")
    return list(given or sorted({language for pair in lang_pairs(task) for language in pair.split("-")}))


def lang_pairs(task: dict[str, Any]) -> list[str]:
    """Return the language pairs that the option --lang-pairs of a multilingual task names."""
    given = task.get("lang_pairs") or []
    return given.split(",") if isinstance(given, str) else list(given)


def pairs_of(task: dict[str, Any]) -> list[str]:
    """Return the language pairs that a task trains on, including those of extra data; empty if they are unknown."""
    if kind(task) != MULTILINGUAL:
        source, target = pair_of(task)
        return [f"{source}-{target}"] if source and target else []
    extra = [pair for given in (task.get("extra_lang_pairs") or {}).values() for pair in given.split(",")]
    return [pair if "-" in pair else f"{pair}-{pair}" for pair in [*lang_pairs(task), *extra]]


def check_pairs(name: str, task: dict[str, Any], wanted: Sequence[str]) -> None:
    """Check that a model was trained on all language pairs that it is used for.

    The check is skipped if the pairs that the model was trained on are unknown.

    Args:
        name: description of the model, for the error message.
        task: options of the model's task.
        wanted: language pairs that the model is used for, such as "de-en".

    Raises:
        UserError: the model was not trained on a pair; the message names the first one.
    """
    known = pairs_of(task)
    for pair in wanted if known else ():
        if pair not in known:
            raise UserError(f"{name} was trained on {', '.join(known)} and not on {pair}; name one that was")


def refuse_language_tokens(path: str, task: dict[str, Any], instead: str) -> None:
    """Refuse a checkpoint whose task adds language tokens to sentences.

    Args:
        path: the checkpoint, for the error message.
        task: options of its task.
        instead: end of the error message: the reason, and what the user can do.

    Raises:
        UserError: the task adds language tokens.
    """
    if kind(task) in ADDS_TOKENS:
        raise UserError(f"{path} was trained by the task {kind(task)}, which adds language tokens, and {instead}")


def check_lengths(
    split: str, dataset: Any, positions: Sequence[int], limits: Sequence[int], teacher: str, instead: str
) -> None:
    """Refuse data with sentences that are short enough for the student and too long for the teacher.

    Args:
        split: name of the subset, for the error message.
        dataset: the data, of one or of several language pairs.
        positions: longest source and longest target that the teacher accepts, in tokens.
        limits: the same of the student.
        teacher: description of the teacher, for the error message.
        instead: end of the error message: what else the user can do.

    Raises:
        UserError: there is such a sentence.
    """
    for part in pairs.parts(dataset):
        lengths = np.asarray(part.sizes).reshape(len(part), -1)  # (S, 2), or (S, 1) without targets
        trained = lengths[(lengths <= np.asarray(limits)[: lengths.shape[1]]).all(1)]
        for side, sizes, most in zip(("source", "target"), trained.T, positions, strict=False):
            longest = int(sizes.max(initial=0))
            if longest > most:
                raise UserError(
                    f"{split} has a {side} sentence of {longest} tokens, and {teacher} takes {most} at most; leave "
                    f"longer ones out with --max-{side}-positions {most} --skip-invalid-size-inputs-valid-test, or "
                    f"{instead}"
                )


def folder_of(task: dict[str, Any]) -> str:
    return (split_paths(str(task.get("data") or "")) or [""])[0]


def pair_of(task: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the source and target language of a task, for a multilingual task those of its first language pair.

    A language is None if it is unknown. If the options do not name both, fairseq's rule is used: file names in the data
    folder.
    """
    found = (task.get("source_lang"), task.get("target_lang"))
    if None not in found:
        return found
    if kind(task) == MULTILINGUAL:
        first = lang_pairs(task)[:1]
        return tuple(first[0].split("-", 1)) if first and "-" in first[0] else found  # type: ignore[return-value]
    folder = folder_of(task)
    # The run did not name its languages: fairseq inferred them from the names of the data files.
    return tuple(data_utils.infer_language_pair(folder)) if os.path.isdir(folder) else found


def dictionary_file(task: dict[str, Any], side: str) -> str:
    """Return the path of a task's dictionary of one side, "source" or "target"."""
    given = task.get("fixed_dictionary") or task.get(f"{side}_dict")
    if kind(task) == MULTILINGUAL and given:
        return str(given)
    return os.path.join(folder_of(task), f"dict.{pair_of(task)[side == 'target']}.txt")


def dictionary(path: str, task: dict[str, Any], side: str) -> Dictionary:
    """Load the dictionary of a teacher's task, with the symbols that the task adds when it runs.

    Args:
        path: the teacher's checkpoint, for the error message.
        task: options of the teacher's task.
        side: "source" or "target".

    Raises:
        UserError: the file does not exist or is not a dictionary, or the languages are unknown.
    """
    file = dictionary_file(task, side)
    if not os.path.isfile(file):
        what = f"the {side} dictionary of the teacher {path}, {file}, does not exist"
        folder = f"the folder of the dictionaries of the teacher {path}, {folder_of(task)},"
        if not os.path.isdir(folder_of(task)):  # then the languages may be unknown, too
            what = f"{folder} does not exist"
        elif None in pair_of(task):
            what = f"{folder} has no data of a language pair"
        raise UserError(f"{what} and cannot be compared with the student's; {FOLDER}")
    found = binarised.dictionary(file)
    if kind(task) == MULTILINGUAL:
        style, specs = task.get("lang_tok_style") or "multilingual", task.get("langtoks_specs") or ["main"]
        augment_dictionary(found, languages(task), style, specs, task.get("extra_data"))
    if kind(task) == BART:
        for language in str(task.get("langs") or "").split(","):
            found.add_symbol(f"[{language}]")
        found.add_symbol("<mask>")
    return found
