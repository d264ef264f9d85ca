"""Held-out prediction: laws fitted without the largest rungs, and the scores of their predictions there.

The interval is for a run, not for the law: it adds the noise of one more run to the error of the fit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis.data.cells import Array, Cells, select
from analysis.data.table import RunsTable, check_table
from analysis.fitting.fit import judge, solve
from analysis.fitting.laws import LAWS, Law, LawForm
from analysis.fitting.solver import Problem, predict
from analysis.ratio.study import check_computes, choose_arms, is_ladder
from analysis.uncertainty.intervals import MIN_FREEDOM, ROUNDING, gradient, linear, t_quantile
from scaling.errors import UserError
from scaling.io import Strict
from scaling.units import FLOPS_PER_PFLOPS_DAY, pflops_days

if TYPE_CHECKING:
    import pandas as pd


class Prediction(Strict, frozen=True):
    """One held-out point under one law."""

    arm: str
    form: str
    law: Law
    fitted_runs: int
    largest_fitted: float
    """PFLOP/s-days."""
    compute: float
    """PFLOP/s-days of the held-out point."""
    predicted: float
    low: float | None
    high: float | None
    observed: float
    """Mean loss of the held-out runs at this point."""
    runs: int
    error: float
    """ln(observed / predicted); negative where the run did better than predicted."""
    inside: bool | None
    """True if the observation is in the interval; None without one."""
    remark: str


class Holdout(Strict, frozen=True):
    """Predictions of the larger runs from the smaller ones."""

    table: str
    rungs: int
    predictions: list[Prediction]


def hold_out(
    table: RunsTable | pd.DataFrame, *, rungs: int = 1, baseline: str | None = None, challenger: str | None = None
) -> Holdout:
    """Fit each arm without its largest rungs, and score the prediction of them.

    Args:
        table: A table of runs, checked or not.
        rungs: Number of computes, from the largest, that are held out in all arms.
        baseline: As in ``analysis.ratio.study.fit_table``.
        challenger: As in ``fit_table``.

    Raises:
        UserError: Fewer than three computes would remain in an arm.
    """
    table = check_table(table)
    name = table.name
    arms = choose_arms(table, baseline, challenger) if len(table.arms) > 1 else tuple(table.arms)
    for arm in arms:
        check_computes(table, arm)
    ladder = is_ladder(table, arms)
    everything = select(table, arms)
    levels = np.unique(everything.rung)
    if rungs < 1:
        raise UserError(f"{name}: found {rungs} rungs to hold out; at least one rung is left out. Give 1 or more.")
    if len(levels) - rungs < 3:
        raise UserError(
            f"{name}: {len(levels)} distinct computes, and holding out {rungs} leaves {max(len(levels) - rungs, 0)}; a law needs "
            "at least 3 to be fitted. Hold out fewer, or train more sizes."
        )
    held = levels[-rungs:]
    predictions = []
    for number, arm in enumerate(arms):
        own = everything.rows.arm == number
        kept, later = own & ~np.isin(everything.rung, held), own & np.isin(everything.rung, held)
        if len(np.unique(everything.rung[kept])) < 3:
            raise UserError(
                f"{name}: without its largest {rungs} arm {arm} has fewer than 3 distinct computes. Hold out fewer."
            )
        if not later.any():
            continue
        for form, row in LAWS.items():
            if row.design == ("ladder" if ladder else "grid") and kept.sum() > row.size:
                predictions += _predict(everything, kept, later, arm, form, row)
    return Holdout(table=name, rungs=rungs, predictions=predictions)


def _predict(
    cells: Cells, kept: NDArray[np.bool_], later: NDArray[np.bool_], arm: str, form: str, row: LawForm
) -> list[Prediction]:
    rows = cells.rows._replace(arm=np.zeros(len(cells.rows.loss), dtype=np.intp))
    fitted = solve(row, rows.take(kept), row.objective)
    own = cells._replace(rows=rows.take(kept), cell=cells.cell[kept], rung=cells.rung[kept], arms=(arm,))
    spread = linear(fitted, own)
    flops, found = cells.rows.columns["flops"], []
    for rung in np.unique(cells.rung[later]):
        here = later & (cells.rung == rung)
        problem = fitted.layout.problem(rows.take(here), space="log", delta=None)
        log_loss = _mean_log_loss(fitted.theta, problem)[0]
        error = spread.spread(gradient(partial(_mean_log_loss, problem=problem), fitted.theta))[0][0]
        half = None
        if spread.freedom >= MIN_FREEDOM:
            noise = float(spread.noise[0, 0]) / here.sum()
            half = float(t_quantile(spread.freedom)) * float(np.sqrt(error**2 + noise))
            half = half if half > ROUNDING else None
        observed = float(np.exp(np.log(cells.rows.loss[here]).mean()))
        miss = float(np.log(observed) - log_loss)
        found.append(
            Prediction(
                arm=arm,
                form=form,
                law=fitted.law(),
                fitted_runs=int(kept.sum()),
                largest_fitted=pflops_days(float(flops[kept].max())),
                compute=pflops_days(float(np.exp(np.log(flops[here]).mean()))),
                predicted=float(np.exp(log_loss)),
                low=None if half is None else float(np.exp(log_loss - half)),
                high=None if half is None else float(np.exp(log_loss + half)),
                observed=observed,
                runs=int(here.sum()),
                error=miss,
                inside=None if half is None else abs(miss) <= half,
                remark=judge(fitted)[1],
            )
        )
    return found


def _mean_log_loss(theta: Array, problem: Problem) -> Array:
    return np.array([predict(problem, theta[None])[0][0].mean()])


def holdout_text(holdout: Holdout) -> str:
    """The predictions as lines for the terminal."""
    lines = [f"{holdout.table}: fitted without the largest {holdout.rungs} of the computes."]
    for p in holdout.predictions:
        interval = "no interval" if p.low is None or p.high is None else f"95 % {p.low:.4f} to {p.high:.4f}"
        verdict = "" if p.inside is None else ", inside" if p.inside else ", OUTSIDE"
        lines.append(
            f"  {p.arm}, {LAWS[p.form].label}: at {p.compute * FLOPS_PER_PFLOPS_DAY:.3g} FLOPs ({p.compute / p.largest_fitted:.2g} "
            f"times beyond) predicted {p.predicted:.4f} ({interval}), observed {p.observed:.4f}: "
            f"{100 * p.error:+.2f} %{verdict}." + (f" {p.remark}" if p.remark else "")
        )
    return "\n".join(lines)
