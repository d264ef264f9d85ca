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

Array = NDArray[np.float64]
Space = Literal["log", "loss"]

CHUNK = 64
"""Problems solved side by side: the working arrays of 240 points then stay in the second-level cache."""

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
    """Newton decrement: how much lower the objective could still be, relative to it."""
    iterations: int


def predict(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Log prediction, shape ``(starts, rows)``, and the shares of the terms, shape ``(starts, terms, rows)``."""
    exponents = np.empty((len(theta), problem.terms, len(problem.loss)))
    for k in range(problem.terms):
        own = problem.term == k
        np.matmul(theta[:, own], problem.z[:, own].T, out=exponents[:, k])
    top = exponents.max(axis=1)
    np.clip(top, -600.0, 600.0, out=top)
    np.subtract(exponents, top[:, None], out=exponents)
    np.clip(exponents, -700.0, 700.0, out=exponents)
    np.exp(exponents, out=exponents)
    total = exponents.sum(axis=1)
    exponents /= total[:, None]
    return top + np.log(total), exponents


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
    jacobian = shares[:, problem.term] * problem.z.T
    if problem.delta is None:
        slope, curve, pull = r, np.ones_like(r), np.ones_like(r)
    else:
        slope = np.clip(r, -problem.delta, problem.delta)
        curve = (np.abs(r) <= problem.delta).astype(np.float64)
        pull = problem.delta / np.maximum(np.abs(r), problem.delta)
    if problem.space == "log":
        outer, inner, first = w * (curve - slope), w * slope, w * slope
        pull = w * pull
    else:
        height = np.exp(log_prediction)
        outer, inner = w * curve * height**2, w * slope * height
        first, pull = inner, w * pull * height**2
    gradient = np.matmul(jacobian, first[:, :, None])[:, :, 0]
    same = problem.term[:, None] == problem.term
    hessian = np.matmul(jacobian * outer[:, None], jacobian.transpose(0, 2, 1))
    hessian += same * np.matmul(jacobian * inner[:, None], problem.z)
    scale = np.matmul(jacobian**2, pull[:, :, None])[:, :, 0]
    return gradient, hessian, scale


def _solve_chunk(
    problem: Problem, theta: Array, weights: Array, free: NDArray[np.intp], limit: int, tolerance: float
) -> Solution:
    theta = theta.copy()
    count, size = len(theta), len(free)
    weights = np.broadcast_to(weights, (count, len(problem.loss)))
    lowest = np.log(problem.loss.min() * FLOOR_SHARE)
    floors = np.array([not np.any(problem.z[:, problem.term == k] < 0.0) for k in problem.term])
    value = objective(problem, theta, weights)
    damping = np.full(count, 1e-4)
    gradient_size, gap = np.full(count, np.inf), np.full(count, np.inf)
    active = np.arange(count)
    diagonal = np.arange(size)
    iteration = 0
    while len(active) and iteration < limit:
        iteration += 1
        w = weights[active]
        log_prediction, shares = predict(problem, theta[active])
        r = residuals(problem, log_prediction)
        gradient, hessian, scale = _derivatives(problem, log_prediction, shares, r, w)
        gradient, scale = gradient[:, free], scale[:, free]
        hessian = hessian[:, free[:, None], free]
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        base = np.maximum(value[active], 1e-300)
        gradient_size[active] = np.abs(gradient).max(axis=1) / np.sqrt(base * np.maximum(w.sum(axis=1), 1.0))
        pending = np.arange(len(active))
        done = np.zeros(len(active), dtype=bool)
        for _ in range(12):
            matrix = hessian[pending].copy()
            matrix[:, diagonal, diagonal] += damping[active[pending], None] * scale[pending]
            # Shrinking to unit diagonal keeps the small solve exact when floor and exponents differ by decades.
            unit = 1.0 / np.sqrt(scale[pending])
            step = -unit * _solve(matrix * unit[:, :, None] * unit[:, None], gradient[pending] * unit)
            step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
            promised = -0.5 * np.einsum("bp,bp->b", step, gradient[pending])
            trial = theta[active[pending]]
            trial[:, free] += step
            trial[:, floors] = np.maximum(trial[:, floors], lowest)
            new = objective(problem, trial, w[pending])
            which = active[pending]
            ok = (new <= value[which]) & np.isfinite(new)
            small = np.abs(promised) <= tolerance * base[pending] + 1e-24 * w[pending].sum(axis=1)
            gap[which] = np.abs(promised) / base[pending]
            taken = which[ok]
            done[pending] = small & (damping[which] <= 1e-2)
            theta[taken], value[taken] = trial[ok], new[ok]
            damping[taken] = np.maximum(damping[taken] * 0.1, 1e-12)
            damping[which[~ok]] = np.minimum(np.maximum(damping[which[~ok]], 1e-6) * 10.0, 1e12)
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
    parts = [
        _solve_chunk(problem, theta[at : at + CHUNK], w[at : at + CHUNK], moving, limit, tolerance)
        for at in range(0, count, CHUNK)
    ]
    joined = [np.concatenate([part[field] for part in parts]) for field in range(4)]
    return Solution(joined[0], joined[1], joined[2], joined[3], max(part.iterations for part in parts))
