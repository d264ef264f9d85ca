"""Fit of hyper-parameter rules to the optima of tuned rungs.

Rates, batches and decays become powers of training compute where two or more rungs have an optimum that is not on an
edge. Hyper-parameters without such a scale (betas, warm-up, final fraction), and those of a single rung, are constants.
The error of an exponent comes from the brackets: it is large where the loss hardly depends on the hyper-parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from scaling.power_rule import NORMAL_95, PowerRule, fit_power_rule
from sweeps.config.tuning_results import Bracket

SCALED = ("peak_lr", "batch_tokens", "weight_decay")
"""Hyper-parameters that follow a power of compute; the others are constants."""

UNKNOWN_LOG_SD = math.log(2.0)
"""Standard deviation of the log of an optimum without an interval: a factor of two either way."""

MIN_LOG_SD = 0.02
"""Smallest standard deviation of the log of an optimum; a parabola through noiseless trials claims less."""


class Optimum(msgspec.Struct, frozen=True, kw_only=True):
    """The optimum of one hyper-parameter at one rung."""

    rung: str
    compute: float
    """FLOPs of one full run."""
    bracket: Bracket

    @property
    def value(self) -> float:
        """Minimum of the parabola where it is bracketed, else the value of the best trial."""
        return self.bracket.optimum if self.bracket.verdict == "bracketed" else self.bracket.best

    @property
    def log_sd(self) -> float:
        """Standard deviation of the log of `value`, from the 95 % interval of the bracket."""
        found = self.bracket
        if found.verdict != "bracketed" or found.low is None or found.high is None or found.low <= 0:
            return UNKNOWN_LOG_SD
        return max(math.log(found.high / found.low) / (2 * NORMAL_95), MIN_LOG_SD)


def fit_rule(name: str, optima: Sequence[Optimum], *, constant: bool = False) -> PowerRule:
    """The rule of one hyper-parameter from its optima, one for each rung; with `constant` never a power of compute."""
    inside = [optimum for optimum in optima if "edge" not in optimum.bracket.verdict]
    on_edge = ", ".join(optimum.rung for optimum in optima if optimum not in inside)
    notes = []
    if on_edge and len(inside) >= 2:
        notes.append(f"left out, with the optimum on an edge: {on_edge}")
    elif on_edge:
        inside = list(optima)
        notes.append(f"the optimum is on an edge at {on_edge}")
    one_compute = len({optimum.compute for optimum in inside}) < 2
    if one_compute and name in SCALED and not constant:
        notes.append("one compute gives no exponent")
    values = [optimum.value for optimum in inside]
    if constant or one_compute or name not in SCALED:
        middle = np.exp(np.mean(np.log(values))) if name in SCALED else np.median(values)
        rule = PowerRule(coefficient=float(middle), points=len(values))
    else:
        rule = fit_power_rule([o.compute for o in inside], values, sd=[o.log_sd for o in inside])
    return msgspec.structs.replace(rule, rungs=tuple(o.rung for o in inside), note="; ".join(notes))
