"""Law of one arm with its errors: intervals of the parameters, influence of each point, other objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Cells, LeftOut, Rows, run_of, select
from analysis.data.table import RunsTable, check_table
from analysis.fitting.fit import EFFICIENT_DELTA, Fit, Minimum, describe, solve, tied_to_scale
from analysis.fitting.laws import LAWS, Law
from analysis.fitting.objective import Objective
from analysis.uncertainty.intervals import bootstrap, refit
from scaling.errors import UserError
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


MAX_ROWS_FOR_VARIANTS = 5000
"""Rows up to which other objectives are fitted."""

MAX_ROWS_FOR_ABSOLUTE = 500
"""Rows up to which least absolute deviations are fitted, whose linear programs are dense."""

VARIANT_DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Huber thresholds of the variants: from nearly least squares to nearly least absolute deviations."""

MAX_POINTS_FOR_INFLUENCE = 400
"""Points up to which the influence of each is computed."""


class Parameter(Strict, frozen=True):
    """A derived value with its interval over resamples."""

    name: str
    value: float
    error: float
    """Standard deviation over resamples."""
    low: float
    high: float


class Influence(Strict, frozen=True):
    """Effect of one point on the fit."""

    row: int
    residual: float
    """ln(observed / fitted)."""
    moves: dict[str, float]
    """Change of each parameter when the point is left out of the fit."""


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
    """Unit of resampling: cells, or runs with their checkpoints."""
    units: int
    effective: float
    """Number of independent rows with the same information; less than the rows where checkpoints repeat a run."""
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
        objective: The law's own when not given; ``robust`` ties Huber's threshold to the residuals
            (`analysis.fitting.fit.tied_to_scale`).
        checkpoints: Fit every checkpoint of a run, and resample whole runs. By default as the law says (the surface does).
        resamples: Refits of the bootstrap; 0 for none.
        seed: Seed of the bootstrap.

    Raises:
        UserError: The arm or the law is not known, or the runs are too few.
    """
    form = LAWS.row(law)
    table = check_table(table, columns=form.columns)
    name, arm = table.name, table.only_arm(arm)
    checkpoints = form.uses_checkpoints if checkpoints is None else checkpoints
    cells = select(table, (arm,), ends_only=not checkpoints)
    rows = cells.rows
    if len(rows.loss) < max(form.size, 3):
        raise UserError(
            f"{name}: arm {arm} has {len(rows.loss)} usable runs, and {form.label} has {form.size} parameters. Fit a law "
            "with fewer (power has 2), or finish more runs."
        )
    if objective == "robust":
        objective = tied_to_scale(form, rows)
    objective = objective or form.objective
    fitted = solve(form, rows, objective)
    fit = describe(fitted, law, rows, arm=arm, numbers=cells.numbers.tolist(), objective=objective)
    if fit.status == "failed":
        raise UserError(f"{name}: these runs carry no law {law}. {fit.remark} Fit another.")
    groups, clustered = _units(table, cells)
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


def resampled_laws(
    table: RunsTable | pd.DataFrame, law: str, arm: str, *, resamples: int = 4000, seed: int = 0
) -> tuple[dict[str, Array], dict[str, float]]:
    """Parameters of resampled laws, an array of shape ``(resamples,)`` each, and those of the fit itself."""
    form = LAWS.row(law)
    table = check_table(table, columns=form.columns)
    cells = select(table, (arm,), ends_only=not form.uses_checkpoints)
    fitted = solve(form, cells.rows, form.objective)
    draws = bootstrap(fitted, _units(table, cells)[0], resamples=resamples, seed=seed)
    return fitted.layout.draws(draws), fitted.law().parameters()


def _units(table: RunsTable, cells: Cells) -> tuple[NDArray[np.intp], bool]:
    """Groups to resample, and whether they are runs with several rows each; otherwise they are cells."""
    run = run_of(table.frame.loc[cells.numbers - 1]).factorize()[0]
    clustered = bool(run.max() + 1 < len(run))
    return (run if clustered else cells.cell), clustered


def _parameters(fitted: Minimum, draws: Array) -> list[Parameter]:
    columns = fitted.layout.draws(draws)
    return [
        Parameter(
            name=name,
            value=value,
            error=float(np.std(columns[name])),
            low=float(np.quantile(columns[name], 0.025)),
            high=float(np.quantile(columns[name], 0.975)),
        )
        for name, value in fitted.law().parameters().items()
    ]


def _variants(fitted: Minimum, rows: Rows, used: Objective) -> list[Variant]:
    if len(rows.loss) > MAX_ROWS_FOR_VARIANTS:
        return []
    form = fitted.layout.form
    tried = [Objective(function="huber", delta=delta) for delta in VARIANT_DELTAS]
    tried += [Objective(space="log"), Objective(space="loss"), Objective(function="huber", delta=1e-3, space="loss")]
    tried += [Objective(function="absolute")] if len(rows.loss) <= MAX_ROWS_FOR_ABSOLUTE else []
    named = {other.describe(): other for other in tried if other != used}
    tied = tied_to_scale(form, rows)
    named[f"{tied.describe()}, {EFFICIENT_DELTA} robust scales of the residuals"] = tied
    return [Variant(objective=name, law=solve(form, rows, other, best_of=4).law()) for name, other in named.items()]


def _influence(fitted: Minimum, numbers: NDArray[np.intp], groups: NDArray[np.intp]) -> list[Influence]:
    names, inverse = np.unique(groups, return_inverse=True)
    if len(names) > MAX_POINTS_FOR_INFLUENCE or len(names) <= fitted.layout.size:
        return []
    columns = fitted.layout.draws(refit(fitted, inverse, 1.0 - np.eye(len(names))))
    whole = fitted.law().parameters()
    r = fitted.log_residuals()
    moves = {key: columns[key] - whole[key] for key in whole}
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
    """Number of independent rows with the same information: rows over the design effect of correlation within groups.

    With intraclass correlation rho and group sizes m, the design effect is ``1 + rho * (sum(m^2) / sum(m) - 1)`` (Kish 1965).
    """
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
