"""Law families: one form fitted to several arms at once, with some parameters shared, from one multiplier to none.

Separate laws for each optimizer are ill-conditioned (Volkova et al. 2026, arXiv:2602.07712): floor and exponents trade
against each other, and the point where two frontiers cross far outside the data is noise. The floor is a property of data,
tokenizer and evaluation set, so arms share it first, exponents second.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from analysis.data.cells import Array, Cells, Rows
from analysis.fitting.fit import Minimum, sample_rows, solve
from analysis.fitting.laws import LAWS
from analysis.fitting.parameterization import Sharing
from analysis.fitting.solver import minimise, predict
from scaling.io import Strict
from scaling.registry import Registry

MAX_LEFT_OUT_WORK = 200_000
"""Rows times rungs for which the error at rungs left out is measured on all rows; larger tables are sampled."""


class LawFamily(NamedTuple):
    """A row of `LAW_FAMILIES`."""

    label: str
    form: str
    """Row of ``analysis.fitting.laws.LAWS``."""
    sharing: Sharing

    @property
    def design(self) -> Literal["ladder", "grid"]:
        """The runs that the family needs, as its form does."""
        return LAWS.row(self.form).design

    @property
    def has_floor(self) -> bool:
        """True if a constant term is fitted."""
        return LAWS.row(self.form).has_floor

    @property
    def separate_floors(self) -> bool:
        """True if each arm has a floor of its own."""
        return self.has_floor and not self.sharing.constants[LAWS.row(self.form).terms.index(())]

    @property
    def has_factors(self) -> bool:
        """True if arms differ by factors of parameters and of tokens: one term each, with shared exponents."""
        return {("params",), ("tokens",)} <= set(LAWS.row(self.form).terms) and all(self.sharing.exponents)

    def size(self, arms: int) -> int:
        """Number of free parameters over this number of arms."""
        shared = [*self.sharing.constants, *self.sharing.exponents]
        return sum(1 if common else arms for common in shared)


LAW_FAMILIES: Registry[LawFamily] = Registry(
    "law family",
    "law_families",
    {
        "lines": LawFamily("a_arm C^-b_arm", "power", Sharing((False,), (False,))),
        "parallel-lines": LawFamily("a_arm C^-b", "power", Sharing((False,), (True,))),
        "shared-floor": LawFamily("E + a_arm C^-b_arm", "power-floor", Sharing((True, False), (False,))),
        "one-multiplier": LawFamily("E + a_arm C^-b", "power-floor", Sharing((True, False), (True,))),
        "separate-floors": LawFamily("E_arm + a_arm C^-b_arm", "power-floor", Sharing((False, False), (False,))),
        "factors": LawFamily(
            "E + A (f_arm N)^-alpha + B (g_arm D)^-beta", "surface", Sharing((True, False, False), (True, True))
        ),
        "token-factor": LawFamily(
            "E + A N^-alpha + B (g_arm D)^-beta", "surface", Sharing((True, True, False), (True, True))
        ),
        "shared-floor-surfaces": LawFamily(
            "E + A_arm N^-alpha_arm + B_arm D^-beta_arm", "surface", Sharing((True, False, False), (False, False))
        ),
        "separate-surfaces": LawFamily(
            "E_arm + A_arm N^-alpha_arm + B_arm D^-beta_arm", "surface", Sharing((False, False, False), (False, False))
        ),
    },
)
"""Law families by the name in results, for each design the simplest first."""


class Factor(Strict, frozen=True):
    """A factor with its 95 % interval over resamples."""

    value: float
    low: float
    high: float


class Factors(Strict, frozen=True):
    """Efficiency of an arm's parameters and tokens relative to the first arm, under shared exponents."""

    arm: str
    params: Factor
    """Parameters of the first arm that one parameter of this arm replaces."""
    tokens: Factor
    """Tokens of the first arm that one token of this arm replaces."""


def fit_family(family: LawFamily, rows: Rows, arms: int, *, best_of: int | None = None) -> Minimum:
    """The family's global minimum over the rows of `arms` arms."""
    form = LAWS.row(family.form)
    return solve(form, rows, form.objective, arms=arms, sharing=family.sharing, best_of=best_of)


def frontiers(fitted: Minimum, theta: Array, arm: int) -> tuple[Array, Array, Array]:
    """Law of compute ``floor + exp(log_scale) * C^-exponent`` of an arm for each vector of parameters.

    Returns:
        Log scale (C in PFLOP/s-days), exponent and floor, each of shape ``(draws,)`` for `theta` of shape
        ``(parameters,)`` or ``(draws, parameters)``. Log scale and exponent are NaN where an exponent is not positive.
    """
    constants, exponents = fitted.layout.parameters(np.atleast_2d(theta), arm)
    with np.errstate(all="ignore"):
        log_scale, power, floor = fitted.layout.form.frontier(constants, exponents, fitted.layout.ladders[arm])
    # A law that rises with a column has no best split and no inverse.
    bad = (exponents <= 0.0).any(axis=1)
    return np.where(bad, np.nan, log_scale), np.where(bad, np.nan, power), floor


def ratio_of(fitted: Minimum, theta: Array, losses: Array) -> Array:
    """Log match ratio ``ln C_1(L) - ln C_0(L)`` of arm 1 over arm 0 at each loss; NaN where a law does not reach it.

    The compute at a loss solves ``L = floor + exp(log_scale) * C^-exponent``, so
    ``ln C = (log_scale - ln(L - floor)) / exponent``. The shape is ``(losses,)`` or ``(draws, losses)``, as that of
    `theta` is.
    """
    logs = []  # ln C of each arm, shape (draws, losses)
    # A loss at or below a floor has no compute: NaN, which intervals count as beyond both ends.
    for arm in (1, 0):
        log_scale, power, floor = frontiers(fitted, theta, arm)
        above = losses - floor[:, None]
        with np.errstate(all="ignore"):
            logs.append((log_scale[:, None] - np.log(np.where(above > 0.0, above, np.nan))) / power[:, None])
    return (logs[0] - logs[1]).reshape(*theta.shape[:-1], len(losses))


def log_loss_of(fitted: Minimum, theta: Array, compute: Array, arm: int) -> Array:
    """Log loss of an arm's law at each compute in PFLOP/s-days, shaped as in `ratio_of`."""
    log_scale, power, floor = frontiers(fitted, theta, arm)
    with np.errstate(all="ignore"):
        # floor + exp(log_scale) * C^-exponent, with the power as exp of logarithms so that it cannot overflow.
        values = np.log(floor[:, None] + np.exp(log_scale[:, None] - power[:, None] * np.log(compute)))
    return values.reshape(*theta.shape[:-1], len(compute))


def factors(fitted: Minimum, draws: Array, arm: int, name: str) -> Factors:
    """Factors of one parameter and of one token of an arm relative to the first arm, under shared exponents.

    The terms are ``A_arm N^-alpha`` with one alpha: ``A_arm N^-alpha = A_0 (f N)^-alpha`` for ``f = (A_0 / A_arm)^(1/alpha)``.
    """
    layout, terms = fitted.layout, fitted.layout.form.terms

    def factor(column: str) -> Factor:
        term = terms.index((column,))
        first, own = (layout.position(term, number, None) for number in (0, arm))
        exponent = layout.position(term, 0, column)

        def values(theta: Array) -> Array:
            with np.errstate(all="ignore"):
                return np.asarray(np.exp((theta[..., first] - theta[..., own]) / theta[..., exponent]))

        # Resamples in which the exponent vanishes have no factor.
        low, high = np.nanquantile(values(draws), [0.025, 0.975])
        return Factor(value=float(values(fitted.theta)), low=float(low), high=float(high))

    return Factors(arm=name, params=factor("params"), tokens=factor("tokens"))


def left_out_error(family: LawFamily, cells: Cells, fitted: Minimum) -> float | None:
    """Root mean square of the log errors at rungs left out of the fit, one rung at a time.

    None where a rung cannot be left out: too few runs would remain.
    """
    rungs = np.unique(cells.rung)
    which = sample_rows(len(cells.rung), MAX_LEFT_OUT_WORK // len(rungs))
    loss, arm_of, rung_of = cells.rows.loss[which], cells.rows.arm[which], cells.rung[which]
    problem = fitted.problem._replace(z=fitted.problem.z[which], loss=loss)
    # One refit a rung, all side by side; a row of weights is zero on its own rung: (rungs, rows).
    weights = (rung_of != rungs[:, None]).astype(np.float64)
    arms = len(cells.arms)
    for arm in range(arms):
        own = arm_of == arm
        # Shared parameters are paid for by all arms in equal parts.
        per_arm = family.size(arms) / arms if arms > 1 else family.size(1)
        if np.any(weights[:, own].sum(axis=1) < max(2.0, per_arm)):
            return None
    # A line needs two computes, and a floor a third.
    if len(rungs) - 1 < 2 + family.has_floor:
        return None
    found = minimise(problem, fitted.theta, weights, tolerance=1e-10, limit=150)
    errors = []
    for row, rung in enumerate(rungs):
        # All rows are predicted; only those of the rung left out are scored.
        log_prediction = predict(problem, found.theta[row][None])[0][0]
        errors.append((np.log(loss) - log_prediction)[rung_of == rung])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))
