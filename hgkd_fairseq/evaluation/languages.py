"""Models whose task adds language tokens: which commands support them, and the task that they run under."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import fields
from typing import Any

from fairseq.tasks import FairseqTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from hgkd_fairseq.data.language_tokens import of_multilingual, of_pretrained_bart
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.plugin.checkpoints import Checkpoint
from hgkd_fairseq.teacher import inputs

# Options of the multilingual task with which each sentence of each pair is read once, without sampling.
EACH_ONCE = {
    **dict.fromkeys(("source_lang", "target_lang", "extra_data", "extra_lang_pairs")),
    **dict.fromkeys(("sampling_weights", "sampling_weights_from_file", "virtual_epoch_size", "virtual_data_size")),
    **{"sampling_method": "concat", "load_alignments": False, "seed": 1},
}
REFUSED = (
    "this command runs models of the task translation: translate with fairseq-generate, or measure with hgkd score"
)
# Options of the tasks with language tokens that determine the tokens of a sentence.
SHAPING = (
    *("encoder_langtok", "decoder_langtok", "lang_tok_style", "lang_tok_replacing_bos_eos", "langtoks"),
    *("langtoks_specs", "enable_lang_ids", "fixed_dictionary", "source_dict", "target_dict", "prepend_bos"),
)


def generation(checkpoint: Checkpoint, pair: str | None) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments with which fairseq-generate runs a model under its task.

    Args:
        checkpoint: checkpoint of the model.
        pair: language pair to translate, of a model of several; :func:`check_pair` must have accepted it.

    Returns:
        Words to add to the command line, and options to set on the parsed arguments.

    Raises:
        UserError: the model is one of several language pairs and `pair` is None.
    """
    options = checkpoint.options("task")
    kind = inputs.kind(options)
    shaping = {name: options[name] for name in SHAPING if options.get(name) is not None}
    if kind == inputs.BART:  # fairseq's own task reads attributes that it no longer sets
        return ["--task", f"{kind}_with_teacher"], shaping | {"langs": options["langs"]}
    if kind != inputs.MULTILINGUAL:
        return [], {}
    if not pair:
        known = ", ".join(inputs.lang_pairs(options))
        raise UserError(f"{checkpoint.path} was trained on several language pairs; name one with --lang-pair: {known}")
    source, _, target = pair.partition("-")
    words = ["--task", kind, "--lang-pairs", pair, "--source-lang", source, "--target-lang", target]
    return words, shaping | {"langs": inputs.languages(options), "lang_dict": None}


def unprinted_token(options: dict[str, Any]) -> str | None:
    """Return where fairseq-generate prints the score of a language token under a task with these options: "first",
    "last" or None; see :class:`inference.Labelling`."""
    found = inputs.added(options)
    if inputs.kind(options) == inputs.BART:
        return "last"
    _, forced = found.get("langtoks", {}).get("main", (None, None))  # the entry that fairseq's generation reads
    return "first" if forced and not found["lang_tok_replacing_bos_eos"] else None


def check_pair(path: str, options: dict[str, Any], pair: str | None) -> None:
    """Check that a model was trained on a language pair among others.

    Args:
        path: name of the model, for the error message.
        options: options of its task.
        pair: language pair, such as "de-en"; None: nothing is checked.

    Raises:
        UserError: the model is not one of several language pairs, or `pair` is not among them.
    """
    if pair is not None and inputs.kind(options) != inputs.MULTILINGUAL:
        raise UserError(f"--lang-pair {pair}: {path} is no model of several language pairs; drop it")
    if pair is not None and pair not in (known := inputs.lang_pairs(options)):
        raise UserError(f"--lang-pair {pair}: {path} was trained on {', '.join(known)}; name one of them")


def language_tokens(task: FairseqTask) -> list[int]:
    """Return the ids of the language tokens that a task adds to targets; empty for the plain translation task."""
    if isinstance(task, TranslationMultiSimpleEpochTask):
        return of_multilingual(task)
    return of_pretrained_bart(task) if isinstance(task, TranslationFromPretrainedBARTTask) else []


def make_task(data: str, path: str, checkpoint: Checkpoint, pair: str | None):
    """Create the task that a model runs under, on given data.

    Args:
        data: folder that fairseq-preprocess wrote.
        path: name of the model, for error messages.
        checkpoint: checkpoint of the model, which has the options of its task.
        pair: language pair to use of a model of several; None: all of them.

    Returns:
        fairseq's multilingual task or its task for mBART for models trained with these, otherwise its plain translation
        task.

    Raises:
        UserError: the data are missing or do not match, or the model was not trained on `pair`.
    """
    options = checkpoint.options("task")
    check_pair(path, options, pair)
    if inputs.kind(options) == inputs.MULTILINGUAL:
        return multilingual_task(data, path, options, pair)
    known = {field.name for field in fields(TranslationConfig)}
    plain = binarised.translation_task(data, path, {key: value for key, value in options.items() if key in known})
    return pretrained_bart_task(plain, options) if inputs.kind(options) == inputs.BART else plain


def pretrained_bart_task(plain: TranslationTask, options: dict) -> TranslationFromPretrainedBARTTask:
    """Return fairseq's task for mBART on the data of a plain task, with the language tokens of a model's options."""
    given = {"langs": options["langs"], "prepend_bos": bool(options.get("prepend_bos"))}
    args = Namespace(**inputs.plain(plain.cfg) | given)
    task = TranslationFromPretrainedBARTTask(args, plain.source_dictionary, plain.target_dictionary)
    task.args = task.cfg = args
    return task


def multilingual_task(data: str, path: str, options: dict, pair: str | None) -> TranslationMultiSimpleEpochTask:
    args = Namespace(**{**options, **EACH_ONCE, "data": data, "langs": inputs.languages(options), "lang_dict": None})
    args.lang_pairs = [pair] if pair else inputs.lang_pairs(options)
    try:
        task = TranslationMultiSimpleEpochTask.setup_task(args)
    except Exception as error:  # fairseq raises various ones for files that are missing or do not match
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{data} is no data for {path}: {reason}; name the folder of its language pairs") from error
    task.cfg = args
    return task


def check_dictionaries(checkpoint: Checkpoint, task) -> None:
    """Refuse a model whose dictionaries differ from those of the data: its ids would stand for other symbols.

    A dictionary is compared only if it still exists in the folder that the checkpoint names.

    Raises:
        UserError: a dictionary differs; the message names the first difference.
    """
    options = checkpoint.options("task")
    for side, ours in (("source", task.source_dictionary), ("target", task.target_dictionary)):
        file = inputs.dictionary_file(options, side)
        if not os.path.isfile(file):
            continue
        theirs = inputs.dictionary(checkpoint.path, options, side)
        if theirs.symbols == ours.symbols:
            continue
        pairs = enumerate(zip(theirs.symbols, ours.symbols, strict=False))
        first = next((f"type {place} is {one!r} and {other!r}" for place, (one, other) in pairs if one != other), "")
        sizes = f"{len(theirs)} and {len(ours)} types" if len(theirs) != len(ours) else ""
        raise UserError(
            f"the {side} dictionary of {checkpoint.path}, {file}, and that of the data differ: "
            f"{', '.join(filter(None, (sizes, first)))}; name data that were binarised with the model's dictionaries "
            "(fairseq-preprocess --srcdict --tgtdict)"
        )
