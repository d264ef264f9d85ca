"""Brackets: the optimum of each hyper-parameter, its interval, and its position in the search range.

A robust fit of ``loss = c + sum over j of (b_j x_j + a_j x_j**2)`` with x_j the position of hyper-parameter j on its
scale, from -1/2 to 1/2 over its range. There are no cross terms, because a study has too few trials for them. Only the
better trials are fitted, because the loss is not a parabola where training is close to diverging.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sweeps.config.search_space import Dimension, Values
from sweeps.config.tuning_results import Bracket, Verdict

EDGE_SHARE = 0.08
"""Share of the range at either end within which an optimum is on the edge."""

DRAWS = 400
"""Draws of the coefficients behind each interval."""

HUBER_THRESHOLD = 1.5
"""Residuals above this, in robust standard deviations, get less weight."""

FITTED_SHARE = 0.8
"""Share of the trials that the parabola is fitted to, the better ones, where they are enough."""

MIN_BOWL_SHARE = 0.9
"""Share of the draws that must have a minimum in a direction before its optimum counts as resolved."""

Array = npt.NDArray[np.float64]


def brackets(
    trials: Sequence[tuple[Values, float]], dimensions: Sequence[Dimension], *, seed: int = 0
) -> tuple[Bracket, ...]:
    """The bracket of each dimension, in the same order; empty without trials.

    `trials` are the values and losses of finished trials, without diverged ones; `seed` is that of the draws behind the
    intervals.
    """
    if not trials:
        return ()
    positions = np.array([[d.search.position(values[d.name]) for d in dimensions] for values, _ in trials])
    losses = np.array([loss for _, loss in trials])
    best = int(np.argmin(losses))
    spans = np.array([d.span for d in dimensions])
    fitted = _vertices(positions, losses, spans, np.random.default_rng(seed))
    found: list[Bracket] = []
    for dimension, (low, high), here in zip(dimensions, spans, positions.T, strict=True):
        interval: tuple[float | None, float | None] = (None, None)
        curvature, optimum = 0.0, here[best]
        verdict: Verdict = "too few"
        if fitted is not None:
            vertices, curvatures = (table[:, len(found)] for table in fitted)
            curvature = float(curvatures[0])
            verdict, optimum, interval = _judge(vertices, curvatures, here, best, low, high)
        edge = _edge(optimum, low, high) or _edge(here[best], low, high)
        if edge and verdict in ("bracketed", "too few"):
            # A best trial on the edge decides even where the parabola has its minimum inside: the range may be too narrow.
            verdict = edge
        value = dimension.search.value
        # The conversion to a scale and back changes the last digits.
        ends = [float(f"{value(float(end)):.10g}") for end in (low, high, here.min(), here.max())]
        found.append(
            Bracket(
                name=dimension.name,
                verdict=verdict,
                best=trials[best][0][dimension.name],
                optimum=value(float(optimum)),
                low=None if interval[0] is None else value(interval[0]),
                high=None if interval[1] is None else value(interval[1]),
                range_low=ends[0],
                range_high=ends[1],
                searched_low=ends[2],
                searched_high=ends[3],
                curvature=curvature,
            )
        )
    return tuple(found)


def _edge(position: float, low: float, high: float) -> Verdict | None:
    margin = EDGE_SHARE * (high - low)
    if position <= low + margin:
        return "low edge"
    return "high edge" if position >= high - margin else None


def _judge(
    vertices: Array, curvatures: Array, here: Array, best: int, low: float, high: float
) -> tuple[Verdict, float, tuple[float | None, float | None]]:
    """Verdict, position of the optimum and its interval, from the fit (first row) and its draws."""
    bowls = curvatures[1:] > 0
    if curvatures[0] <= 0 or bowls.mean() < MIN_BOWL_SHARE:
        # No minimum in this direction: the loss falls towards an edge, or does not depend on the value.
        return _edge(here[best], low, high) or "flat", here[best], (None, None)
    vertex = float(np.clip(vertices[0], low, high))
    # Draws with a small curvature have minima far away; one width beyond the range is far enough for a quantile.
    inside = np.clip(vertices[1:][bowls], low - (high - low), high + (high - low))
    lower, upper = (float(q) for q in np.quantile(inside, [0.025, 0.975]))
    return _edge(vertex, low, high) or "bracketed", vertex, (lower, upper)


def _vertices(positions: Array, losses: Array, spans: Array, rng: np.random.Generator) -> tuple[Array, Array] | None:
    """Minima and curvatures, shape ``(1 + DRAWS, dimensions)`` each: the fit, then draws from its covariance.

    None with too few trials. A direction has its minimum at ``-b / (2 a)`` and the second derivative ``2 a``. Positions
    have the shape ``(trials, dimensions)``, losses ``(trials,)``, and the ends of the ranges `spans` ``(dimensions, 2)``.
    """
    count, dimensions = positions.shape
    needed = 2 * dimensions + 1
    if count < needed + 1:
        return None
    kept = np.argsort(losses, kind="stable")[: max(needed + 2, round(FITTED_SHARE * count))]
    widths = np.maximum(spans[:, 1] - spans[:, 0], 1e-12)
    middles = spans.mean(axis=1)
    x = (positions[kept] - middles) / widths  # in [-1/2, 1/2]
    y = losses[kept] - losses[kept].min()
    design = np.concatenate([np.ones((len(x), 1)), x, x**2], axis=1)
    fit, weights = _huber(design, y)
    # Coefficients are drawn from the covariance s**2 (X' W X)^-1 with Student's tails, because a fit of few trials
    # underestimates its own residual variance.
    freedom = max(len(y) - needed, 1)
    variance = float(np.sum(weights * (y - design @ fit) ** 2)) / freedom / float(np.mean(weights))
    covariance = variance * np.linalg.pinv(design.T @ (design * weights[:, None]))
    student = np.sqrt(freedom / rng.chisquare(freedom, size=(DRAWS, 1)))
    draws = fit + student * rng.multivariate_normal(np.zeros(len(fit)), covariance, size=DRAWS, method="eigh")
    every = np.vstack([fit, draws])
    slope, curve = every[:, 1 : 1 + dimensions], every[:, 1 + dimensions :]
    safe = np.where(curve > 0, curve, np.nan)  # without a minimum: the middle of the range, which `_judge` leaves out
    # Back from shares of the range to positions on the scale: x by the width, a by its square.
    return np.nan_to_num(-slope / (2 * safe), nan=0.0) * widths + middles, 2 * curve / widths**2


def _huber(design: Array, y: Array, rounds: int = 30) -> tuple[Array, Array]:
    """Coefficients and weights of Huber's regression, by iteratively reweighted least squares."""
    weights: Array = np.ones(len(y))
    fit: Array = np.zeros(design.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weights)
        fit = np.asarray(np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0], dtype=np.float64)
        residuals = y - design @ fit
        # The median absolute residual of a normal distribution is 0.6745 standard deviations.
        scale = max(float(np.median(np.abs(residuals))) / 0.6745, 1e-12)
        weights = np.minimum(1.0, HUBER_THRESHOLD * scale / np.maximum(np.abs(residuals), 1e-300))
    return fit, weights
