"""The analysis of one ladder for many synthetic studies at once: the same minima and intervals, batched.

`analysis.fitting.families.fit_family` and `analysis.uncertainty.intervals.t_interval` take a study at a time, with starts of their own, which
a thousand studies of thirty designs do not allow. Here every study starts from the minimum of the noise-free
runs, and Gauss-Newton steps are taken for all studies side by side. tests/sweeps/test_design.py holds the two together.

Rows are laid out by arm, then by cell: row ``arm * cells + cell``. A run that was lost has weight zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array
from analysis.fitting.families import frontiers
from analysis.fitting.fit import Minimum
from analysis.fitting.solver import FLOOR_SHARE, predict
from analysis.uncertainty.intervals import t_quantile
from scaling.units import pflops_days

Flags = NDArray[np.bool_]

STEPS = 80
"""Gauss-Newton steps at most; a dozen suffice where residuals are a few percent."""


class Intervals(NamedTuple):
    """Log match ratios with their intervals; NaN where a study has no answer. Shape ``(studies, losses)``."""

    ratio: Array
    low: Array
    high: Array

    @property
    def width(self) -> Array:
        """Of the interval of the ratio itself."""
        return np.exp(self.high) - np.exp(self.low)


def fit_studies(fitted: Minimum, loss: Array, kept: Flags) -> Array:
    """Parameters of least squares in loss space, shape ``(studies, parameters)``.

    Args:
        fitted: The family at the noise-free runs: layout and start.
        loss: Of every study and row, shape ``(studies, rows)``.
        kept: Which runs a study has, same shape.
    """
    z, term = fitted.problem.z, fitted.problem.term
    floors = np.array([not np.any(z[:, term == k] < 0.0) for k in term])
    lowest = np.log(loss.min() * FLOOR_SHARE)
    theta = np.repeat(fitted.theta[None], len(loss), axis=0)
    damping = np.full(len(loss), 1e-6)

    def residual(at: Array, which: NDArray[np.intp]) -> tuple[Array, Array, Array]:
        log_prediction, shares = predict(fitted.problem, at)
        height = np.exp(log_prediction)
        jacobian = (height[:, None] * shares[:, term]) * z.T
        left = (height - loss[which]) * kept[which]
        return left, jacobian * kept[which][:, None], np.sum(left**2, axis=1)

    active = np.arange(len(loss))
    left, jacobian, value = residual(theta, active)
    for _ in range(STEPS):
        hessian = np.matmul(jacobian, jacobian.transpose(0, 2, 1))
        gradient = np.matmul(jacobian, left[:, :, None])[:, :, 0]
        scale = np.einsum("bpp->bp", hessian) + 1e-300
        unit = 1.0 / np.sqrt(scale)
        matrix = hessian * unit[:, :, None] * unit[:, None]
        matrix[:, range(len(term)), range(len(term))] += damping[active, None]
        step = -unit * np.linalg.solve(matrix, (gradient * unit)[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        promised = np.abs(np.einsum("bp,bp->b", step, gradient))
        trial = theta[active] + step
        trial[:, floors] = np.maximum(trial[:, floors], lowest)
        new_left, new_jacobian, new_value = residual(trial, active)
        better = new_value <= value
        theta[active[better]] = trial[better]
        damping[active] = np.where(better, np.maximum(damping[active] * 0.1, 1e-12), damping[active] * 10.0)
        left[better], jacobian[better], value[better] = new_left[better], new_jacobian[better], new_value[better]
        going = (promised > 1e-14 * value + 1e-24) & (damping[active] < 1e8)
        if not going.any():
            break
        active, left, jacobian, value = active[going], left[going], jacobian[going], value[going]
    return theta


def law_intervals(
    fitted: Minimum, theta: Array, loss: Array, kept: Flags, at: Array, *, level: float = 0.95
) -> Intervals:
    """The t interval of `analysis.uncertainty.intervals.t_interval` in every study: laws' exponents included, paired within cells.

    Args:
        fitted: The family's layout.
        theta: As `fit_studies` gives it.
        loss: Shape ``(studies, rows)``.
        kept: Same shape.
        at: Losses at which the ratio is wanted.
        level: Of the interval.
    """
    studies, rows = loss.shape
    cells = rows // 2
    z, term = fitted.problem.z, fitted.problem.term
    log_prediction, shares = predict(fitted.problem, theta)
    jacobian = shares[:, term] * z.T * kept[:, None]
    weight = np.exp(2.0 * log_prediction)
    weighted = jacobian * weight[:, None]
    bread = np.linalg.pinv(np.matmul(weighted, jacobian.transpose(0, 2, 1)), hermitian=True)
    response = np.matmul(bread, weighted)
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
    slope = _slopes(fitted, theta, at)
    pull = np.matmul(slope, response).reshape(studies, len(at), 2, cells)
    lean = np.einsum("skic,skjc->skij", pull, pull)
    product = np.matmul(lean, noise[:, None])
    variance = np.trace(product, axis1=2, axis2=3).clip(0.0)
    squares = np.trace(product @ product, axis1=2, axis2=3)
    freedom = by_arm.min(axis=1)
    error, degrees = np.sqrt(variance), freedom[:, None] * _gain(variance, squares, freedom[:, None])
    with np.errstate(invalid="ignore"):
        half = t_quantile(np.maximum(degrees, 1e-9), level) * error
    half = np.where(freedom[:, None] < 0.999, np.nan, half)
    centre = log_ratios(fitted, theta, at)
    centre = np.where(_usable(held)[:, None], centre, np.nan)
    return Intervals(centre, centre - half, centre + half)


def _gain(variance: Array, squares: Array, nu: Array) -> Array:
    """Satterthwaite's gain in degrees of freedom, as `analysis.uncertainty.intervals.Linear.spread` has it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = nu / ((nu + 2.0) * (nu - 1.0))
        first = np.where(nu > 1.0, (variance**2 * (nu + 1.0) - 2.0 * squares) * scale, variance**2)
        second = np.where(nu > 1.0, (squares * nu - variance**2) * scale, squares)
        gain = np.where(second > 0, first / second, np.where(nu > 1.0, 2.0, 1.0))
    return np.clip(gain, 1.0, 2.0)


def _usable(held: Flags) -> Flags:
    """Whether each arm of a study still has three runs; fewer are no law with an error."""
    return np.asarray((held.sum(axis=2) >= 3).all(axis=1))


def log_ratios(fitted: Minimum, theta: Array, at: Array) -> Array:
    """Log match ratio of every study at each loss, shape ``(studies, losses)``; NaN where a law never gets there."""
    logs = []
    for arm in (1, 0):
        log_scale, power, floor = frontiers(fitted, theta, arm)
        above = at - floor[:, None]
        with np.errstate(all="ignore"):
            logs.append((log_scale[:, None] - np.log(np.where(above > 0.0, above, np.nan))) / power[:, None])
    return np.asarray(logs[0] - logs[1])


def _slopes(fitted: Minimum, theta: Array, at: Array) -> Array:
    columns = []
    for j in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[:, j] = 1e-5 * np.maximum(1.0, np.abs(theta[:, j]))
        upper, lower = log_ratios(fitted, theta + step, at), log_ratios(fitted, theta - step, at)
        columns.append((upper - lower) / (2 * step[:, j, None]))
    return np.stack(columns, axis=2)


def difference_intervals(
    fitted: Minimum, theta: Array, loss: Array, kept: Flags, flops: Array, at: Array, *, level: float = 0.95
) -> Intervals:
    """The interval of the paired difference line (`analysis.uncertainty.paired`): the baseline's exponent taken as fitted.

    Args:
        fitted: The family's layout.
        theta: As `fit_studies` gives it.
        loss: Shape ``(studies, rows)``.
        kept: Same shape.
        flops: Of the cells, shape ``(cells,)``.
        at: Losses at which the ratio is wanted.
        level: Of the interval.
    """
    studies, rows = loss.shape
    cells = rows // 2
    log, held = np.log(loss).reshape(studies, 2, cells), kept.reshape(studies, 2, cells)
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
        half = half * t_quantile(np.maximum(count - 2, 1e-9), level)
        log_scale, power, floor = frontiers(fitted, theta, 0)
        ends = [
            challenger - (log_scale[:, None] - np.log(at * np.exp(sign * half) - floor[:, None])) / power[:, None]
            for sign in (-1.0, 1.0)
        ]
    bad = count < 3
    found = [np.where(bad, np.nan, end) for end in (log_ratios(fitted, theta, at), *ends)]
    return Intervals(found[0], np.minimum(found[1], found[2]), np.maximum(found[1], found[2]))
