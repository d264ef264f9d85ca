"""Definitions of "the ratio" in papers, each under its own name.

One set of ten runs gives 0.44 to 0.54, depending on the loss and on the method. A `Definition` holds both.
"""

from __future__ import annotations

import numpy as np

from analysis.data.cells import SAME_COMPUTE, Array, Cells
from analysis.fitting.fit import Fit
from analysis.ratio.match import Extrapolation, at_loss, support
from analysis.uncertainty.intervals import ROUNDING
from analysis.uncertainty.paired import Difference, cell_means
from scaling.io import Strict
from scaling.units import pflops_days


class Definition(Strict, frozen=True, kw_only=True):
    """One way to read a ratio off the runs."""

    name: str
    text: str
    """Method, in a sentence."""
    ratio: float
    low: float | None = None
    high: float | None = None
    interval: str = ""
    """Method of `low` and `high`; empty where there are none."""
    loss: float
    baseline_compute: float
    """PFLOP/s-days."""
    challenger_compute: float
    support: Extrapolation


Point = tuple[float, float, float]
"""A loss, and the compute (PFLOP/s-days) of the baseline and of the challenger there."""

ARROW = "paper's arrow"
"""Name of Moonlight's own definition."""


def arrow(baseline: Fit, challenger: Fit, cells: Cells) -> Definition | None:
    """Moonlight's rule: ``(L_challenger / L_baseline) ** (1 / exponent of the baseline)`` at the largest shared cell.

    One pair of runs and one fitted exponent. None where the arms share no cell or the baseline's law has a floor.
    """
    law = baseline.law.frontier()
    if law.floor or not len(cells.paired):
        return None
    one, x = cell_means(cells, 0)
    two, other = cell_means(cells, 1)
    same = np.abs(x - other) <= SAME_COMPUTE
    if not same.any():
        return None
    # With several seeds the largest compute has several cells; their mean counts.
    top = x[same] >= x[same].max() - SAME_COMPUTE
    gap = float((two[same][top] - one[same][top]).mean())
    compute, loss = float(np.exp(x[same][top].mean())), float(np.exp(two[same][top].mean()))
    ratio = float(np.exp(gap / law.exponent))
    return Definition(
        name=ARROW,
        text="(challenger's loss / baseline's loss)^(1 / baseline's exponent) for the pair of runs at the largest "
        "compute that both arms have: one pair, not two laws (Moonlight, arXiv:2502.16982, Fig. 1a)",
        ratio=ratio,
        loss=loss,
        baseline_compute=compute / ratio,
        challenger_compute=compute,
        support=support(baseline, challenger, compute / ratio, compute),
    )


def at_largest(baseline: Fit, challenger: Fit, difference: Difference | None) -> list[Definition]:
    """The laws read at the largest run of each arm.

    At the challenger's, under laws without a floor, with the t interval of the paired difference line: the exponent of
    the baseline's law is then taken as it was fitted. Under a floor the differences of log loss follow no line.
    """
    b, c = baseline.law.frontier(), challenger.law.frontier()
    found = []
    for arm, law, fit in (("challenger", c, challenger), ("baseline", b, baseline)):
        loss = law.loss(fit.compute_range[1])
        if loss <= max(b.floor, c.floor):
            continue
        point = at_loss(baseline, challenger, loss)
        low, high, interval = None, None, ""
        if difference is not None and arm == "challenger" and not b.floor and not c.floor:
            half = difference.at(point.challenger_compute)[1]
            moved = [loss * float(np.exp(sign * half)) for sign in (-1.0, 1.0)]
            if half > ROUNDING and min(moved) > b.floor:
                low, high = (point.challenger_compute / b.compute(value) for value in moved)
                interval = "t interval of the paired difference line, the baseline's exponent taken as fitted"
        found.append(
            Definition(
                name=f"laws at the {arm}'s largest run",
                text=f"the two fitted laws at the loss that the {arm}'s law has at its largest compute",
                ratio=point.ratio,
                low=low,
                high=high,
                interval=interval,
                loss=loss,
                baseline_compute=point.baseline_compute,
                challenger_compute=point.challenger_compute,
                support=point.support,
            )
        )
    return found


def from_runs(baseline: Fit, challenger: Fit, cells: Cells) -> list[Definition]:
    """Definitions that use single runs, or lines fitted in another way."""
    texts = {
        _point_against_law: (
            "run against law",
            "the compute of the challenger's largest run over what the baseline's law needs for that run's own loss",
        ),
        _log_lines: (
            "log-log lines",
            "straight lines through ln loss against ln compute by least squares, at the challenger's largest compute",
        ),
        _between_runs: (
            "between runs",
            "no law: the challenger's runs joined by straight lines in ln compute and ln loss, read at the loss of the "
            "baseline's largest run that they reach",
        ),
    }
    found = []
    for method, (name, text) in texts.items():
        point = method(baseline, challenger, cells)
        if point is None:
            continue
        loss, needed, spent = point
        found.append(
            Definition(
                name=name,
                text=text,
                ratio=spent / needed,
                loss=loss,
                baseline_compute=needed,
                challenger_compute=spent,
                support=support(baseline, challenger, needed, spent),
            )
        )
    return found


def _runs(cells: Cells, arm: int) -> tuple[Array, Array]:
    """Mean ln compute (PFLOP/s-days) and ln loss of one arm at each rung, by rising compute."""
    own = cells.rows.arm == arm
    x, y = np.log(pflops_days(1.0) * cells.rows.columns["flops"][own]), np.log(cells.rows.loss[own])
    _, rung = np.unique(cells.rung[own], return_inverse=True)
    counts = np.bincount(rung)
    return np.bincount(rung, weights=x) / counts, np.bincount(rung, weights=y) / counts


def _point_against_law(baseline: Fit, challenger: Fit, cells: Cells) -> Point | None:
    law, (x, y) = baseline.law.frontier(), _runs(cells, 1)
    loss = float(np.exp(y[-1]))
    if loss <= law.floor:
        return None
    return loss, law.compute(loss), float(np.exp(x[-1]))


def _log_lines(baseline: Fit, challenger: Fit, cells: Cells) -> Point | None:
    lines = []
    for arm in (0, 1):
        own = cells.rows.arm == arm
        x = np.log(pflops_days(1.0) * cells.rows.columns["flops"][own])
        lines.append(np.polyfit(x, np.log(cells.rows.loss[own]), 1))
    if max(lines[0][0], lines[1][0]) >= 0:
        return None
    at = float(np.log(challenger.compute_range[1]))
    level = float(np.polyval(lines[1], at))
    return float(np.exp(level)), float(np.exp((level - lines[0][1]) / lines[0][0])), float(np.exp(at))


def _between_runs(baseline: Fit, challenger: Fit, cells: Cells) -> Point | None:
    """No law: the challenger's runs joined by lines in ln C and ln L, at the lowest loss of the baseline's runs in range."""
    (bx, by), (cx, cy) = _runs(cells, 0), _runs(cells, 1)
    reached = np.flatnonzero((by >= cy.min()) & (by <= cy.max()))
    if not len(reached) or np.any(np.diff(cy) >= 0):
        return None
    at = reached[-1]
    x = float(np.interp(-by[at], -cy, cx))
    return float(np.exp(by[at])), float(np.exp(bx[at])), float(np.exp(x))
