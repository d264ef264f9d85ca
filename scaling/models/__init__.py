"""Models that a run can train: one family a file, one row each in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from scaling.errors import Refusal, unknown_name
from scaling.spec import ModelShape

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def _decoder(shape: ModelShape) -> Decoder:
    from scaling.models.decoder import Decoder

    return Decoder(shape)


FAMILIES: dict[str, Callable[[ModelShape], Decoder]] = {"decoder": _decoder}
"""What builds a model of a family from its shape, on torch's current default device."""


def build_model(shape: ModelShape) -> Decoder:
    """An uninitialised model of a shape.

    Raises:
        Refusal: The family has no row in `FAMILIES`.
    """
    if shape.family not in FAMILIES:
        raise Refusal(unknown_name("model family", shape.family, FAMILIES))
    return FAMILIES[shape.family](shape)
