"""Models that a run can train: one family a file, one row each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling.errors import Refusal, unknown_name
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
    """One kind of model: what builds it, on torch's current default device, and which parts its shape has."""

    build: Callable[[ModelShape], Decoder]
    mixture: bool = False
    latent: bool = False


FAMILIES: dict[str, Family] = {
    "decoder": Family(_decoder),
    "mixtral-moe": Family(_mixture, mixture=True),
    "moonlight-moe": Family(_mixture, mixture=True, latent=True),
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
        Refusal: As `check_family`.
    """
    return check_family(shape).build(shape)
