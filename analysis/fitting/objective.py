"""Objectives of a fit: a loss function of the residuals, and the space in which the residuals are taken."""

from __future__ import annotations

from typing import Literal

from analysis.fitting.solver import Space
from scaling.errors import UserError
from scaling.io import Strict

LossFunction = Literal["least-squares", "huber", "absolute"]

HUBER_DELTA = 1e-3
"""Threshold on log loss: the field's convention for surfaces (Hoffmann et al. 2022, sec. D.2)."""


class Objective(Strict, frozen=True):
    """The sum over rows that a fit minimises."""

    function: LossFunction = "least-squares"
    space: Space = "log"
    """Residuals of ln loss, or of the loss itself in nats."""
    delta: float | None = None
    """Huber's threshold in units of the residual."""

    def __post_init__(self) -> None:
        """Refuse a threshold without Huber and Huber without a threshold."""
        if (self.function == "huber") != (self.delta is not None):
            raise UserError(
                f'the loss function "{self.function}" {"needs" if self.function == "huber" else "does not take"} a '
                f"delta; only huber has one. Its usual value on log loss is {HUBER_DELTA:g}."
            )

    def describe(self) -> str:
        """Name for captions: ``Huber, delta 0.001, on log loss``."""
        names = {"least-squares": "least squares", "absolute": "least absolute deviations"}
        name = names.get(self.function, f"Huber, delta {self.delta:g}," if self.delta else "")
        return f"{name} on {'log loss' if self.space == 'log' else 'loss'}"


LEAST_SQUARES = Objective(function="least-squares", space="loss")
"""Unweighted, in loss space, like the lines that Moonlight draws."""
HUBER = Objective(function="huber", space="log", delta=HUBER_DELTA)
