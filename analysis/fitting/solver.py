"""The minimiser of every fit: damped Newton with exact derivatives, many starts or resamples side by side.

A law is a sum of terms whose logarithms are affine in the parameters,

    P = sum_k exp(u_k),    u_k = sum_j [term_j = k] z_j theta_j,    shares p_k = exp(u_k) / P,

so with ``J_j = p_k(j) z_j`` (k(j) is the term of parameter j) the derivatives are closed forms:

    d ln P / d theta_j = J_j
    d2 ln P / d theta_i d theta_j = [k(i) = k(j)] p_k(j) z_i z_j - J_i J_j

One solver serves least squares and Huber, log loss and raw loss, one arm and families of arms, the point fit and
thousands of resamples (as weights, not as copied rows).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array

Space = Literal["log", "loss"]

PROBLEMS_PER_CHUNK = 128
"""Problems solved side by side: the working arrays of 240 points then stay in the second-level cache."""

ROWS_PER_CHUNK = 2_000_000
"""Rows of all problems solved side by side at most: bounds the memory of large tables."""

MIN_FLOOR_SHARE = 1e-9
"""The smallest constant term that the search reaches, as a share of the smallest loss."""

MAX_LOG_PREDICTION = 600.0
"""Bound of a term's logarithm, inside the range of exp for floats."""

MAX_STEP = 3.0
"""Largest change of a parameter in one step, in log constants and exponents."""

MAX_DAMPING_TRIALS = 12
"""Increases of the damping within one iteration before a problem is given up as converged to rounding."""


class Problem(NamedTuple):
    """Rows of a table and a law with prediction ``sum_k exp(sum_j [term_j == k] z_j * theta_j)``."""

    z: Array
    """Affine coefficients, shape ``(rows, parameters)``: 1 for constants, minus the centred log for exponents."""
    term: NDArray[np.intp]
    """The term that each parameter belongs to, shape ``(parameters,)``."""
    loss: Array
    """Observed loss in nats per token, shape ``(rows,)``."""
    space: Space = "log"
    delta: float | None = None
    """Residual at which Huber's function turns from quadratic to linear; None is least squares."""

    @property
    def terms(self) -> int:
        """Number of terms."""
        return int(self.term.max()) + 1


class Solution(NamedTuple):
    """Minima, one for each start."""

    theta: Array
    """Shape ``(starts, parameters)``."""
    objective: Array
    """Sum over rows, shape ``(starts,)``."""
    gradient: Array
    """Largest component of the gradient in centred parameters, relative to the objective."""
    gap: Array
    """Newton decrement: predicted decrease of the objective, relative to it (or to rounding, where it is 0)."""
    iterations: int


def predict(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Log prediction and shares of the terms.

    ``ln P = m + ln sum_k exp(u_k - m)`` with m the largest ``u_k``, so that no exponential overflows. For `theta` of shape
    ``(starts, parameters)`` the shapes are ``(starts, rows)`` and ``(starts, terms, rows)``.
    """
    # Holds u_k first, then exp(u_k - m), then the shares: one array for speed.
    shares = np.empty((len(theta), problem.terms, len(problem.loss)))
    for k in range(problem.terms):
        own = np.flatnonzero(problem.term == k)
        np.matmul(theta[:, own], problem.z[:, own].T, out=shares[:, k])
    top = shares.max(axis=1) if problem.terms > 1 else shares[:, 0].copy()
    np.clip(top, -MAX_LOG_PREDICTION, MAX_LOG_PREDICTION, out=top)
    # Terms far above a clipped top are bounded too, so that a wild start gives a huge loss and no infinity.
    shares -= top[:, None]
    np.minimum(shares, 80.0, out=shares)
    np.exp(shares, out=shares)
    # ln P = m + ln(sum), shares = exp(u - m) / sum.
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
    """Weighted sum over rows of ``r^2 / 2``, or of Huber's function ``min(|r|, d) * (|r| - min(|r|, d) / 2)``."""
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
    """Gradient, Hessian, and a positive diagonal that scales the damping.

    With the loss function rho of residuals r and weights w, in log space (r = ln P - ln L)

        gradient_j = sum_rows w rho'(r) J_j
        hessian_ij = sum_rows (w rho''(r) - w rho'(r)) J_i J_j + [k(i) = k(j)] w rho'(r) p_k z_i z_j

    and in loss space (r = P - L), where ``d2 P / d theta_i d theta_j = [k(i) = k(j)] P p_k z_i z_j``,

        gradient_j = sum_rows w rho'(r) P J_j
        hessian_ij = sum_rows w rho''(r) P^2 J_i J_j + [k(i) = k(j)] w rho'(r) P p_k z_i z_j

    Prediction and shares are those of `predict`; residuals r and weights w have the shape ``(starts, rows)``. The results
    have the shapes ``(starts, parameters)``, ``(starts, parameters, parameters)`` and ``(starts, parameters)``.
    """
    jacobian = shares[:, problem.term]  # J, (starts, parameters, rows)
    jacobian *= problem.z.T
    # first = w rho', curve = w rho'', pull = w rho' / r: the weight of the row in iteratively reweighted least squares.
    if problem.delta is None:
        first, curve, pull = w * r, w, w
    else:
        size = np.abs(r)
        first = w * np.clip(r, -problem.delta, problem.delta)
        curve = w * (size <= problem.delta)
        pull = w * (problem.delta / np.maximum(size, problem.delta))
    if problem.space == "loss":
        height = np.exp(log_prediction)  # P
        first = first * height
        outer, pull = curve * height**2, pull * height**2
    else:
        outer = curve - first
    gradient = np.matmul(jacobian, first[:, :, None])[:, :, 0]
    across = jacobian.transpose(0, 2, 1)
    # The Hessian can be indefinite far from a minimum; the diagonal of the reweighted J J' never is.
    scale = np.matmul(jacobian**2, pull[:, :, None])[:, :, 0]
    hessian = np.matmul(jacobian * outer[:, None], across)
    # jacobian @ z holds sum_rows first p_k(i) z_i z_j for all pairs; those of one term count.
    jacobian *= first[:, None]
    hessian += (problem.term[:, None] == problem.term) * np.matmul(jacobian, problem.z)
    return gradient, hessian, scale


def _solve_chunk(
    problem: Problem, theta: Array, weights: Array, free: NDArray[np.intp], limit: int, tolerance: float
) -> Solution:
    """Levenberg-Marquardt: ``(H + damping * diag(scale)) step = -gradient``, the damping adapted for each problem.

    A step is accepted if it does not raise the objective; then the damping falls tenfold, else it rises tenfold and the
    same Hessian is solved again. A problem is done when a step with little damping promises less than `tolerance`.
    The arguments are those of `minimise`, with `free` as positions.
    """
    theta = theta.copy()
    count, size = len(theta), len(free)
    weights = np.broadcast_to(weights, (count, len(problem.loss)))
    # Parameters of terms without columns: a floor that the data do not need would run to minus infinity.
    lowest = np.log(problem.loss.min() * MIN_FLOOR_SHARE)
    floors = np.array([not np.any(problem.z[:, problem.term == k] < 0.0) for k in problem.term])
    # Number of rows of each problem, which sets the size of rounding in its sums.
    heavy = np.maximum(weights.sum(axis=1), 1.0)
    # Prediction, shares and residuals of the accepted points; an accepted trial hands over its own, so that none is
    # computed twice.
    log_prediction, shares = predict(problem, theta)
    r = residuals(problem, log_prediction)
    value = _value(problem, r, weights)
    # Each problem has its own damping, and leaves `active` when it is done.
    damping = np.full(count, 1e-4)
    gradient_size, gap = np.full(count, np.inf), np.full(count, np.inf)
    active = np.arange(count)
    diagonal = np.arange(size)
    iteration = 0
    while len(active) and iteration < limit:
        iteration += 1
        # Indexing by a slice makes no copy while all problems are active.
        every = slice(None) if len(active) == count else active
        gradient, hessian, scale = _derivatives(problem, log_prediction[every], shares[every], r[every], weights[every])
        gradient, scale = gradient[:, free], scale[:, free]
        hessian = hessian[:, free[:, None], free]
        # A parameter without effect has scale 0, which damping could not bound.
        scale = np.maximum(scale, 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300)
        # The scale-free gradient: by Cauchy-Schwarz |J'r| <= |J| |r|, and |r| is the root of the objective.
        base = np.maximum(value[active], 1e-300)
        gradient_size[active] = np.abs(gradient).max(axis=1) / np.sqrt(base * heavy[active])
        # Problems whose step was not accepted yet; the others keep their new point for the next iteration.
        pending = np.arange(len(active))
        done = np.zeros(len(active), dtype=bool)
        for _ in range(MAX_DAMPING_TRIALS):
            which = active[pending]
            matrix = hessian[pending]
            matrix[:, diagonal, diagonal] += damping[which, None] * scale[pending]
            # Scaled to unit diagonal, the solve stays exact when floor and exponents differ by decades.
            unit = 1.0 / np.sqrt(scale[pending])
            step = -unit * _solve(matrix * unit[:, :, None] * unit[:, None], gradient[pending] * unit)
            # Longer steps leave the region in which the quadratic model holds.
            step *= np.minimum(1.0, MAX_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
            # The decrease of the quadratic model at its minimum is minus half of gradient times step.
            promised = np.abs(0.5 * np.einsum("bp,bp->b", step, gradient[pending]))
            trial = theta[which]
            trial[:, free] += step
            trial[:, floors] = np.maximum(trial[:, floors], lowest)
            here, parts = predict(problem, trial)
            left = residuals(problem, here)
            new = _value(problem, left, weights[which])
            # Equal counts as accepted: at the minimum rounding alone decides.
            ok = (new <= value[which]) & np.isfinite(new)
            small = promised <= tolerance * base[pending] + 1e-24 * heavy[which]
            # Relative to the objective, or to rounding of its sum where the fit is exact.
            gap[which] = promised / np.maximum(base[pending], 1e-18 * heavy[which])
            # A heavily damped step is small by itself, which says nothing about the distance from the minimum.
            done[pending] = small & (damping[which] <= 1e-2)
            taken = which[ok]
            theta[taken], value[taken] = trial[ok], new[ok]
            log_prediction[taken], shares[taken], r[taken] = here[ok], parts[ok], left[ok]
            damping[taken] = np.maximum(damping[taken] * 0.1, 1e-12)
            # A rejected step raises the damping to at least 1e-5, so that a few trials are enough.
            damping[which[~ok]] = np.clip(damping[which[~ok]], 1e-6, 1e11) * 10.0
            pending = pending[~ok & ~done[pending]]
            if not len(pending):
                break
        else:
            done[pending] = True  # no step lowers the objective: rounding
        active = active[~done]
    return Solution(theta, value, gradient_size, gap, iteration)


def _solve(matrix: Array, right: Array) -> Array:
    """Solutions of small systems, shapes ``(starts, p, p)`` and ``(starts, p)``; least squares where one is singular."""
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
    # The same first derivatives as in `_derivatives`, kept apart by group instead of summed over all rows.
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
    cost of one pass over the rows for all resamples together. (The resample's own curvature would be noisier: under
    Huber only the rows within the threshold have any.) `counts` is how often each group ``0 .. groups - 1`` is drawn, shape
    ``(resamples, groups)``.
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
        weights: Shape ``(rows,)`` or ``(starts, rows)``; the count of each row.
        free: Parameters that may move; the others keep the values of the start. All when not given.
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
    chunk = max(1, min(PROBLEMS_PER_CHUNK, ROWS_PER_CHUNK // len(problem.loss)))
    # Chunks are independent: problems share the rows and differ in start and weights.
    parts = [
        _solve_chunk(problem, theta[at : at + chunk], w[at : at + chunk].astype(float), moving, limit, tolerance)
        for at in range(0, count, chunk)
    ]
    joined = [np.concatenate([part[field] for part in parts]) for field in range(4)]
    return Solution(joined[0], joined[1], joined[2], joined[3], max(part.iterations for part in parts))
