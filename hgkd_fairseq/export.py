"""Export of models that can be used without this package: checkpoints for plain fairseq, and CTranslate2 models."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.data import data_utils
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf
from torch import Tensor

from hgkd_fairseq import files, plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import compare, generated, languages
from hgkd_fairseq.plugin import checkpoints
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.teacher import inputs

plugin.register()  # registers our options, and keeps fairseq from running code in the options of a checkpoint

PACKAGE = __name__.partition(".")[0]
CONVERTED_MODELS = ("transformer", "transformer_align", "bart")
# Options of fairseq's transformer that CTranslate2's converter reads, refuses itself or infers from the weights, and
# options that matter in training only. A model that uses any other option may be converted incorrectly.
CONVERTED_OPTIONS = {
    *("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("encoder_embed_dim", "decoder_embed_dim", "encoder_ffn_embed_dim", "decoder_ffn_embed_dim"),
    *("encoder_normalize_before", "decoder_normalize_before", "activation_fn", "layernorm_embedding"),
    *("encoder_learned_pos", "decoder_learned_pos", "no_token_positional_embeddings", "no_scale_embedding"),
    *("share_decoder_input_output_embed", "share_all_embeddings", "merge_src_tgt_embed"),
    *("decoder_output_dim", "max_source_positions", "max_target_positions"),
    *("encoder_embed_path", "decoder_embed_path"),
    *("dropout", "attention_dropout", "activation_dropout", "relu_dropout", "adaptive_softmax_dropout"),
    *("encoder_layerdrop", "decoder_layerdrop", "quant_noise_pq_block_size"),
    *("checkpoint_activations", "offload_activations", "min_params_to_wrap", "export"),
}
# Options that affect translation and are not declared in the dataclass of fairseq's transformer.
UNDECLARED = ("scale_attn", "scale_heads", "scale_fc", "scale_resids", "append_source_id")


def export_all(
    path: str,
    output: str,
    ema: bool,
    ctranslate2: str | None,
    quantization: str | None,
    data: str | None,
    comparison: dict[str, Any] | None,
) -> None:
    """Export a checkpoint and, if `ctranslate2` is given, convert it and print a comparison of both models.

    Args:
        path: see :func:`export`.
        output: see :func:`export`.
        ema: see :func:`export`.
        ctranslate2: folder to write the CTranslate2 model to; None: no conversion.
        quantization: see :func:`to_ctranslate2`.
        data: see :func:`to_ctranslate2`.
        comparison: arguments of :func:`compare.compare` other than its data and models; None: no comparison.

    Raises:
        UserError: see :func:`export`, :func:`to_ctranslate2` and :func:`compare.compare`; or a comparison of a model
            that needs language tokens.
    """
    note = ""
    if ctranslate2:
        if check_conversion(path, ctranslate2, data) in inputs.ADDS_TOKENS:
            note = ", given language tokens"
        if comparison and note:
            raise UserError(f"{path} translates with language tokens, and the comparison gives none: --no-comparison")
        if comparison and comparison["reference_file"]:
            generated.read_references(comparison["reference_file"])  # errors are reported before the export
    export(path, output, ema)
    print(f"{output}: for any fairseq, without hgkd_fairseq")
    if ctranslate2:
        to_ctranslate2(output, ctranslate2, data, quantization)
        print(f"{ctranslate2}: for CTranslate2{note}")
    if ctranslate2 and comparison:
        print(compare.compare(data or data_of(path), [output, ctranslate2], **comparison))


def export(path: str, output: str, ema: bool = False) -> None:
    """Write the model of a checkpoint, or the average of several, as a checkpoint without training state.

    The result has no optimizer state, no meters, no options of this plugin and no classes to import. torch loads it
    with ``weights_only=True`` without an allow-list, so that plain fairseq loads it under torch >= 2.6 too. The
    parameters of a single checkpoint are copied unchanged.

    Args:
        path: fairseq checkpoint, or several of one architecture separated by ':', whose parameters are averaged.
        output: file to write.
        ema: export the moving average of --store-ema instead of the parameters.

    Raises:
        UserError: a file is missing or not a checkpoint, the checkpoints differ in their tensors' names or shapes, one
            has no moving average (with `ema`), or the output exists or cannot be written.
    """
    refuse_existing(output)
    found = [checkpoints.read(file) for file in split_paths(path)]
    models = [parameters(checkpoint, ema) for checkpoint in found]
    cfg = without_plugin(found[0])
    history = dict(found[0].state["optimizer_history"][-1])
    if cfg["criterion"]["_name"] == "cross_entropy":
        history["criterion_name"] = "CrossEntropyCriterion"
    state = {
        "args": None,
        "cfg": cfg,
        "model": models[0] if len(models) == 1 else average(models),
        "criterion": {},
        "optimizer_history": [{**history, "lr_scheduler_state": {}}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    save(state, output)


def refuse_existing(output: str) -> None:
    if os.path.lexists(output):
        raise UserError(f"{output} exists; name another file or folder, or remove it")
    files.check_output(output)


def save(state: dict[str, Any], output: str) -> None:
    """Write a checkpoint atomically, so that the file is complete if it exists."""
    with files.writing(output, "wb") as stream:
        torch.save(state, stream)


def parameters(checkpoint: checkpoints.Checkpoint, ema: bool) -> dict[str, Tensor]:
    if not ema:
        return checkpoint.model
    if "ema" not in checkpoint.state["extra_state"]:
        raise UserError(f"{checkpoint.path} holds no moving average; it was trained without --store-ema, so drop --ema")
    average = checkpoint.state["extra_state"]["ema"]
    checkpoints.check_weights(checkpoint.path, average)
    return average


def average(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor over several models.

    Means are computed in fp32 and converted to the tensor's dtype. Means of integers are rounded down, as in fairseq's
    average_checkpoints.py. A tensor that several names share stays shared.

    Raises:
        UserError: the models differ in the names or shapes of their tensors.
    """
    first = models[0]
    for model in models[1:]:
        for key in first.keys() | model.keys():
            if key not in first or key not in model or first[key].shape != model[key].shape:
                raise UserError(f"checkpoints of different architectures cannot be averaged: they differ in {key}")
    means: dict[tuple, Tensor] = {}
    result = {}
    for key in first:
        tensors = [model[key] for model in models]
        shared = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors)
        if shared not in means or not tensors[0].numel():
            if tensors[0].is_floating_point():
                mean = torch.stack([tensor.float() for tensor in tensors]).mean(0)
            else:
                mean = torch.stack(tensors).sum(0) // len(tensors)
            means[shared] = mean.to(tensors[0].dtype)
        result[key] = means[shared]
    return result


def without_plugin(checkpoint: checkpoints.Checkpoint) -> dict[str, Any]:
    """Return the configuration in plain dicts, as if the model had been trained by fairseq's own task and criterion."""
    found: dict[str, Any] = OmegaConf.to_container(checkpoint.cfg, resolve=False, enum_to_str=True)  # type: ignore
    found = {key: dict(vars(value)) if isinstance(value, Namespace) else value for key, value in found.items()}
    found |= {section: checkpoint.options(section) for section in ("model", "task", "criterion", "common")}
    model = found["model"]
    model["_name"] = model.get("_name") or model.get("arch")
    flat = [model, found["common"]]  # fairseq copies all options of the command line to the model's section
    if (kind := inputs.kind(found["task"])) in inputs.ADDS_TOKENS:
        found["task"]["_name"] = kind
        flat.append(found["task"])  # and to the section of its older tasks
    elif is_ours(found["task"], TASK_DATACLASS_REGISTRY):
        known = {field.name for field in fields(TranslationConfig)}
        found["task"] = {key: value for key, value in found["task"].items() if key in known} | {"_name": "translation"}
    if is_ours(found["criterion"], CRITERION_DATACLASS_REGISTRY):
        average = found["criterion"].get("sentence_avg", False)
        found["criterion"] = {"_name": "cross_entropy", "sentence_avg": average}
    for options in flat:
        for key in our_options() & options.keys():
            del options[key]
        for key, value in (("task", found["task"]), ("criterion", found["criterion"])):
            if key in options:
                options[key] = value["_name"]
        options["user_dir"] = None
    return found


def is_ours(section: dict[str, Any], registry: dict[str, type]) -> bool:
    config = registry.get(section["_name"])
    return config is not None and config.__module__.startswith(f"{PACKAGE}.")


def our_options() -> set[str]:
    """Return the names of options that our tasks and criterions add to those of fairseq's translation task."""
    configs = [*TASK_DATACLASS_REGISTRY.values(), *CRITERION_DATACLASS_REGISTRY.values()]
    ours = {field.name for config in configs if config.__module__.startswith(f"{PACKAGE}.") for field in fields(config)}
    return ours - {field.name for field in fields(TranslationConfig)}


def data_of(path: str) -> str:
    """Return the data folder that a checkpoint's model was trained on, as given in its options."""
    return str(checkpoints.read(split_paths(path)[0], model=False).options("task").get("data"))


def check_conversion(path: str, folder: str, data: str | None) -> str:
    """Check before an export whether :func:`to_ctranslate2` can convert the model, as far as that is known then.

    Returns: the name of the model's task.

    Raises:
        UserError: CTranslate2 is not installed, the folder exists, the architecture or an option is not supported, or
            dictionaries are missing.
    """
    import_converters()
    refuse_existing(folder)
    checkpoint = checkpoints.read(split_paths(path)[0], model=False)
    check_options(checkpoint)
    task = checkpoint.options("task")
    language_pair(split_paths(data or str(task.get("data")))[0], task)
    return inputs.kind(task)


def check_options(checkpoint: checkpoints.Checkpoint) -> None:
    """Check that CTranslate2's converter knows the architecture of a model and all options that the model uses. With
    an option that the converter ignores, the converted model would give other translations.

    Raises:
        UserError: the architecture or an option is not supported.
    """
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY

    model, task = checkpoint.options("model"), checkpoint.options("task")
    name = ARCH_MODEL_NAME_REGISTRY.get(model.get("arch") or model.get("_name"))
    if name not in CONVERTED_MODELS:
        raise UserError(
            f"CTranslate2 does not convert this model: {checkpoint.path} is a {name or 'model unknown to fairseq'}, "
            f"known to convert are {', '.join(CONVERTED_MODELS)}; leave --ctranslate2 out"
        )
    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, TransformerConfig(), with_prefix="")
    defaults = {action.dest: action.default for action in parser._actions} | dict.fromkeys(UNDECLARED, False)
    for option, default in defaults.items():
        value = model.get(option, task.get(option))
        if option not in CONVERTED_OPTIONS and value not in (None, False, 0, default):
            raise UserError(
                f"CTranslate2 would convert {checkpoint.path} to another model: its converter does not know "
                f"--{option.replace('_', '-')} {value}; leave --ctranslate2 out"
            )


def to_ctranslate2(checkpoint: str, folder: str, data: str | None = None, quantization: str | None = None) -> None:
    """Convert a checkpoint that :func:`export` wrote, with CTranslate2's converter for fairseq.

    Args:
        checkpoint: exported checkpoint.
        folder: folder to write, for ctranslate2.Translator.
        data: folder with the dictionaries, or several separated by ':', of which the first is used; default: the one
            that the model was trained on.
        quantization: CTranslate2's name of the type of the converted weights, such as "int8"; None: no quantization.

    Raises:
        UserError: CTranslate2 is not installed or does not support the model, the dictionaries are missing or do not
            fit the model, or the folder exists.
    """
    converters = import_converters()
    refuse_existing(folder)
    found = checkpoints.read(checkpoint)
    check_options(found)
    task, model = found.options("task"), found.options("model")
    data = split_paths(data or str(task.get("data")))[0]  # the first of several shards has the dictionaries
    pair: tuple[str | None, str | None] = language_pair(data, task)
    kind = inputs.kind(task)
    # The converter needs the options in fairseq's old format, as attributes, and cannot read the exported file itself.
    options = {**task, **model, "task": kind, "arch": model.get("arch") or model["_name"]}
    if kind == inputs.MULTILINGUAL:
        options |= {**languages.EACH_ONCE, "langs": inputs.languages(task), "lang_dict": None}
        pair = (None, None)  # all pairs
    with tempfile.TemporaryDirectory() as temporary:
        file = f"{temporary}/model.pt"
        torch.save({"args": Namespace(**options), "model": found.model}, file)
        # The sentences of a fine-tuned mBART end or begin with language tokens, which the caller has to add.
        own_tokens = kind == inputs.BART
        converter = converters.FairseqConverter(file, data, *pair, no_default_special_tokens=own_tokens)
        with files.writing_folder(folder) as unfinished:
            try:
                converter.convert(str(unfinished / "model"), quantization=quantization)  # creates the folder itself
            except RuntimeError as error:  # of torch, for tensors of different sizes
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
                raise UserError(
                    f"{checkpoint} does not fit the dictionaries in {data}: {reason}; name others"
                ) from error
            except OSError:  # such as a full disk; writing_folder reports it
                raise
            except Exception as error:  # of the converter, or any other that an unknown model causes
                reason = " ".join(str(error).split())
                raise UserError(
                    f"CTranslate2 does not convert this model: {reason}; leave --ctranslate2 out"
                ) from error
            for part in (unfinished / "model").iterdir():
                part.rename(unfinished / part.name)
            (unfinished / "model").rmdir()


@contextlib.contextmanager
def converted(path: str, data: str, quantization: str | None) -> Iterator[str]:
    """Convert a checkpoint to a CTranslate2 model in a temporary folder, as a context manager.

    Args:
        path: fairseq checkpoint.
        data: see :func:`to_ctranslate2`.
        quantization: see :func:`to_ctranslate2`.

    Yields: the folder, which is removed at the end of the context.

    Raises:
        UserError: see :func:`export` and :func:`to_ctranslate2`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, folder = f"{temporary}/model.pt", f"{temporary}/model"
        check_conversion(path, folder, data)
        export(path, checkpoint)
        to_ctranslate2(checkpoint, folder, data, quantization)
        yield folder


def import_converters():
    try:
        from ctranslate2 import converters
    except ImportError:
        raise UserError("--ctranslate2 needs CTranslate2: pip install 'hgkd-fairseq[export]'") from None
    return converters


def language_pair(data: str, task) -> tuple[str, str]:
    """Return the source and target language of a model, for which `data` has dictionaries. For a multilingual model,
    these are the languages of one of its pairs.

    Raises:
        UserError: a dictionary is missing.
    """
    source, target = task.get("source_lang"), task.get("target_lang")
    if inputs.kind(task) == inputs.MULTILINGUAL:
        source, target = inputs.pair_of(task)  # any pair will do: all languages share one dictionary
    if os.path.isdir(data) and (source is None or target is None):
        source, target = data_utils.infer_language_pair(data)
    for language in (source, target):
        if not os.path.exists(os.path.join(data, f"dict.{language}.txt")):
            raise UserError(
                f"{data} holds no dictionaries of the model (dict.LANGUAGE.txt); name the folder that "
                "fairseq-preprocess wrote with --data"
            )
    return source, target
