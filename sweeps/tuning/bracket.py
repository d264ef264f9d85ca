"""Is the optimum inside what was tried? A robust parabola in each hyper-parameter's own scale, with an interval.

The parabola is additive over hyper-parameters (no cross terms: a study has too few trials for them) and is fitted to
the better part of the trials, because a bowl of losses is steep on the side where training diverges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sweeps.config.search_space import Dimension, Values
from sweeps.config.tuning_results import Bracket, Verdict

EDGE = 0.08
"""An optimum within this share of the range of its end is on the edge."""

DRAWS = 400
HUBER = 1.5
KEPT_SHARE = 0.8
"""Of the trials, the better ones that the parabola is fitted to, if they are enough."""

Array = npt.NDArray[np.float64]


def brackets(
    trials: Sequence[tuple[Values, float]], dimensions: Sequence[Dimension], *, seed: int = 0
) -> tuple[Bracket, ...]:
    """The verdict on each hyper-parameter.

    Args:
        trials: Values and losses of finished trials, diverged ones left out.
        dimensions: What was searched, with the ranges of the end.
        seed: Of the resampling behind the intervals.

    Returns:
        One bracket a dimension, in their order; empty without trials.
    """
    if not trials:
        return ()
    positions = np.array([[d.search.position(values[d.name]) for d in dimensions] for values, _ in trials])
    losses = np.array([loss for _, loss in trials])
    best = int(np.argmin(losses))
    spans = np.array([d.span for d in dimensions])
    fitted = _vertices(positions, losses, spans, np.random.default_rng(seed))
    found = []
    for number, dimension in enumerate(dimensions):
        low, high = spans[number]
        here = positions[:, number]
        interval: tuple[float | None, float | None] = (None, None)
        curvature, optimum = 0.0, here[best]
        verdict: Verdict = "too few"
        if fitted is not None:
            curvature = float(fitted[1][0, number])
            verdict, optimum, interval = _judge(fitted[0][:, number], fitted[1][:, number], here, best, low, high)
        edge = _edge(optimum, low, high) or _edge(here[best], low, high)
        if edge and verdict in ("bracketed", "too few"):
            # A value in the middle of a range that is only two values wide is on an edge, and so is the best trial there.
            verdict = edge
        value = dimension.search.value
        found.append(
            Bracket(
                name=dimension.name,
                verdict=verdict,
                best=trials[best][0][dimension.name],
                optimum=value(float(optimum)),
                low=None if interval[0] is None else value(interval[0]),
                high=None if interval[1] is None else value(interval[1]),
                range_low=_tidy(value(low)),
                range_high=_tidy(value(high)),
                searched_low=_tidy(value(float(here.min()))),
                searched_high=_tidy(value(float(here.max()))),
                curvature=curvature,
            )
        )
    return tuple(found)


def _tidy(value: float) -> float:
    """Without the last digits that going to a scale and back has changed."""
    return float(f"{value:.10g}")


def _edge(position: float, low: float, high: float) -> Verdict | None:
    margin = EDGE * (high - low)
    if position <= low + margin:
        return "low edge"
    return "high edge" if position >= high - margin else None


def _judge(
    vertices: Array, curvatures: Array, here: Array, best: int, low: float, high: float
) -> tuple[Verdict, float, tuple[float | None, float | None]]:
    """From the fit (first row) and its resamples: verdict, position of the optimum, and its interval."""
    bowls = curvatures[1:] > 0
    if curvatures[0] <= 0 or bowls.mean() < 0.9:
        # No bowl in this direction: it falls towards an edge, or it does not matter.
        edge = _edge(here[best], low, high)
        return edge or "flat", here[best], (None, None)
    vertex = float(np.clip(vertices[0], low, high))
    inside = np.clip(vertices[1:][bowls], low - (high - low), high + (high - low))
    interval = tuple(float(q) for q in np.quantile(inside, [0.025, 0.975]))
    return _edge(vertex, low, high) or "bracketed", vertex, (interval[0], interval[1])


def _vertices(positions: Array, losses: Array, spans: Array, rng: np.random.Generator) -> tuple[Array, Array] | None:
    """Lowest points and curvatures, shape ``(1 + DRAWS, dimensions)`` each: the fit, then resamples of its residuals."""
    count, dimensions = positions.shape
    needed = 2 * dimensions + 1
    if count < needed + 1:
        return None
    kept = np.argsort(losses, kind="stable")[: max(needed + 2, round(KEPT_SHARE * count))]
    widths = np.maximum(spans[:, 1] - spans[:, 0], 1e-12)
    middles = spans.mean(axis=1)
    x = (positions[kept] - middles) / widths  # in [-1/2, 1/2]
    y = losses[kept] - losses[kept].min()
    design = np.concatenate([np.ones((len(x), 1)), x, x**2], axis=1)
    fit, weights = _huber(design, y)
    # Coefficients as the fit's own covariance has them, with Student's tails: a small fit follows its own noise.
    freedom = max(len(y) - needed, 1)
    variance = float(np.sum(weights * (y - design @ fit) ** 2)) / freedom / float(np.mean(weights))
    covariance = variance * np.linalg.pinv(design.T @ (design * weights[:, None]))
    student = np.sqrt(freedom / rng.chisquare(freedom, size=(DRAWS, 1)))
    draws = fit + student * rng.multivariate_normal(np.zeros(len(fit)), covariance, size=DRAWS, method="eigh")
    every = np.vstack([fit, draws])
    slope, curve = every[:, 1 : 1 + dimensions], every[:, 1 + dimensions :]
    safe = np.where(curve > 0, curve, np.nan)
    return np.nan_to_num(-slope / (2 * safe), nan=0.0) * widths + middles, 2 * curve / widths**2


def _huber(design: Array, y: Array, rounds: int = 30) -> tuple[Array, Array]:
    """Coefficients and final weights of an iteratively reweighted fit."""
    weights: Array = np.ones(len(y))
    fit: Array = np.zeros(design.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weights)
        fit = np.asarray(np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0], dtype=np.float64)
        residuals = y - design @ fit
        scale = max(float(np.median(np.abs(residuals))) / 0.6745, 1e-12)
        weights = np.minimum(1.0, HUBER * scale / np.maximum(np.abs(residuals), 1e-300))
    return fit, weights
