"""A fairseq model's features and output layer, as the loss takes them."""

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
    """The fairseq model inside fairseq's and torch's data-parallel wrappers."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def max_positions(model: Any) -> tuple[int, int]:
    """Tokens of the longest source and the longest target that a translation model takes."""
    return model.max_positions()


def linear_output(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the model's logits from its features, or None where logits are made otherwise
    (adaptive softmax, a pointer generator, a decoder that is no transformer)."""
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
    """Run the model on a batch's ``net_input``: features (B, T, D) with the output layer that belongs to them.

    A model without a plain linear output gives its log-probabilities (B, T, V), which takes more memory: logged
    once. The model is always reached through its own ``forward``, so that data-parallel wrappers see the call.
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
    """The model as it translates, for a while; what was in training is so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_student(model: nn.Module) -> None:
    """Refuse a model that cannot be trained with this loss, before it is.

    Raises:
        UserError: it does not translate from left to right, has no gradient, or is wrapped in a way that loses it.
    """
    check_translates(type(unwrap(model)), "the student")
    output = linear_output(model)
    if output is not None:
        refuse_unused_parameters(model, output)
    elif getattr(unwrap(model).decoder, "adaptive_softmax", None):
        raise UserError(  # fairseq's own log-probabilities of it are made in place: there is no gradient through them
            "a student with --adaptive-softmax-cutoff cannot be distilled: train it without; a teacher may have one"
        )


def refuse_unused_parameters(model: Any, output: nn.Linear) -> None:
    """torch's DDP with find_unused_parameters takes an output layer that its own forward did not use for unused, and
    fails when the loss brings its gradient ("marked as ready twice"). A layer tied to the embedding was used."""
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
