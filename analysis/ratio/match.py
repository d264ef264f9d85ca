"""FLOPs to match: the challenger's compute over the baseline's at equal loss.

Two power laws with different exponents have a different ratio at every loss, so a `MatchRatio` holds the loss and the two
computes at which it is taken, and whether the runs reach that far.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from analysis.fitting.fit import Fit
from analysis.fitting.laws import Law, PowerLaw, UnreachableLoss
from scaling.errors import UserError
from scaling.io import Strict

Extrapolation = Literal["interpolated", "half-extrapolated", "extrapolated"]
"""Both laws are inside the compute of their runs, one of them is, or none."""

RANGE_TOLERANCE = 1e-6
"""Relative tolerance at the ends of a compute range, so that the last run itself is inside."""


class MatchRatio(Strict, frozen=True):
    """The match ratio at one loss."""

    loss: float
    baseline_compute: float
    """PFLOP/s-days that the baseline's law needs for that loss."""
    challenger_compute: float
    ratio: float
    """Challenger compute over baseline compute: below 1 the challenger needs less."""
    low: float | None
    """Lower end of the interval; None if there are too few cells for one."""
    high: float | None
    support: Extrapolation

    @property
    def multiplier(self) -> float:
        """The inverse: how many times as much compute the baseline needs."""
        return 1.0 / self.ratio


def compute_law(law: Law) -> PowerLaw:
    """The law of compute of any law; a surface's is that of its best split."""
    return law.frontier()


def support(baseline: Fit, challenger: Fit, baseline_compute: float, challenger_compute: float) -> Extrapolation:
    """The number of laws inside the compute of their runs, by name."""
    inside = [
        fit.compute_range[0] * (1 - RANGE_TOLERANCE) <= compute <= fit.compute_range[1] * (1 + RANGE_TOLERANCE)
        for fit, compute in ((baseline, baseline_compute), (challenger, challenger_compute))
    ]
    return ("extrapolated", "half-extrapolated", "interpolated")[sum(inside)]


def common_losses(baseline: Fit, challenger: Fit) -> tuple[float, float]:
    """Lowest and highest loss at which both laws are inside the compute of their runs; a `UserError` without any."""
    (b_high, b_low), (c_high, c_low) = (
        [fit.law.frontier().loss(end) for end in fit.compute_range] for fit in (baseline, challenger)
    )
    low, high = max(b_low, c_low), min(b_high, c_high)
    if not low < high * (1 + RANGE_TOLERANCE):
        raise UserError(
            f"{baseline.arm} covers losses {b_low:.3f} to {b_high:.3f} and {challenger.arm} {c_low:.3f} to {c_high:.3f}: "
            "the arms have no loss in common, so every ratio would be an extrapolation. Train larger runs of the worse arm "
            "or smaller ones of the better, or request extrapolated values by name."
        )
    return low, high


def at_loss(baseline: Fit, challenger: Fit, loss: float, interval: tuple[float, float] | None = None) -> MatchRatio:
    """The ratio at one loss; `UnreachableLoss` where it is at or below the floor of one of the laws."""
    b, c = baseline.law.frontier().compute(loss), challenger.law.frontier().compute(loss)
    if not (0.0 < b < np.inf and 0.0 < c < np.inf):
        raise UnreachableLoss(
            f"loss {loss:g} takes more compute than a floating-point number holds; give a loss nearer the runs."
        )
    low, high = interval if interval and np.all(np.isfinite(interval)) else (None, None)
    return MatchRatio(
        loss=float(loss),
        baseline_compute=float(b),
        challenger_compute=float(c),
        ratio=float(c / b),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        support=support(baseline, challenger, b, c),
    )
