"""One arm's law alone, with what a reviewer asks beside it: errors, influence, and what the choices moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, LeftOut, Rows, run_of, select
from analysis.data.table import RunsTable, check_table
from analysis.fitting.fit import (
    EFFICIENT,
    HUBER,
    LEAST_SQUARES,
    Fit,
    Fitted,
    Objective,
    describe,
    form_named,
    solve,
    tied_to_scale,
)
from analysis.fitting.laws import Law, LossSurface
from analysis.uncertainty.intervals import bootstrap, refit
from scaling.errors import UserError
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


MOST_SWEPT = 5000
"""Rows beyond which the sweep over loss functions is left out."""

DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Huber thresholds of the sweep: from nearly least squares to nearly least absolute deviations."""

MOST_INFLUENCE = 400
"""Points up to which the influence of each is worked out."""


class Parameter(Strict, frozen=True):
    """A derived value with its interval over resamples."""

    name: str
    value: float
    error: float
    """Standard deviation over resamples."""
    low: float
    high: float


class Influence(Strict, frozen=True):
    """What leaving one point out does."""

    row: int
    residual: float
    """ln(observed / fitted)."""
    moves: dict[str, float]
    """Change of each parameter when the fit is made without the point."""


class Variant(Strict, frozen=True):
    """The same form under another loss function."""

    objective: str
    law: Law


class ArmFit(Strict, frozen=True):
    """One arm's law with its errors."""

    fit: Fit
    parameters: list[Parameter]
    resamples: int
    unit: str
    """What was resampled: rows, cells or runs."""
    units: int
    effective: float
    """Rows that would carry as much if they were independent; less than the rows where checkpoints repeat a run."""
    variants: list[Variant]
    influence: list[Influence]
    """Largest first; empty where there are too many points to try each."""
    left_out: list[LeftOut]


def fit_arm(
    table: RunsTable | pd.DataFrame,
    law: str,
    arm: str | None = None,
    *,
    objective: Objective | Literal["robust"] | None = None,
    checkpoints: bool | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> ArmFit:
    """A form of ``analysis.fitting.laws.LAWS`` fitted to one arm of a table.

    Args:
        table: A table of runs, checked or not.
        law: ``power``, ``power-floor``, ``surface``, ...
        arm: Which; not needed where the table has one.
        objective: Least squares in loss space for laws of compute, Huber (1e-3 on log loss) for the surface;
            ``robust`` ties Huber's threshold to the residuals (`analysis.fitting.fit.tied_to_scale`).
        checkpoints: Use every row of runs that stand in the table with their checkpoints; resampling then takes whole
            runs. By default for the surface alone.
        resamples: Of the bootstrap; 0 for none.
        seed: Of its draws.

    Raises:
        UserError: The arm or the law is not known, or the runs are too few.
    """
    form = form_named(law)
    table = check_table(table, columns=form.columns)
    name, arm = table.name, table.only_arm(arm)
    checkpoints = law == "surface" if checkpoints is None else checkpoints
    cells = select(table, (arm,), ends_only=not checkpoints)
    rows = cells.rows
    if len(rows.loss) < max(form.size, 3):
        raise UserError(
            f"{name}: arm {arm} has {len(rows.loss)} usable runs, and {form.label} has {form.size} parameters. Fit a law "
            "with fewer (power has 2), or finish more runs."
        )
    if objective == "robust":
        objective = tied_to_scale(form, rows)
    objective = objective or (HUBER if law == "surface" else LEAST_SQUARES)
    fitted = solve(form, rows, objective)
    fit = describe(fitted, law, rows, arm=arm, numbers=cells.numbers.tolist(), objective=objective)
    if fit.status == "failed":
        raise UserError(f"{name}: these runs carry no law {law}. {fit.remark} Fit another.")
    used = table.frame.loc[cells.numbers - 1]
    run = run_of(used).factorize()[0]
    clustered = run.max() + 1 < len(rows.loss)
    groups = run if clustered else cells.cell
    unit = "runs, each with all its checkpoints" if clustered else "cells"
    draws = bootstrap(fitted, groups, resamples=resamples, seed=seed) if resamples else fitted.theta[None]
    return ArmFit(
        fit=fit,
        parameters=_parameters(fitted, draws),
        resamples=resamples,
        unit=unit,
        units=len(np.unique(groups)),
        effective=effective_size(fitted.log_residuals(), groups),
        variants=_variants(fitted, rows, objective),
        influence=_influence(fitted, cells.numbers, groups if clustered else np.arange(len(rows.loss))),
        left_out=cells.left_out,
    )


def quantities(law: Law) -> dict[str, float]:
    """The numbers of a law by name, and those derived from them that papers quote."""
    if isinstance(law, LossSurface):
        share = law.beta / (law.alpha + law.beta)
        return {
            "A": law.A,
            "B": law.B,
            "E": law.E,
            "alpha": law.alpha,
            "beta": law.beta,
            "a = beta/(alpha+beta)": share,
        }
    found = {"scale": law.scale, "exponent": law.exponent}
    return found | {"floor": law.floor} if law.floor else found


def parameter_draws(fitted: Fitted, draws: Array, arm: int = 0) -> dict[str, Array]:
    """Whole resampled laws as columns: one array for each number of the law."""
    constants, exponents = fitted.design.parameters(draws, arm)
    if exponents.shape[1] == 2:
        E, A, B = constants.T
        alpha, beta = exponents.T
        with np.errstate(all="ignore"):
            share = beta / (alpha + beta)
        return {"A": A, "B": B, "E": E, "alpha": alpha, "beta": beta, "a = beta/(alpha+beta)": share}
    from scaling.units import FLOPS_PER_PFLOPS_DAY

    scale = constants[:, -1] * FLOPS_PER_PFLOPS_DAY ** -exponents[:, 0]
    found = {"scale": scale, "exponent": exponents[:, 0]}
    return found | {"floor": constants[:, 0]} if constants.shape[1] == 2 else found


def resampled_laws(
    table: RunsTable | pd.DataFrame, law: str, arm: str, *, resamples: int = 4000, seed: int = 0
) -> tuple[dict[str, Array], dict[str, float]]:
    """Whole resampled laws as columns, and the numbers of the fit itself: what a scatter of pairs shows."""
    table = check_table(table)
    cells = select(table, (arm,), ends_only=law != "surface")
    fitted = solve(form_named(law), cells.rows, HUBER if law == "surface" else LEAST_SQUARES)
    run = run_of(table.frame.loc[cells.numbers - 1]).factorize()[0]
    groups = run if run.max() + 1 < len(run) else cells.cell
    return parameter_draws(fitted, bootstrap(fitted, groups, resamples=resamples, seed=seed)), quantities(fitted.law())


def _parameters(fitted: Fitted, draws: Array) -> list[Parameter]:
    values = quantities(fitted.law())
    columns = parameter_draws(fitted, draws)
    return [
        Parameter(
            name=name,
            value=value,
            error=float(np.std(columns[name])),
            low=float(np.quantile(columns[name], 0.025)),
            high=float(np.quantile(columns[name], 0.975)),
        )
        for name, value in values.items()
        if name in columns
    ]


def _variants(fitted: Fitted, rows: Rows, used: Objective) -> list[Variant]:
    if len(rows.loss) > MOST_SWEPT:
        return []
    form = fitted.design.form
    tried = [Objective(function="huber", delta=delta) for delta in DELTAS]
    tried += [Objective(space="log"), Objective(space="loss"), Objective(function="huber", delta=1e-3, space="loss")]
    tried += [Objective(function="absolute")] if len(rows.loss) <= 500 else []
    named = {other.describe(): other for other in tried if other != used}
    tied = tied_to_scale(form, rows)
    named[f"{tied.describe()}, {EFFICIENT} robust scales of the residuals"] = tied
    return [Variant(objective=name, law=solve(form, rows, other, best_of=4).law()) for name, other in named.items()]


def _influence(fitted: Fitted, numbers: NDArray[np.intp], groups: NDArray[np.intp]) -> list[Influence]:
    names, inverse = np.unique(groups, return_inverse=True)
    if len(names) > MOST_INFLUENCE or len(names) <= fitted.design.size:
        return []
    columns = parameter_draws(fitted, refit(fitted, inverse, 1.0 - np.eye(len(names))))
    whole = quantities(fitted.law())
    r = fitted.log_residuals()
    moves = {key: columns[key] - whole[key] for key in whole if key in columns}
    # Ordered by the parameter that moves most in units of its own spread over the points.
    size = np.max([np.abs(move) / (np.std(move) + 1e-300) for move in moves.values()], axis=0)
    order = np.argsort(-size, kind="stable")
    first = np.array([np.flatnonzero(groups == name)[0] for name in names])
    return [
        Influence(
            row=int(numbers[first[at]]),
            residual=float(r[first[at]]),
            moves={key: float(move[at]) for key, move in moves.items()},
        )
        for at in order
    ]


def effective_size(residuals: Array, groups: NDArray[np.intp]) -> float:
    """Independent rows that would carry as much: rows over the design effect of their correlation within groups."""
    counts = np.bincount(groups).astype(np.float64)
    rows = len(residuals)
    if counts.max() <= 1 or len(counts) < 2:
        return float(rows)
    centred = residuals - residuals.mean()
    total = float(np.mean(centred**2))
    if total <= 0.0:
        return float(rows)
    sums = np.bincount(groups, weights=centred)
    squares = np.bincount(groups, weights=centred**2)
    pairs = float(np.sum(counts * (counts - 1)))
    within = float(np.clip(np.sum(sums**2 - squares) / pairs / total, 0.0, 1.0))
    return float(rows / (1.0 + within * (np.sum(counts**2) / rows - 1.0)))
