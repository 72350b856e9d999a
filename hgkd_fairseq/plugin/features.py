"""The features and the output layer of fairseq models, in the form that the loss takes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.models.transformer import TransformerDecoderBase
from torch import nn

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head
from hgkd_fairseq.plugin.checkpoints import check_translates

logger = logging.getLogger(__name__)


def unwrap(model: Any) -> Any:
    """Return the fairseq model inside the data-parallel wrappers of fairseq and torch."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def max_positions(model: Any) -> tuple[int, int]:
    """Return the lengths, in tokens, of the longest source and target that a translation model takes."""
    return model.max_positions()


def linear_output(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer that computes a model's logits from its features.

    None if the logits are computed otherwise: adaptive softmax, pointer generator, a decoder that is not a transformer.
    """
    model = unwrap(model)
    decoder: Any = getattr(model, "decoder", None)
    plain = (
        isinstance(decoder, TransformerDecoderBase)
        and type(decoder).output_layer is TransformerDecoderBase.output_layer
        and type(decoder).get_normalized_probs_scriptable is FairseqDecoder.get_normalized_probs_scriptable
        and getattr(decoder, "adaptive_softmax", None) is None
        and type(decoder.output_projection) is nn.Linear
        and "features_only" in inspect.signature(model.forward).parameters
    )
    return decoder.output_projection if plain else None


def head(model: nn.Module, net_input: dict) -> Head:
    """Run a model on a batch's ``net_input`` and return its features (B, T, D) with its output layer.

    For a model without a plain linear output layer, return its log-probabilities (B, T, V) without a layer, which takes
    more memory; this is logged once. The model is always called by its own ``forward``, so that data-parallel wrappers
    take part in the call.
    """
    output = linear_output(model)
    if output is not None:
        features, _ = model(**net_input, features_only=True)
        return Head(features, output.weight, output.bias)
    warn_once(f"{type(unwrap(model)).__name__} has no plain linear output layer: using its full log-probabilities")
    net_output = model(**net_input)
    return Head(unwrap(model).get_normalized_probs(net_output, log_probs=True), None)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Context with the model in evaluation mode; modules that were in training mode return to it afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_student(model: nn.Module) -> None:
    """Check before training that a model, which may be wrapped, can be trained with this loss.

    Raises:
        UserError: if it does not translate from left to right, has an adaptive softmax, or is wrapped by a DDP that
            cannot take the gradient of its output layer.
    """
    check_translates(type(unwrap(model)), "the student")
    output = linear_output(model)
    if output is not None:
        refuse_unused_parameters(model, output)
    elif getattr(unwrap(model).decoder, "adaptive_softmax", None):
        raise UserError(  # fairseq computes its log-probabilities in place, and no gradient passes through them
            "a student with --adaptive-softmax-cutoff cannot be distilled: train it without; a teacher may have one"
        )


def refuse_unused_parameters(model: Any, output: nn.Linear) -> None:
    """Refuse a DDP with find_unused_parameters around a model whose output layer is not tied to the embedding.

    The model's forward does not use the output layer, so that such a DDP treats it as unused and fails when the loss
    adds its gradient ("marked as ready twice"). A layer tied to the embedding is used in the forward.

    Raises:
        UserError: if the model is wrapped in this way.
    """
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        if getattr(model, "find_unused_parameters", False):
            embedding = getattr(unwrap(model).decoder, "embed_tokens", None)
            if embedding is None or embedding.weight is not output.weight:
                raise UserError(
                    "--find-unused-parameters does not work with an output layer of its own: drop it, or tie the layer "
                    "with --share-decoder-input-output-embed, or use --ddp-backend legacy_ddp"
                )
        model = model.module


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
