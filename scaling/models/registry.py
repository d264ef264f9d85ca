"""Models that a run can train: one family a file, one row each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling.errors import UserError, unknown_name
from scaling.model_config import ModelConfig
from scaling.models.weights import Weights, decoder_weights

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def _decoder(shape: ModelConfig) -> Decoder:
    from scaling.models.decoder import Decoder

    return Decoder(shape)


def _mixture(shape: ModelConfig) -> Decoder:
    from scaling.models.moe import MoEDecoder

    return MoEDecoder(shape)


@dataclass(frozen=True)
class ModelFamily:
    """One kind of model."""

    build: Callable[[ModelConfig], Decoder]
    """Builds it on torch's current default device."""
    weights: Callable[[ModelConfig], Weights]
    """Declares the shape of each parameter: parameters and FLOPs are counted from it. Vectors count as norms, stacks of
    three dimensions as routed experts."""
    moe: bool = False
    """Whether its shape has a table ``mixture``."""
    mla: bool = False
    """Whether its shape has a table ``latent``."""


FAMILIES: dict[str, ModelFamily] = {
    "decoder": ModelFamily(_decoder, decoder_weights),
    "mixtral-moe": ModelFamily(_mixture, decoder_weights, moe=True),
    "moonlight-moe": ModelFamily(_mixture, decoder_weights, moe=True, mla=True),
}
"""Families by the name that a shape writes."""


def check_family(shape: ModelConfig) -> ModelFamily:
    """The row of a shape's family.

    Raises:
        UserError: There is none, or the shape lacks a part of it or has one that it does not.
    """
    if shape.family not in FAMILIES:
        raise UserError(unknown_name("model family", shape.family, FAMILIES))
    family = FAMILIES[shape.family]
    for part in ("moe", "mla"):
        wanted, found = getattr(family, part), getattr(shape, part) is not None
        if wanted != found:
            fitting = [name for name, row in FAMILIES.items() if getattr(row, part) == found]
            raise UserError(
                f'the family "{shape.family}" {"needs" if wanted else "does not take"} a table {part}. '
                f"{'Add one' if wanted else 'Remove it'}, or use the family {' or '.join(fitting)}."
            )
    return family


def build_model(shape: ModelConfig) -> Decoder:
    """An uninitialised model of a shape.

    Raises:
        UserError: As `check_family`; or the model has other parameters than its family declares.
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


def _size(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"the shape {'x'.join(map(str, shape))}"


def check_upcycled(shape: ModelConfig) -> None:
    """Refuse a shape whose experts are not the size of the feed-forward, or that has more than copies of it.

    Raises:
        UserError: As said.
    """
    mixture = shape.moe
    if mixture is None:
        raise UserError("upcycling makes experts, and this shape has none. Give the arm a table moe.")
    if mixture.num_shared_experts or mixture.granularity != 1:
        raise UserError(
            f"upcycling copies the whole feed-forward into every routed expert, and this mixture has num_shared_experts = "
            f"{mixture.num_shared_experts} and granularity = {mixture.granularity}. Set num_shared_experts = 0 and granularity = 1."
        )
