"""Models whose task adds language tokens: which of our commands run them, and the task that they are run under."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import fields

from fairseq.tasks.translation import TranslationConfig
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.plugin.checkpoints import Checkpoint
from hgkd_fairseq.teacher import inputs

# Of the task: all pairs, each sentence once.
EACH_ONCE = {
    **dict.fromkeys(("source_lang", "target_lang", "extra_data", "extra_lang_pairs")),
    **dict.fromkeys(("sampling_weights", "sampling_weights_from_file", "virtual_epoch_size", "virtual_data_size")),
    **{"sampling_method": "concat", "load_alignments": False, "seed": 1},
}


def refuse(checkpoint: Checkpoint) -> None:
    """Raises:
    UserError: the model was trained by such a task.
    """
    kind = inputs.kind(checkpoint.options("task"))
    if kind in (inputs.MULTILINGUAL, inputs.BART):
        raise UserError(
            f"{checkpoint.path} was trained by the task {kind}, which adds language tokens, and this command runs "
            "models of the task translation: translate with fairseq-generate, and measure its output with "
            "hgkd calibration inference"
        )


def make_task(data: str, path: str, checkpoint: Checkpoint, pair: str | None):
    """The task of a model, on data.

    Args:
        data: folder of fairseq-preprocess.
        path: of the model, for messages.
        checkpoint: of the model.
        pair: one of several language pairs; None: all of them.

    Raises:
        UserError: there are no such data, there is no such pair, or the task is another one.
    """
    options = checkpoint.options("task")
    if inputs.kind(options) == inputs.MULTILINGUAL:
        return multilingual_task(data, path, options, pair)
    if pair:
        raise UserError(f"--lang-pair {pair}: {path} is no model of several language pairs; drop it")
    if inputs.kind(options) == inputs.BART:
        refuse(checkpoint)
    known = {field.name for field in fields(TranslationConfig)}
    return binarised.translation_task(data, path, {key: value for key, value in options.items() if key in known})


def multilingual_task(data: str, path: str, options: dict, pair: str | None) -> TranslationMultiSimpleEpochTask:
    given = options.get("lang_pairs") or []
    known = given.split(",") if isinstance(given, str) else list(given)
    if pair and pair not in known:
        raise UserError(f"--lang-pair {pair}: {path} was trained on {', '.join(known)}; name one of them")
    args = Namespace(**{**options, **EACH_ONCE, "data": data, "langs": inputs.languages(options), "lang_dict": None})
    args.lang_pairs = [pair] if pair else known
    try:
        task = TranslationMultiSimpleEpochTask.setup_task(args)
    except Exception as error:  # fairseq's own, of files that are missing or do not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{data} is no data for {path}: {reason}; name the folder of its language pairs") from error
    task.cfg = args
    return task


def check_dictionaries(checkpoint: Checkpoint, task) -> None:
    """Refuse a model whose own dictionaries, where they are still there, are not those of the data: it would read and
    write other symbols.

    Raises:
        UserError: it names the first that differs.
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
