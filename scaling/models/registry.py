"""The model families a run can train, one row each in `FAMILIES`. Imports no torch until a model is built.

A family is one file and one row: a subclass of `scaling.models.decoder.Decoder` that overrides `make_attention` or
`make_feed_forward`, the shapes of its parameters, and, if it has any, options of its own (``family_options``). Counts
of parameters and FLOPs, ladders, the optimizer's FLOPs and the export follow from the row. An installed package adds
one by the entry point group ``scaling_harness.models``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scaling.errors import UserError
from scaling.io import Strict, typed_options
from scaling.model_config import ModelConfig
from scaling.models.hub import DEEPSEEK_V3, LLAMA, MIXTRAL, HubFormat
from scaling.models.weights import Weights, attention_channels, decoder_weights
from scaling.registry import Registry

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def _decoder(shape: ModelConfig) -> Decoder:
    from scaling.models.decoder import Decoder

    return Decoder(shape)


def _moe_decoder(shape: ModelConfig) -> Decoder:
    from scaling.models.moe import MoEDecoder

    return MoEDecoder(shape)


class NoOptions(Strict, frozen=True):
    """A family without options of its own."""


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One row of `FAMILIES`."""

    build: Callable[[ModelConfig], Decoder]
    """Builds the model on torch's current default device."""
    weights: Callable[[ModelConfig], Weights]
    """Shape of each parameter by its name: parameters and FLOPs are counted from it. Vectors count as norms, stacks of
    three dimensions as routed experts. Layers after the first ``dense_layers`` must be alike (`scaling.flops.depth_line`)."""
    attention_channels: Callable[[ModelConfig], int] = attention_channels
    """Channels of all heads of a layer that scores and mixing multiply: those of queries and those of values."""
    requires: tuple[Literal["moe", "mla"], ...] = ()
    """Tables that its shape must have; it must not have the other."""
    options: type[Strict] = NoOptions
    """Type of its ``family_options``."""
    hub: HubFormat | None = None
    """Its format on the Hugging Face Hub; None if it has none, and then it cannot be exported."""


FAMILIES: Registry[ModelFamily] = Registry(
    "model family",
    "models",
    {
        "decoder": ModelFamily(build=_decoder, weights=decoder_weights, hub=LLAMA),
        "mixtral-moe": ModelFamily(build=_moe_decoder, weights=decoder_weights, requires=("moe",), hub=MIXTRAL),
        "moonlight-moe": ModelFamily(
            build=_moe_decoder, weights=decoder_weights, requires=("moe", "mla"), hub=DEEPSEEK_V3
        ),
    },
)
"""Families by the name that a shape writes."""


def check_family(shape: ModelConfig) -> ModelFamily:
    """The row of a shape's family.

    Raises:
        UserError: There is none, the shape lacks a table or has one too many, or an option of the family is wrong.
    """
    family = FAMILIES.row(shape.family)
    for part in ("moe", "mla"):
        required, found = part in family.requires, getattr(shape, part) is not None
        if required != found:
            fitting = [name for name, row in FAMILIES.items() if (part in row.requires) == found]
            raise UserError(
                f'the family "{shape.family}" {"needs" if required else "does not take"} a table {part}. '
                f"{'Add one' if required else 'Remove it'}, or use the family {' or '.join(fitting)}."
            )
    if shape.family_options is not None:
        typed_options(shape.family_options, family.options, owner=f"the family {shape.family}")
    return family


def build_model(shape: ModelConfig) -> Decoder:
    """An uninitialised model of a shape.

    Raises:
        UserError: The shape does not fit its family (`check_family`), or the model has other parameters than its family declares.
    """
    family = check_family(shape)
    model, declared = family.build(shape), family.weights(shape)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in [*built, *declared]:
        if built.get(name) != declared.get(name):
            raise UserError(
                f'the family "{shape.family}" declares {_size(declared.get(name))} for the parameter {name}, and the model '
                f"that it builds has {_size(built.get(name))}, so its counts of parameters and FLOPs would be wrong. "
                "Correct weights in its row of scaling.models.registry.FAMILIES."
            )
    return model


def build_model_on_meta(shape: ModelConfig) -> Decoder:
    """A model of a shape without memory for its parameters."""
    import torch

    with torch.device("meta"):
        return build_model(shape)


def _size(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"the shape {'x'.join(map(str, shape))}"


def check_upcycled(shape: ModelConfig) -> None:
    """Refuse a shape that upcycling cannot make: each expert must be a copy of the whole feed-forward."""
    mixture = shape.moe
    if mixture is None:
        raise UserError("upcycling makes experts, and this shape has none. Give the arm a table moe.")
    if mixture.num_shared_experts or mixture.granularity != 1:
        raise UserError(
            "upcycling copies the whole feed-forward into every routed expert, and this shape has num_shared_experts = "
            f"{mixture.num_shared_experts} and granularity = {mixture.granularity}. "
            "Set num_shared_experts = 0 and granularity = 1."
        )
