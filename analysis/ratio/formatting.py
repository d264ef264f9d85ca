"""Laws, ratios and intervals as text."""

from __future__ import annotations

import math

from analysis.fitting.laws import Law, PowerLaw
from analysis.ratio.compare import Comparison
from scaling.units import FLOPS_PER_PFLOPS_DAY

MAX_COMPUTE_IN_FLOPS = 1e-2
"""PFLOP/s-days below which computes are shown in FLOPs."""


def law_text(law: Law) -> str:
    """A law as a formula with four to five digits."""
    return law.text()


def law_math(law: PowerLaw) -> str:
    """A law of compute for a figure's legend."""
    power = rf"{law.scale:.4g}\,C^{{-{law.exponent:.4f}}}"
    return f"${law.floor:.3g} + {power}$" if law.floor else f"${power}$"


def interval_text(low: float | None, high: float | None) -> str:
    """``0.45 to 0.55``, or why there is none."""
    return "no interval" if low is None or high is None else f"{ratio_text(low)} to {ratio_text(high)}"


def ratio_text(value: float) -> str:
    """A ratio of any size with three digits."""
    if not math.isfinite(value):
        return "unbounded"
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.0995 <= value < 10 else f"{value:.3g}"


def compute_unit(comparison: Comparison) -> tuple[str, float]:
    """The unit in which computes of a comparison are shown, and how many make a PFLOP/s-day: FLOPs for small runs."""
    small = max(fit.compute_range[1] for fit in comparison.fits.values()) < MAX_COMPUTE_IN_FLOPS
    return ("FLOPs", FLOPS_PER_PFLOPS_DAY) if small else ("PFLOP/s-days", 1.0)
