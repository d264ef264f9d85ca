"""Models that a run can train: one family a file, one row each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling.errors import Refusal, unknown_name
from scaling.models.weights import Weights, decoder_weights
from scaling.spec import ModelShape

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def _decoder(shape: ModelShape) -> Decoder:
    from scaling.models.decoder import Decoder

    return Decoder(shape)


def _mixture(shape: ModelShape) -> Decoder:
    from scaling.models.moe import MixtureDecoder

    return MixtureDecoder(shape)


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    build: Callable[[ModelShape], Decoder]
    """Builds it on torch's current default device."""
    weights: Callable[[ModelShape], Weights]
    """Declares the shape of each parameter: parameters and FLOPs are counted from it. Vectors count as norms, stacks of
    three dimensions as routed experts."""
    mixture: bool = False
    """Whether its shape has a table ``mixture``."""
    latent: bool = False
    """Whether its shape has a table ``latent``."""


FAMILIES: dict[str, Family] = {
    "decoder": Family(_decoder, decoder_weights),
    "mixtral-moe": Family(_mixture, decoder_weights, mixture=True),
    "moonlight-moe": Family(_mixture, decoder_weights, mixture=True, latent=True),
}
"""Families by the name that a shape writes."""


def check_family(shape: ModelShape) -> Family:
    """The row of a shape's family.

    Raises:
        Refusal: There is none, or the shape lacks a part of it or has one that it does not.
    """
    if shape.family not in FAMILIES:
        raise Refusal(unknown_name("model family", shape.family, FAMILIES))
    family = FAMILIES[shape.family]
    for part in ("mixture", "latent"):
        wanted, found = getattr(family, part), getattr(shape, part) is not None
        if wanted != found:
            fitting = [name for name, row in FAMILIES.items() if getattr(row, part) == found]
            raise Refusal(
                f'the family "{shape.family}" {"needs" if wanted else "does not take"} a table {part}. '
                f"{'Add one' if wanted else 'Remove it'}, or use the family {' or '.join(fitting)}."
            )
    return family


def build_model(shape: ModelShape) -> Decoder:
    """An uninitialised model of a shape.

    Raises:
        Refusal: As `check_family`; or the model has other parameters than its family declares.
    """
    family = check_family(shape)
    model, declared = family.build(shape), family.weights(shape)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in [*built, *declared]:
        if built.get(name) != declared.get(name):
            raise Refusal(
                f'the family "{shape.family}" declares {_size(declared.get(name))} for the parameter {name}, and the model '
                f"that it builds has {_size(built.get(name))}, so its counts of parameters and FLOPs would be wrong. "
                "Correct weights in its row of scaling.models.FAMILIES."
            )
    return model


def _size(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"the shape {'x'.join(map(str, shape))}"
