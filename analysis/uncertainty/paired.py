"""The line through the paired differences of two arms, their most precise comparison.

``d(C) = ln L_baseline - ln L_challenger`` at each shared cell, against ``ln C``. A slope of zero means that the ratio
is constant over compute under power laws of one exponent.
"""

from __future__ import annotations

import numpy as np

from analysis.data.cells import SAME_COMPUTE, Array, Cells
from analysis.uncertainty.intervals import ROUNDING, t_quantile
from scaling.io import Strict
from scaling.units import pflops_days


class Difference(Strict, frozen=True):
    """Least-squares line of the log-loss differences over the log of compute."""

    cells: int
    centre: float
    """Mean ln of compute in PFLOP/s-days, where `level` is taken."""
    level: float
    """ln loss of the baseline minus that of the challenger at the centre."""
    slope: float
    """Change of the difference for each e-fold of compute; negative: the advantage shrinks."""
    residual: float
    """Standard deviation of the differences about the line."""
    spread: float
    """Sum of squared deviations of ln compute."""
    slope_low: float
    slope_high: float
    p: float
    """Two-sided t test of a slope of zero."""
    correlation: float
    """Correlation of the two arms' residuals about their own log-log lines."""

    def at(self, compute: float) -> tuple[float, float]:
        """The difference at a compute in PFLOP/s-days, and the half width of its 95 % t interval.

        The standard error of a regression line at x is ``residual * sqrt(1 / n + (x - centre)^2 / spread)``.
        """
        x = float(np.log(compute)) - self.centre
        error = self.residual * np.sqrt(1.0 / self.cells + x * x / self.spread)
        return self.level + self.slope * x, float(t_quantile(self.cells - 2)) * float(error)


def cell_means(cells: Cells, arm: int) -> tuple[Array, Array]:
    """Mean ln loss and mean ln compute (PFLOP/s-days) of one arm in each shared cell."""
    paired = cells.paired
    here = (cells.rows.arm == arm) & np.isin(cells.cell, paired)
    place = np.searchsorted(paired, cells.cell[here])
    counts = np.bincount(place, minlength=len(paired))
    loss, compute = (
        np.bincount(place, weights=np.log(values[here]), minlength=len(paired)) / counts
        for values in (cells.rows.loss, pflops_days(1.0) * cells.rows.columns["flops"])
    )
    return loss, compute


def difference(cells: Cells) -> Difference | None:
    """The paired difference line of the first two arms; None with fewer than three shared cells or two shared computes.

    With ``u = x - mean(x)``, the least-squares slope is ``sum(u d) / sum(u^2)``, with standard error
    ``residual / sqrt(sum(u^2))``. Cells whose arms differ in compute by more than 2 % are not paired.
    """
    from scipy.special import stdtr

    # Both arms at the same cells, by cell: ln loss and ln compute.
    one, x = cell_means(cells, 0)
    two, other = cell_means(cells, 1)
    same = np.abs(x - other) <= SAME_COMPUTE
    one, two, x = one[same], two[same], x[same]
    if len(x) < 3 or np.ptp(x) < SAME_COMPUTE:
        return None
    centre = float(x.mean())
    u = x - centre
    spread = float(np.sum(u * u))

    def line(y: Array) -> tuple[float, float, Array]:
        slope = float(np.sum(u * y) / spread)
        return float(y.mean()), slope, y - y.mean() - slope * u

    # Two parameters are estimated, so n - 2 degrees of freedom are left.
    level, slope, left = line(one - two)
    freedom = len(x) - 2
    residual = float(np.sqrt(np.sum(left**2) / freedom))
    error = residual / spread**0.5
    half = float(t_quantile(freedom)) * error
    # Differences that are equal up to rounding show no slope; a test of one would divide rounding by rounding.
    flat = float(np.ptp(one - two)) <= ROUNDING
    r_one, r_two = line(one)[2], line(two)[2]
    size = float(np.sqrt(np.sum(r_one**2) * np.sum(r_two**2)))
    return Difference(
        cells=len(x),
        centre=centre,
        level=level,
        slope=slope,
        residual=residual,
        spread=spread,
        slope_low=slope - half,
        slope_high=slope + half,
        p=1.0 if flat else float(2.0 * stdtr(freedom, -abs(slope) / error)) if error > 0 else 0.0,
        correlation=float(np.sum(r_one * r_two) / size) if size > 0 else 0.0,
    )
