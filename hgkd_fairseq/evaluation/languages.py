"""Models whose task adds language tokens: which of our commands run them, and the task that they are run under."""

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

# Of the task: all pairs, each sentence once.
EACH_ONCE = {
    **dict.fromkeys(("source_lang", "target_lang", "extra_data", "extra_lang_pairs")),
    **dict.fromkeys(("sampling_weights", "sampling_weights_from_file", "virtual_epoch_size", "virtual_data_size")),
    **{"sampling_method": "concat", "load_alignments": False, "seed": 1},
}
REFUSED = (
    "this command runs models of the task translation: translate with fairseq-generate, or measure with hgkd score"
)
# Of the tasks that add tokens: what decides how a sentence looks.
SHAPING = (
    *("encoder_langtok", "decoder_langtok", "lang_tok_style", "lang_tok_replacing_bos_eos", "langtoks"),
    *("langtoks_specs", "enable_lang_ids", "fixed_dictionary", "source_dict", "target_dict", "prepend_bos"),
)


def generation(checkpoint: Checkpoint, pair: str | None) -> tuple[list[str], dict[str, Any]]:
    """What fairseq-generate is to be told of a model's task: words of its command line, and options to set then.

    Args:
        pair: of a model of several language pairs, the one to translate, which :func:`check_pair` has looked at.

    Raises:
        UserError: it is missing.
    """
    options = checkpoint.options("task")
    kind = inputs.kind(options)
    shaping = {name: options[name] for name in SHAPING if options.get(name) is not None}
    if kind == inputs.BART:  # fairseq's own task asks for attributes that it no longer has
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
    """Of a task: where fairseq-generate prints the score of a language token; see :class:`inference.Labelling`."""
    found = inputs.added(options)
    if inputs.kind(options) == inputs.BART:
        return "last"
    forced = any(target for _, target in found.get("langtoks", {}).values())
    return "first" if forced and not found["lang_tok_replacing_bos_eos"] else None


def check_pair(path: str, options: dict[str, Any], pair: str | None) -> None:
    """Raises:
    UserError: the model is none of this language pair among others.
    """
    if pair is not None and inputs.kind(options) != inputs.MULTILINGUAL:
        raise UserError(f"--lang-pair {pair}: {path} is no model of several language pairs; drop it")
    if pair is not None and pair not in (known := inputs.lang_pairs(options)):
        raise UserError(f"--lang-pair {pair}: {path} was trained on {', '.join(known)}; name one of them")


def language_tokens(task: FairseqTask) -> list[int]:
    """Ids of those that it puts into targets."""
    if isinstance(task, TranslationMultiSimpleEpochTask):
        return of_multilingual(task)
    return of_pretrained_bart(task) if isinstance(task, TranslationFromPretrainedBARTTask) else []


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
    check_pair(path, options, pair)
    if inputs.kind(options) == inputs.MULTILINGUAL:
        return multilingual_task(data, path, options, pair)
    known = {field.name for field in fields(TranslationConfig)}
    plain = binarised.translation_task(data, path, {key: value for key, value in options.items() if key in known})
    return pretrained_bart_task(plain, options) if inputs.kind(options) == inputs.BART else plain


def pretrained_bart_task(plain: TranslationTask, options: dict) -> TranslationFromPretrainedBARTTask:
    """The task on the same data, with the language tokens of a model's."""
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
