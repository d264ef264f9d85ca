"""Power rules: a hyper-parameter or an optimal size as a product of powers of compute, parameters and tokens.

A rule is not a loss law (`analysis.fitting.laws`): it has no floor, and it predicts a setting. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from scaling.errors import ConfigError
from scaling.io import MAX_NUMBER, Finite, Line, NonNegative, NonNegativeFloat, Strict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[np.float64]

NORMAL_95 = 1.96
"""Half width of a 95 % interval in standard errors."""


class PowerRule(Strict, frozen=True, omit_defaults=True):
    """``coefficient * C**exponent * N**parameters_exponent * D**tokens_exponent``.

    C is in FLOPs, N in parameters, D in tokens. Rules fitted by `fit_power_rule` depend on C alone.
    """

    coefficient: Annotated[float, msgspec.Meta(gt=0.0, le=1e300)]
    exponent: Finite = 0.0
    """Exponent of C."""
    parameters_exponent: Finite = 0.0
    tokens_exponent: Finite = 0.0
    error: NonNegativeFloat | None = None
    """Standard error of `exponent`; None for published rules, for constants, and where two points leave it open."""
    points: NonNegative = 0
    """Number of fitted points; 0 for published rules."""
    rungs: tuple[Line, ...] = ()
    """Rungs that the points belong to, where they have names."""
    note: Line = ""

    def value(self, *, compute: float, parameters: float = 1.0, tokens: float = 1.0) -> float:
        """The predicted value at compute C, size N and data D."""
        try:
            powers = compute**self.exponent * parameters**self.parameters_exponent * tokens**self.tokens_exponent
            value = float(self.coefficient * powers)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ConfigError(
                f"a rule gives no finite value at {compute:.3g} FLOPs, {parameters:.3g} parameters and {tokens:.3g} tokens. "
                "Use another rule or another size."
            )
        return value

    def inverse(self, value: float) -> float:
        """The compute C at which a rule of C alone, with an exponent other than 0, gives a value."""
        try:
            compute = float((value / self.coefficient) ** (1 / self.exponent))
        except (OverflowError, ZeroDivisionError):
            compute = math.inf
        if not 0.0 < compute <= MAX_NUMBER:
            raise ConfigError(
                f"a rule gives {value:.3g} at {compute:.3g} FLOPs; compute must lie above 0, up to {MAX_NUMBER:g}. "
                "Use another rule or another size."
            )
        return compute

    @property
    def constant(self) -> bool:
        """True if the value is the same at every size."""
        return self.exponent == self.parameters_exponent == self.tokens_exponent == 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `exponent`; None where its error is not known."""
        if self.error is None:
            return None
        return self.exponent - NORMAL_95 * self.error, self.exponent + NORMAL_95 * self.error


def fit_power_rule(computes: Numbers, values: Numbers, sd: Numbers | None = None) -> PowerRule:
    """Weighted least squares of ``y = ln coefficient + exponent * x`` with ``x = ln C`` and ``y = ln value``.

    With weights ``w = sd**-2`` (all equal without `sd`) and ``u = x - sum(w x) / sum(w)``, the exponent is the linear
    combination ``g . y`` with ``g = w u / sum(w u**2)``. Errors of y are independent with variance ``sd**2 + s**2``,
    where ``s**2`` is the residual variance on ``points - 2`` degrees of freedom. The variance of the exponent is
    therefore ``sum(g**2 (sd**2 + s**2))``.

    Args:
        computes: C of each point in FLOPs, at least two different ones.
        values: Positive values, one for each compute.
        sd: Standard deviation of each ln value, where it is known.
    """
    import numpy as np

    x, y = np.log(computes), np.log(values)
    known = np.zeros(len(x)) if sd is None else np.asarray(sd, dtype=np.float64)
    weights = np.ones(len(x)) if sd is None else known**-2
    # Centring x makes the exponent and the level at the centre independent, and keeps 1e20 FLOPs well conditioned.
    centre, level = np.average(x, weights=weights), np.average(y, weights=weights)
    u = x - centre
    g = weights * u / np.sum(weights * u**2)
    exponent = float(g @ y)
    residuals = y - level - exponent * u
    # Points may scatter by more than their own standard deviations; two points leave no residual to measure it by.
    scatter = float(np.sum(residuals**2)) / (len(x) - 2) if len(x) > 2 else 0.0
    error = float(np.sqrt(np.sum(g**2 * (known**2 + scatter))))
    return PowerRule(
        coefficient=float(np.exp(level - exponent * centre)),
        exponent=exponent,
        error=None if sd is None and len(x) <= 2 else error,
        points=len(x),
    )
