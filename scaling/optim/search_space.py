"""Search ranges of hyper-parameters: the scale of each, the range in which a search begins, and its limits.

The ranges of an optimizer are in its row of ``scaling.optim.registry``, those of every run in `SHARED`. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Literal

from scaling.errors import UserError
from scaling.io import Strict

Scale = Literal["log", "linear", "complement"]
"""``complement`` is the log of the distance to one, for betas: 0.9, 0.99 and 0.999 are equally far apart."""


class SearchRange(Strict, frozen=True):
    """The prior of one hyper-parameter: uniform on `scale` from `low` to `high`; widened at an edge, up to the limits."""

    name: str
    """``peak_lr``, ``weight_decay``, an option of the optimizer, or a row of `SHARED`."""
    scale: Scale
    low: float
    high: float
    least: float
    """Lower limit of a widened range."""
    most: float
    """Upper limit of a widened range."""

    def __post_init__(self) -> None:
        """Check the order of the four numbers, and that the scale can hold them."""
        if not self.least <= self.low < self.high <= self.most:
            raise UserError(
                f"{self.name}: the search from {self.low:g} to {self.high:g} within {self.least:g} to {self.most:g} is not "
                "in order. Give low < high, both within the limits."
            )
        if (self.scale == "log" and self.least <= 0) or (self.scale == "complement" and self.most >= 1):
            raise UserError(f"{self.name}: the scale {self.scale} does not reach to {self.least:g} or {self.most:g}.")

    def position(self, value: float) -> float:
        """A value on the scale, on which values are sampled uniformly and fitted by parabolas; rises with the value."""
        if self.scale == "log":
            return math.log(value)
        return -math.log1p(-value) if self.scale == "complement" else value

    def value(self, position: float) -> float:
        """The inverse of `position`."""
        if self.scale == "log":
            return math.exp(position)
        return -math.expm1(-position) if self.scale == "complement" else position


SHARED: tuple[SearchRange, ...] = (
    SearchRange(name="batch_tokens", scale="log", low=2**16, high=2**21, least=1, most=2**26),
    # As shares of the run's tokens, and of the peak.
    SearchRange(name="warmup", scale="log", low=0.004, high=0.1, least=5e-4, most=0.4),
    SearchRange(name="final_fraction", scale="linear", low=0.0, high=0.3, least=0.0, most=1.0),
)
"""Hyper-parameters of every run, with any optimizer."""
