"""The minimiser behind every fit: damped Newton with exact derivatives, many starts or resamples at once.

A law is a sum of terms whose logarithms are affine in the parameters, so its derivatives are known in closed form:
with ``p_k`` the share of term `k` in the prediction, the gradient of ``ln L`` is ``p_k * z`` and its second
derivative needs no more than that. One solver then serves least squares and Huber, log loss and raw loss, one arm
and families of arms, the point fit and four thousand resamples (as weights, never as copied rows).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array

Space = Literal["log", "loss"]

CHUNK = 128
"""Problems solved side by side: the working arrays of 240 points then stay in the second-level cache."""

CHUNK_ROWS = 2_000_000
"""Rows of all problems solved side by side at most: bounds the memory of large tables."""

FLOOR_SHARE = 1e-9
"""The smallest constant term, as a share of the smallest loss, that the search goes down to."""


class Problem(NamedTuple):
    """Rows of a table against a law: prediction ``sum_k exp(sum_j [term_j == k] z_j * theta_j)``."""

    z: Array
    """Affine coefficients, shape ``(rows, parameters)``: 1 for constants, minus the centred log for exponents."""
    term: NDArray[np.intp]
    """The term that each parameter belongs to, shape ``(parameters,)``."""
    loss: Array
    """Observed, nats per token, shape ``(rows,)``."""
    space: Space = "log"
    delta: float | None = None
    """Where Huber's quadratic turns linear, in units of the residual; None is least squares."""

    @property
    def terms(self) -> int:
        """Number of terms."""
        return int(self.term.max()) + 1


class Solution(NamedTuple):
    """Minima found, one a row of the starts."""

    theta: Array
    """Shape ``(starts, parameters)``."""
    objective: Array
    """Sum over rows, shape ``(starts,)``."""
    gradient: Array
    """Largest component of the gradient in centred parameters, relative to the objective."""
    gap: Array
    """Newton decrement: how much lower the objective could still be, relative to it (or to rounding, where it is 0)."""
    iterations: int


def predict(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Log prediction, shape ``(starts, rows)``, and the shares of the terms, shape ``(starts, terms, rows)``."""
    shares = np.empty((len(theta), problem.terms, len(problem.loss)))
    for k in range(problem.terms):
        own = np.flatnonzero(problem.term == k)
        np.matmul(theta[:, own], problem.z[:, own].T, out=shares[:, k])
    top = shares.max(axis=1) if problem.terms > 1 else shares[:, 0].copy()
    np.clip(top, -600.0, 600.0, out=top)
    shares -= top[:, None]
    np.minimum(shares, 80.0, out=shares)
    np.exp(shares, out=shares)
    total = shares.sum(axis=1)
    shares /= total[:, None]
    np.log(total, out=total)
    total += top
    return total, shares


def residuals(problem: Problem, log_prediction: Array) -> Array:
    """Prediction minus observation in the problem's space."""
    if problem.space == "log":
        return log_prediction - np.log(problem.loss)
    return np.exp(log_prediction) - problem.loss


def _value(problem: Problem, r: Array, weights: Array) -> Array:
    if problem.delta is None:
        rho = 0.5 * r * r
    else:
        size = np.abs(r)
        bent = np.minimum(size, problem.delta)
        rho = bent * (size - 0.5 * bent)
    return np.asarray(np.einsum("bn,bn->b", rho, np.broadcast_to(weights, rho.shape)))


def objective(problem: Problem, theta: Array, weights: Array | None = None) -> Array:
    """Sum over rows of the loss function of the residuals, shape ``(starts,)``."""
    w = np.ones((1, len(problem.loss))) if weights is None else weights
    return _value(problem, residuals(problem, predict(problem, theta)[0]), w)


def _derivatives(problem: Problem, log_prediction: Array, shares: Array, r: Array, w: Array) -> tuple[Array, ...]:
    """Gradient, Hessian, and the always positive curvature that damping is measured in."""
    jacobian = shares[:, problem.term]
    jacobian *= problem.z.T
    if problem.delta is None:
        first, curve, pull = w * r, w, w
    else:
        size = np.abs(r)
        first = w * np.clip(r, -problem.delta, problem.delta)
        curve = w * (size <= problem.delta)
        pull = w * (problem.delta / np.maximum(size, problem.delta))
    if problem.space == "loss":
        height = np.exp(log_prediction)
        first = first * height
        outer, pull = curve * height**2, pull * height**2
    else:
        outer = curve - first
    gradient = np.matmul(jacobian, first[:, :, None])[:, :, 0]
    across = jacobian.transpose(0, 2, 1)
    scale = np.matmul(jacobian**2, pull[:, :, None])[:, :, 0]
    hessian = np.matmul(jacobian * outer[:, None], across)
    jacobian *= first[:, None]
    hessian += (problem.term[:, None] == problem.term) * np.matmul(jacobian, problem.z)
    return gradient, hessian, scale


def _solve_chunk(
    problem: Problem, theta: Array, weights: Array, free: NDArray[np.intp], limit: int, tolerance: float
) -> Solution:
    theta = theta.copy()
    count, size = len(theta), len(free)
    weights = np.broadcast_to(weights, (count, len(problem.loss)))
    lowest = np.log(problem.loss.min() * FLOOR_SHARE)
    floors = np.array([not np.any(problem.z[:, problem.term == k] < 0.0) for k in problem.term])
    heavy = np.maximum(weights.sum(axis=1), 1.0)
    # Prediction and shares belong to the accepted point; a trial that is accepted brings its own, so that none is
    # worked out twice.
    log_prediction, shares = predict(problem, theta)
    r = residuals(problem, log_prediction)
    value = _value(problem, r, weights)
    damping = np.full(count, 1e-4)
    gradient_size, gap = np.full(count, np.inf), np.full(count, np.inf)
    active = np.arange(count)
    diagonal = np.arange(size)
    iteration = 0
    while len(active) and iteration < limit:
        iteration += 1
        every = slice(None) if len(active) == count else active
        gradient, hessian, scale = _derivatives(problem, log_prediction[every], shares[every], r[every], weights[every])
        gradient, scale = gradient[:, free], scale[:, free]
        hessian = hessian[:, free[:, None], free]
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        base = np.maximum(value[active], 1e-300)
        gradient_size[active] = np.abs(gradient).max(axis=1) / np.sqrt(base * heavy[active])
        pending = np.arange(len(active))
        done = np.zeros(len(active), dtype=bool)
        for _ in range(12):
            which = active[pending]
            matrix = hessian[pending]
            matrix[:, diagonal, diagonal] += damping[which, None] * scale[pending]
            # Shrinking to unit diagonal keeps the small solve exact when floor and exponents differ by decades.
            unit = 1.0 / np.sqrt(scale[pending])
            step = -unit * _solve(matrix * unit[:, :, None] * unit[:, None], gradient[pending] * unit)
            step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
            promised = np.abs(0.5 * np.einsum("bp,bp->b", step, gradient[pending]))
            trial = theta[which]
            trial[:, free] += step
            trial[:, floors] = np.maximum(trial[:, floors], lowest)
            here, parts = predict(problem, trial)
            left = residuals(problem, here)
            new = _value(problem, left, weights[which])
            ok = (new <= value[which]) & np.isfinite(new)
            small = promised <= tolerance * base[pending] + 1e-24 * heavy[which]
            gap[which] = promised / np.maximum(base[pending], 1e-18 * heavy[which])
            done[pending] = small & (damping[which] <= 1e-2)
            taken = which[ok]
            theta[taken], value[taken] = trial[ok], new[ok]
            log_prediction[taken], shares[taken], r[taken] = here[ok], parts[ok], left[ok]
            damping[taken] = np.maximum(damping[taken] * 0.1, 1e-12)
            damping[which[~ok]] = np.clip(damping[which[~ok]], 1e-6, 1e11) * 10.0
            pending = pending[~ok & ~done[pending]]
            if not len(pending):
                break
        else:
            done[pending] = True
        active = active[~done]
    return Solution(theta, value, gradient_size, gap, iteration)


def _solve(matrix: Array, right: Array) -> Array:
    try:
        return np.asarray(np.linalg.solve(matrix, right[:, :, None])[:, :, 0])
    except np.linalg.LinAlgError:
        return np.asarray(np.einsum("bij,bj->bi", np.linalg.pinv(matrix), right))


def group_slopes(problem: Problem, theta: Array, groups: NDArray[np.intp]) -> tuple[Array, Array]:
    """The gradient of each group of rows, shape ``(groups, parameters)``, and the Hessian of all rows."""
    log_prediction, shares = predict(problem, theta[None])
    r = residuals(problem, log_prediction)
    ones = np.ones((1, len(problem.loss)))
    curvature = _derivatives(problem, log_prediction, shares, r, ones)[1][0]
    pull = r[0] if problem.delta is None else np.clip(r[0], -problem.delta, problem.delta)
    if problem.space == "loss":
        pull = pull * np.exp(log_prediction[0])
    slopes = [
        np.bincount(groups, weights=pull * shares[0, term] * problem.z[:, j]) for j, term in enumerate(problem.term)
    ]
    return np.stack(slopes, axis=1), curvature


def group_steps(problem: Problem, theta: Array, groups: NDArray[np.intp], counts: Array) -> Array:
    """Parameters after one step from `theta` under each resample of whole groups of rows.

    The step takes each resample's gradient and the curvature of all rows: what a refit gives to first order, at the
    price of one pass over the rows for all resamples together. (The resample's own curvature would be noisier: under
    Huber only the rows within the threshold have any.)

    Args:
        problem: Rows, law and loss function.
        theta: The minimum of all rows.
        groups: Number of the group of each row, ``0 .. groups - 1``.
        counts: How often each group is drawn, shape ``(resamples, groups)``.
    """
    slopes, curvature = group_slopes(problem, theta, groups)
    return theta - newton_steps(curvature, counts @ slopes)


def newton_steps(curvature: Array, slopes: Array) -> Array:
    """Newton steps under one Hessian, a row for each row of gradients."""
    return _solve(np.broadcast_to(curvature, (len(slopes), *curvature.shape)), slopes)


def minimise(
    problem: Problem,
    start: Array,
    weights: Array | None = None,
    *,
    free: NDArray[np.bool_] | None = None,
    limit: int = 200,
    tolerance: float = 1e-13,
) -> Solution:
    """Local minima of the objective, from each start or under each row of weights.

    Args:
        problem: Rows, law and loss function.
        start: Shape ``(parameters,)`` or ``(starts, parameters)``.
        weights: Shape ``(rows,)`` or ``(starts, rows)``; how often each row counts.
        free: Parameters that may move; the others stay where the start has them. All when not given.
        limit: Newton steps at most.
        tolerance: Stop when the next step promises less than this share of the objective.

    Returns:
        One row for each start, or for each row of weights.
    """
    theta = np.atleast_2d(np.asarray(start, dtype=np.float64))
    w = np.ones((1, len(problem.loss))) if weights is None else np.atleast_2d(weights)
    count = max(len(theta), len(w))
    theta = np.broadcast_to(theta, (count, theta.shape[1]))
    w = np.broadcast_to(w, (count, w.shape[1]))
    moving = np.flatnonzero(np.ones(theta.shape[1], dtype=bool) if free is None else free)
    chunk = max(1, min(CHUNK, CHUNK_ROWS // len(problem.loss)))
    parts = [
        _solve_chunk(problem, theta[at : at + chunk], w[at : at + chunk].astype(float), moving, limit, tolerance)
        for at in range(0, count, chunk)
    ]
    joined = [np.concatenate([part[field] for part in parts]) for field in range(4)]
    return Solution(joined[0], joined[1], joined[2], joined[3], max(part.iterations for part in parts))
