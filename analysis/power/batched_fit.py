"""Batched fits and intervals of many synthetic studies of one ladder, with the results of the fit of a single study.

`analysis.fitting.families.fit_family` and `analysis.uncertainty.intervals.t_interval` fit one study, from many starts, which
is too slow for a thousand studies of thirty plans. Here every study starts from the minimum of the noise-free runs, and
Gauss-Newton steps are taken for all studies side by side. tests/sweeps/test_design.py compares the two.

Rows are ordered by arm, then by cell: row ``arm * cells + cell``. Arrays `loss` and `kept` have the shape
``(studies, rows)``, `theta` ``(studies, parameters)``, `at` (where ratios are evaluated) ``(losses,)``. A run that was
lost, False in `kept`, has weight zero.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array
from analysis.fitting.families import frontiers, ratio_of
from analysis.fitting.fit import Minimum
from analysis.fitting.solver import MAX_STEP, MIN_FLOOR_SHARE, predict
from analysis.uncertainty.intervals import MIN_FREEDOM, gradient, satterthwaite, t_quantile
from scaling.units import pflops_days

Flags = NDArray[np.bool_]

MAX_STEPS = 80
"""Gauss-Newton steps at most; a dozen are enough where residuals are a few percent."""

MIN_RUNS = 3
"""Runs of each arm below which a study has no interval."""


class Intervals(NamedTuple):
    """Log match ratios with their intervals, each of shape ``(studies, losses)``; NaN where a study has none."""

    ratio: Array
    low: Array
    high: Array

    @property
    def width(self) -> Array:
        """Width of the interval of the ratio itself."""
        return np.exp(self.high) - np.exp(self.low)


def fit_studies(fitted: Minimum, loss: Array, kept: Flags) -> Array:
    """Parameters of least squares in loss space, from the family at the noise-free runs.

    Gauss-Newton with residuals ``e = (P - L)``, zero for lost runs, and Jacobian ``J = P p_k z`` (`analysis.fitting.solver`):
    ``(J'J + damping * diag(J'J)) step = -J'e``.
    """
    z, term = fitted.problem.z, fitted.problem.term
    floors = np.array([not np.any(z[:, term == k] < 0.0) for k in term])
    lowest = np.log(loss.min() * MIN_FLOOR_SHARE)
    theta = np.repeat(fitted.theta[None], len(loss), axis=0)
    damping = np.full(len(loss), 1e-6)

    def residual(at: Array, which: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        log_prediction, shares = predict(fitted.problem, at)
        height = np.exp(log_prediction)  # P, (studies, rows)
        jacobian = (height[:, None] * shares[:, term]) * z.T
        left = (height - loss[which]) * kept[which]
        return left, jacobian * kept[which][:, None], np.sum(left**2, axis=1)

    active = np.arange(len(loss))
    left, jacobian, value = residual(theta, active)
    for _ in range(MAX_STEPS):
        # J'J to unit diagonal: floor and exponents differ by decades.
        hessian = np.matmul(jacobian, jacobian.transpose(0, 2, 1))
        gradient = np.matmul(jacobian, left[:, :, None])[:, :, 0]
        scale = np.einsum("bpp->bp", hessian) + 1e-300
        unit = 1.0 / np.sqrt(scale)
        matrix = hessian * unit[:, :, None] * unit[:, None]
        matrix[:, range(len(term)), range(len(term))] += damping[active, None]
        step = -unit * np.linalg.solve(matrix, (gradient * unit)[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, MAX_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        promised = np.abs(np.einsum("bp,bp->b", step, gradient))
        trial = theta[active] + step
        trial[:, floors] = np.maximum(trial[:, floors], lowest)
        new_left, new_jacobian, new_value = residual(trial, active)
        better = new_value <= value
        theta[active[better]] = trial[better]
        damping[active] = np.where(better, np.maximum(damping[active] * 0.1, 1e-12), damping[active] * 10.0)
        left[better], jacobian[better], value[better] = new_left[better], new_jacobian[better], new_value[better]
        # Studies that are done leave the arrays.
        going = (promised > 1e-14 * value + 1e-24) & (damping[active] < 1e8)
        if not going.any():
            break
        active, left, jacobian, value = active[going], left[going], jacobian[going], value[going]
    return theta


def law_intervals(fitted: Minimum, theta: Array, loss: Array, kept: Flags, at: Array) -> Intervals:
    """The interval of `analysis.uncertainty.intervals.t_interval` in every study, paired within cells.

    The steps are those of `analysis.uncertainty.intervals.linear` and `Linear.spread`, where they are explained.
    """
    studies, rows = loss.shape
    cells = rows // 2
    z, term = fitted.problem.z, fitted.problem.term
    log_prediction, shares = predict(fitted.problem, theta)
    jacobian = shares[:, term] * z.T * kept[:, None]  # of ln P, (studies, parameters, rows)
    weight = np.exp(2.0 * log_prediction)
    weighted = jacobian * weight[:, None]
    bread = np.linalg.pinv(np.matmul(weighted, jacobian.transpose(0, 2, 1)), hermitian=True)
    response = np.matmul(bread, weighted)  # (studies, parameters, rows)
    leverage = np.einsum("spr,spr->sr", jacobian, response).reshape(studies, 2, cells)
    residual = ((np.log(loss) - log_prediction) * kept).reshape(studies, 2, cells)
    held = kept.reshape(studies, 2, cells)
    by_arm = np.maximum(held.sum(axis=2) - leverage.sum(axis=2), 0.0)
    sigma = np.sqrt(np.sum(residual**2, axis=2) / np.maximum(by_arm, 1e-9))
    shared = held[:, 0] & held[:, 1]
    one, two = residual[:, 0] * shared, residual[:, 1] * shared
    size = np.sqrt(np.sum(one**2, axis=1) * np.sum(two**2, axis=1))
    known = (shared.sum(axis=1) >= 3) & (size > 0)
    correlation = np.where(known, np.sum(one * two, axis=1) / np.where(size > 0, size, 1.0), 0.0).clip(-1.0, 1.0)
    noise = np.einsum("si,ij->sij", sigma**2, np.eye(2))
    noise[:, 0, 1] = noise[:, 1, 0] = correlation * sigma[:, 0] * sigma[:, 1]
    log_ratios = partial(ratio_of, fitted, losses=at)
    slope = gradient(log_ratios, theta)  # (studies, losses, parameters)
    pull = np.matmul(slope, response).reshape(studies, len(at), 2, cells)
    A = np.einsum("skic,skjc->skij", pull, pull)
    product = np.matmul(A, noise[:, None])
    variance = np.trace(product, axis1=2, axis2=3).clip(0.0)
    squares = np.trace(product @ product, axis1=2, axis2=3)
    freedom = by_arm.min(axis=1)
    error = np.sqrt(variance)
    degrees = freedom[:, None] * satterthwaite(variance, squares, freedom[:, None], 2)
    with np.errstate(invalid="ignore"):
        half = t_quantile(np.maximum(degrees, 1e-9)) * error
    half = np.where(freedom[:, None] < MIN_FREEDOM, np.nan, half)
    usable = (held.sum(axis=2) >= MIN_RUNS).all(axis=1)
    centre = np.where(usable[:, None], log_ratios(theta), np.nan)
    return Intervals(centre, centre - half, centre + half)


def difference_intervals(fitted: Minimum, theta: Array, loss: Array, kept: Flags, flops: Array, at: Array) -> Intervals:
    """The interval of the paired difference line (`analysis.uncertainty.paired`), the baseline's exponent taken as fitted.

    The half width h of the log-loss difference at the challenger's compute becomes the ratio at ``L exp(-h)`` and
    ``L exp(h)`` under the baseline's law. `flops` are those of the cells.
    """
    studies, rows = loss.shape
    cells = rows // 2
    log, held = np.log(loss).reshape(studies, 2, cells), kept.reshape(studies, 2, cells)
    # A cell counts where both of its runs were kept; sums over cells are weighted by `pair`, 0 or 1.
    pair = (held[:, 0] & held[:, 1]).astype(np.float64)
    gap = (log[:, 0] - log[:, 1]) * pair
    count = pair.sum(axis=1, keepdims=True)
    x = np.log(flops * pflops_days(1.0))[None]
    with np.errstate(all="ignore"):
        centre = (pair * x).sum(axis=1, keepdims=True) / count
        u = (x - centre) * pair
        spread = (u * u).sum(axis=1, keepdims=True)
        level_ = gap.sum(axis=1, keepdims=True) / count
        slope = (u * gap).sum(axis=1, keepdims=True) / spread
        left = (gap - level_ - slope * u) * pair
        residual = np.sqrt((left**2).sum(axis=1, keepdims=True) / (count - 2))
        log_scale, power, floor = frontiers(fitted, theta, 1)
        challenger = (log_scale[:, None] - np.log(at - floor[:, None])) / power[:, None]
        half = residual * np.sqrt(1.0 / count + (challenger - centre) ** 2 / spread)
        half = half * t_quantile(np.maximum(count - 2, 1e-9))
        log_scale, power, floor = frontiers(fitted, theta, 0)
        ends = [
            challenger - (log_scale[:, None] - np.log(at * np.exp(sign * half) - floor[:, None])) / power[:, None]
            for sign in (-1.0, 1.0)
        ]
    bad = count < 3
    found = [np.where(bad, np.nan, end) for end in (ratio_of(fitted, theta, at), *ends)]
    return Intervals(found[0], np.minimum(found[1], found[2]), np.maximum(found[1], found[2]))
