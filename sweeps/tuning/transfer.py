"""From tuned rungs to the others: each hyper-parameter as a power of training compute, with an interval.

Rates, batches and decays get a power law where two or more rungs have an optimum that is not on an edge; what has no
such scale (betas, warm-up, final rate), or no more than one rung, is carried over as it is. The interval comes from the
brackets: an optimum that the loss hardly sees is not known well, and neither is what is concluded from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sweeps.config.search_space import Dimension, Values
from sweeps.config.tuning_results import Bracket, FittedRule

SCALED = ("peak_lr", "batch_tokens", "weight_decay")
"""Hyper-parameters that follow a power law of compute; the others are constants."""

DRAWS = 2000

UNKNOWN_SPREAD = math.log(2.0)
"""Standard deviation, on the log scale, of an optimum without an interval of its own: a factor of two either way."""

Array = npt.NDArray[np.float64]


class Optimum(msgspec.Struct, frozen=True, kw_only=True):
    """Where the optimum of one hyper-parameter was found at one rung."""

    rung: str
    compute: float
    """FLOPs of one full run."""
    bracket: Bracket

    @property
    def value(self) -> float:
        """The parabola's lowest point where it was bracketed, else the best trial's."""
        return self.bracket.optimum if self.bracket.verdict == "bracketed" else self.bracket.best

    @property
    def sd(self) -> float:
        """Of the log of the value."""
        found = self.bracket
        if found.verdict != "bracketed" or found.low is None or found.high is None or found.low <= 0:
            return UNKNOWN_SPREAD
        return max(math.log(found.high / found.low) / 3.92, 0.02)


def law(name: str, optima: Sequence[Optimum], *, seed: int = 0, constant: bool = False) -> FittedRule:
    """The law of one hyper-parameter.

    Args:
        name: Of the hyper-parameter.
        optima: One a rung, at least one.
        seed: Of the draws behind the interval.
        constant: Carry it over unchanged, whatever the rungs say.
    """
    inside = [optimum for optimum in optima if "edge" not in optimum.bracket.verdict]
    rungs = tuple(optimum.rung for optimum in optima)
    note = ""
    left_out = [optimum.rung for optimum in optima if optimum not in inside]
    if left_out and len(inside) >= 2:
        note = f"left out, with the optimum on an edge: {', '.join(left_out)}"
        rungs = tuple(optimum.rung for optimum in inside)
    elif left_out:
        inside = list(optima)
        note = f"the optimum is on an edge at {', '.join(left_out)}"
    computes = {optimum.compute for optimum in inside}
    if constant or name not in SCALED or len(computes) < 2:
        if not constant and name in SCALED:
            note = "; ".join(filter(None, [note, "one compute gives no exponent"]))
        value = _constant(name, inside)
        return FittedRule(
            name=name, coefficient=value, exponent=0.0, low=None, high=None, rungs=rungs, kind="constant", note=note
        )
    x = np.log([optimum.compute for optimum in inside])
    y = np.log([optimum.value for optimum in inside])
    sd = np.array([optimum.sd for optimum in inside])
    # The exponent is a weighted sum of the logs, so resampled ones are one product.
    weights = sd**-2
    middle = np.average(x, weights=weights)
    slope_of = weights * (x - middle) / np.sum(weights * (x - middle) ** 2)
    exponent = float(slope_of @ y)
    intercept = float(np.average(y, weights=weights) - exponent * middle)
    scatter = 0.0
    if len(inside) > 2:
        # Optima may scatter by more than their own intervals say.
        scatter = float(np.sqrt(np.sum((y - intercept - exponent * x) ** 2) / (len(inside) - 2)))
    rng = np.random.default_rng(seed)
    drawn = y + rng.normal(size=(DRAWS, len(y))) * np.hypot(sd, scatter)
    low, high = (float(q) for q in np.quantile(drawn @ slope_of, [0.025, 0.975]))
    return FittedRule(
        name=name,
        coefficient=math.exp(intercept),
        exponent=exponent,
        low=low,
        high=high,
        rungs=rungs,
        kind="power",
        note=note,
    )


def predict(laws: Sequence[FittedRule], compute: float, dimensions: Sequence[Dimension], context: int) -> Values:
    """The setting that the laws give for a run of so much compute, within the limits of each hyper-parameter."""
    rows = {dimension.name: dimension for dimension in dimensions}
    values = {}
    for found in laws:
        row = rows[found.name]
        raw = found.coefficient * compute**found.exponent
        values[found.name] = row.rounded(min(max(raw, row.search.least), row.search.most), context)
    return values


def _constant(name: str, optima: Sequence[Optimum]) -> float:
    values = np.array([optimum.value for optimum in optima])
    if name in SCALED:
        return float(np.exp(np.mean(np.log(values))))
    return float(np.median(values))
