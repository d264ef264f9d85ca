"""Robustness of the headline's ratio: its interval by several methods, and the ratio without each rung.

With five cells the methods differ by a factor of four in width. All are shown; the headline uses the one whose coverage
was measured (tests/bench/bench_analysis.py).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from analysis.data.cells import Array, Cells
from analysis.fitting.families import ratio_of
from analysis.fitting.fit import Minimum
from analysis.fitting.solver import minimise
from analysis.uncertainty.intervals import (
    MAX_CELLS_FOR_T_INTERVAL,
    MAX_RESAMPLED_GROUPS,
    bootstrap,
    has_width,
    linear,
    percentile,
    random_sums,
    t_interval,
)
from analysis.uncertainty.paired import Difference
from scaling.io import Strict
from scaling.units import pflops_days

WEBB_WEIGHT_SIZES = np.sqrt([0.5, 1.0, 1.5])
"""Absolute values of the six-point weights for wild resampling of few cells (Webb 2023); each has either sign."""

MAX_RUNGS_FOR_JACKKNIFE = 60
"""Rungs up to which the ratio is refitted without each."""


class Interval(Strict, frozen=True):
    """The 95 % interval of the headline's ratio by one method."""

    method: str
    low: float
    high: float
    remark: str


class RatioWithoutRung(Strict, frozen=True):
    """The headline's ratio when one rung is left out of the fit."""

    compute: float
    """PFLOP/s-days of the rung."""
    ratio: float | None
    """None where the remaining laws never reach the headline's loss."""


def intervals_by_method(
    fitted: Minimum, cells: Cells, loss: float, line: Difference | None, *, resamples: int, seed: int
) -> list[Interval]:
    """The interval of the ratio at one loss by every method that the cells allow."""
    quantity = partial(ratio_of, fitted, losses=np.array([loss]))
    centre = quantity(fitted.theta)
    # Every row in a cell of its own: no covariance between the arms.
    apart = cells._replace(cell=np.arange(len(cells.cell)))
    paired, alone = t_interval(fitted, cells, quantity), t_interval(fitted, apart, quantity)
    # No paired interval at all (NaN) means that the arms' noise cancels.
    wider = not float(alone[1][0] - alone[0][0]) <= float(paired[1][0] - paired[0][0])
    found = [
        _interval("t, paired", paired, "the arms' covariance within cells"),
        _interval("t, arms independent", alone, f"as if the arms shared nothing: too {'wide' if wider else 'narrow'}"),
    ]
    count = len(np.unique(cells.cell))
    few = count <= MAX_CELLS_FOR_T_INTERVAL
    sign = "one sign for both arms of a cell" + ("; too narrow with so few cells" if few else "")
    draws = quantity(wild(fitted, cells, resamples=resamples, seed=seed))
    found.append(_interval("wild bootstrap, paired", percentile(draws, centre), sign))
    draws = quantity(bootstrap(fitted, cells.cell, resamples=resamples, seed=seed))
    remark = "under-covers with so few cells" if few else "both laws refitted in every resample"
    found.append(_interval("case bootstrap, paired", percentile(draws, centre), remark))
    if line is not None:
        baseline, challenger = (fitted.law(arm).frontier() for arm in (0, 1))
        if not baseline.floor and not challenger.floor:
            # d ln L = -exponent * d ln C: a half width in log loss, over the exponent, is one in log compute.
            half = line.at(challenger.compute(loss))[1] / baseline.exponent
            ends = (centre - half, centre + half)
            found.append(_interval("t of the paired differences", ends, "the exponent taken as fitted: too narrow"))
    return [interval for interval in found if interval is not None]


def _interval(method: str, ends: tuple[Array, Array], remark: str) -> Interval | None:
    low, high = (float(np.exp(end[0])) for end in has_width(*ends))
    if not (np.isfinite(low) and np.isfinite(high)):
        return None
    return Interval(method=method, low=low, high=high, remark=remark)


def wild(fitted: Minimum, cells: Cells, *, resamples: int, seed: int) -> Array:
    """Parameters under wild resampling: each cell's residuals times one random weight, to first order.

    With the response ``R`` of `Linear` and residuals r, resample w is ``theta + sum_c w_c (R r)_c`` over cells c. The plan of
    sizes stays as it is, and the noise may differ from cell to cell. The result has the shape ``(resamples, parameters)``.
    """
    found = linear(fitted, cells)
    names, inverse = np.unique(cells.cell, return_inverse=True)
    generator = np.random.default_rng(seed)
    # Residuals are smaller than the noise by sqrt(freedom / rows), for the parameters fitted to them.
    rows = np.bincount(cells.rows.arm)[cells.rows.arm]
    r = fitted.log_residuals() * np.sqrt(rows / max(found.freedom, 1e-9) if found.freedom >= 1.0 else 1.0)
    # Effect of each cell on each parameter: (cells, parameters).
    sums = [np.bincount(inverse, weights=row * r) for row in found.response]
    moves: Array = np.stack(sums, axis=1).astype(np.float64)
    if len(names) > MAX_RESAMPLED_GROUPS:
        return fitted.theta + random_sums(moves, resamples, generator)
    shape = (resamples, len(names))
    weights = generator.choice(WEBB_WEIGHT_SIZES, shape) * generator.choice([-1.0, 1.0], shape)
    return np.asarray(fitted.theta + weights @ moves)


def jackknife(fitted: Minimum, cells: Cells, loss: float) -> list[RatioWithoutRung]:
    """The ratio at one loss without each rung in turn; empty with fewer than four rungs or very many."""
    rungs = np.unique(cells.rung)
    left = [np.unique(cells.rung[(cells.rows.arm == arm)]) for arm in range(len(cells.arms))]
    if min(len(own) for own in left) < 4 or len(rungs) > MAX_RUNGS_FOR_JACKKNIFE:
        return []
    # One refit a rung, shape (rungs, rows): zero weight on the rung left out.
    weights = cells.rung != rungs[:, None]
    theta = minimise(fitted.problem, fitted.theta, weights, tolerance=1e-10, limit=150).theta
    values = ratio_of(fitted, theta, np.array([loss]))[:, 0]
    flops = cells.rows.columns["flops"]
    return [
        RatioWithoutRung(
            compute=pflops_days(float(np.exp(np.log(flops[cells.rung == rung]).mean()))),
            ratio=float(np.exp(value)) if np.isfinite(value) else None,
        )
        for rung, value in zip(rungs, values, strict=True)
    ]
