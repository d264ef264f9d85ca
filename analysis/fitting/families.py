"""Laws over several arms at once, from one multiplier for everything to nothing in common.

Separate laws for each optimizer are ill-conditioned (Volkova et al. 2026, arXiv:2602.07712): floor and exponents trade
against each other, and where two frontiers cross far outside the data is noise. The floor belongs to data, tokenizer
and evaluation set, so arms share it first, exponents second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis.data.cells import Array, Cells, Rows
from analysis.fitting.fit import HUBER, LEAST_SQUARES, Fitted, Objective, form_named, solve, some_of
from analysis.fitting.parameterization import Sharing
from analysis.fitting.solver import minimise, predict
from scaling.io import Strict
from scaling.units import FLOPS_PER_PFLOPS_DAY

MAX_LEFT_OUT_WORK = 200_000
"""Rows times rungs on which the error at rungs left out is measured; of larger tables some rows at random."""


class LawFamily(NamedTuple):
    """A row of `LAW_FAMILIES`."""

    label: str
    form: str
    """Row of ``analysis.fitting.laws.LAWS``."""
    sharing: Sharing
    design: str
    """``ladder`` for laws of compute, ``grid`` for surfaces over parameters and tokens."""

    @property
    def objective(self) -> Objective:
        """What the family minimises unless told otherwise."""
        return HUBER if self.form == "surface" else LEAST_SQUARES

    @property
    def has_floor(self) -> bool:
        """Whether a constant term is fitted."""
        return () in form_named(self.form).terms

    def size(self, arms: int) -> int:
        """Number of free parameters over so many arms."""
        shared = [*self.sharing.constants, *self.sharing.exponents]
        return sum(1 if common else arms for common in shared)


LAW_FAMILIES: dict[str, LawFamily] = {
    "lines": LawFamily("a_arm C^-b_arm", "power", Sharing((False,), (False,)), "ladder"),
    "parallel-lines": LawFamily("a_arm C^-b", "power", Sharing((False,), (True,)), "ladder"),
    "shared-floor": LawFamily("E + a_arm C^-b_arm", "power-floor", Sharing((True, False), (False,)), "ladder"),
    "one-multiplier": LawFamily("E + a_arm C^-b", "power-floor", Sharing((True, False), (True,)), "ladder"),
    "separate-floors": LawFamily("E_arm + a_arm C^-b_arm", "power-floor", Sharing((False, False), (False,)), "ladder"),
    "factors": LawFamily(
        "E + A (f_arm N)^-alpha + B (g_arm D)^-beta",
        "surface",
        Sharing((True, False, False), (True, True)),
        "grid",
    ),
    "token-factor": LawFamily(
        "E + A N^-alpha + B (g_arm D)^-beta", "surface", Sharing((True, True, False), (True, True)), "grid"
    ),
    "shared-floor-surfaces": LawFamily(
        "E + A_arm N^-alpha_arm + B_arm D^-beta_arm",
        "surface",
        Sharing((True, False, False), (False, False)),
        "grid",
    ),
    "separate-surfaces": LawFamily(
        "E_arm + A_arm N^-alpha_arm + B_arm D^-beta_arm",
        "surface",
        Sharing((False, False, False), (False, False)),
        "grid",
    ),
}
"""Ways for arms to share a law, by the name that results carry."""


class Worth(Strict, frozen=True):
    """A factor with its 95 % interval over resamples."""

    value: float
    low: float
    high: float


class Factors(Strict, frozen=True):
    """What an arm's parameters and tokens are worth under shared exponents, relative to the first arm's."""

    arm: str
    params: Worth
    """One parameter of this arm counts as so many of the first arm's."""
    tokens: Worth
    """One token of this arm counts as so many of the first arm's."""


def fit_family(family: LawFamily, rows: Rows, arms: int, *, best_of: int | None = None) -> Fitted:
    """The family's global minimum over the rows of `arms` arms."""
    return solve(form_named(family.form), rows, family.objective, arms=arms, sharing=family.sharing, best_of=best_of)


def frontiers(fitted: Fitted, theta: Array, arm: int) -> tuple[Array, Array, Array]:
    """Log scale (PFLOP/s-days), exponent and floor of an arm's law of compute, one for each vector of parameters.

    NaN where there is no such law: an exponent that is not positive.
    """
    constants, exponents = fitted.design.parameters(np.atleast_2d(theta), arm)
    days = np.log(FLOPS_PER_PFLOPS_DAY)
    with np.errstate(all="ignore"):
        if exponents.shape[1] == 1:
            floor = constants[:, 0] if constants.shape[1] == 2 else np.zeros(len(constants))
            power = exponents[:, 0]
            log_scale = np.log(constants[:, -1]) - power * days
        else:
            # The best split of C = 6 N D under E + A N^-alpha + B D^-beta is a power law of C with floor E.
            floor, alpha, beta = constants[:, 0], exponents[:, 0], exponents[:, 1]
            power = alpha * beta / (alpha + beta)
            lean = (np.log(alpha * constants[:, 1]) - np.log(beta * constants[:, 2])) / (alpha + beta)
            shortage = np.logaddexp(np.log(constants[:, 1]) - alpha * lean, np.log(constants[:, 2]) + beta * lean)
            log_scale = shortage - power * (days - np.log(6.0))
        bad = (exponents <= 0.0).any(axis=1)
        return np.where(bad, np.nan, log_scale), np.where(bad, np.nan, power), floor


def ratio_of(fitted: Fitted, theta: Array, losses: Array, baseline: int = 0, challenger: int = 1) -> Array:
    """Log match ratio of two arms at each loss; NaN where undefined.

    Args:
        fitted: The family.
        theta: Parameters, shape ``(parameters,)`` or ``(draws, parameters)``.
        losses: Shape ``(losses,)``.
        baseline: Number of the arm compared against.
        challenger: Number of the arm compared.

    Returns:
        Shape ``(losses,)`` or ``(draws, losses)``.
    """
    logs = []
    for arm in (challenger, baseline):
        log_scale, power, floor = frontiers(fitted, theta, arm)
        above = losses - floor[:, None]
        with np.errstate(all="ignore"):
            logs.append((log_scale[:, None] - np.log(np.where(above > 0.0, above, np.nan))) / power[:, None])
    return (logs[0] - logs[1]).reshape(*theta.shape[:-1], len(losses))


def log_loss_of(fitted: Fitted, theta: Array, compute: Array, arm: int) -> Array:
    """Log loss of an arm's law at each compute in PFLOP/s-days, shaped as in `ratio_of`."""
    log_scale, power, floor = frontiers(fitted, theta, arm)
    with np.errstate(all="ignore"):
        values = np.log(floor[:, None] + np.exp(log_scale[:, None] - power[:, None] * np.log(compute)))
    return values.reshape(*theta.shape[:-1], len(compute))


def factors(fitted: Fitted, draws: Array, arm: int, name: str) -> Factors:
    """The worth of one parameter and of one token of an arm, relative to the first arm's, under shared exponents.

    Args:
        fitted: A family over surfaces that shares its exponents.
        draws: Resampled parameters, shape ``(draws, parameters)``.
        arm: Number of the arm.
        name: Its name.
    """
    plan = fitted.design
    found = []
    for term, column in ((1, "params"), (2, "tokens")):
        places = [plan.position(term, who, None) for who in (0, arm)], plan.position(term, 0, column)

        def worth(theta: Array, places: tuple[list[int], int] = places) -> Array:
            (first, own), exponent = places
            with np.errstate(all="ignore"):
                return np.asarray(np.exp((theta[..., first] - theta[..., own]) / theta[..., exponent]))

        low, high = np.nanquantile(worth(draws), [0.025, 0.975])
        found.append(Worth(value=float(worth(fitted.theta)), low=float(low), high=float(high)))
    return Factors(arm=name, params=found[0], tokens=found[1])


def left_out_error(family: LawFamily, cells: Cells, fitted: Fitted) -> float | None:
    """Root mean square of the log errors at rungs that the fit has not seen, each rung left out in turn.

    None where a rung cannot be left out: too few runs would remain.
    """
    rungs = np.unique(cells.rung)
    which = some_of(len(cells.rung), MAX_LEFT_OUT_WORK // len(rungs))
    loss, arm_of, rung_of = cells.rows.loss[which], cells.rows.arm[which], cells.rung[which]
    problem = fitted.problem._replace(z=fitted.problem.z[which], loss=loss)
    weights = (rung_of != rungs[:, None]).astype(np.float64)
    arms = len(cells.arms)
    for arm in range(arms):
        own = arm_of == arm
        per_arm = family.size(arms) / arms if arms > 1 else family.size(1)
        if np.any(weights[:, own].sum(axis=1) < max(2.0, per_arm)):
            return None
    if len(rungs) - 1 < 2 + family.has_floor:
        return None
    found = minimise(problem, fitted.theta, weights, tolerance=1e-10, limit=150)
    errors = []
    for row, rung in enumerate(rungs):
        log_prediction = predict(problem, found.theta[row][None])[0][0]
        errors.append((np.log(loss) - log_prediction)[rung_of == rung])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))
