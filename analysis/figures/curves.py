"""Training curves: loss against tokens, one panel a rung."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.data.cells import Array
from analysis.figures.style import arm_handles, look, panel_grid, plain_log_axis, short_counts, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 6
MAX_LINES = 20
"""Runs of one arm drawn in one panel; more cannot be distinguished and take minutes."""
WINDOWS_PER_RUN = 25
"""A smoothed line is a moving mean over this fraction of a run's logged rows; the rows themselves are drawn faintly."""


@styled()
def training_curves(curves: pd.DataFrame, arms: list[str]) -> Figure:
    """Training loss as lines, smoothed, and held-out loss as points, for the largest rungs.

    Args:
        curves: Columns arm, rung, run, tokens, train_loss, validation_loss; loss in nats per token.
        arms: All arms of the study; their order sets the looks.
    """
    curves = curves[curves["arm"].isin(arms)]
    longest = curves.groupby("rung", sort=False)["flops" if "flops" in curves else "tokens"].max()
    rungs = list(longest.sort_values(kind="stable").index[-MAX_PANELS:])
    columns = 2 if len(rungs) == 4 else min(len(rungs), 3)
    labels = ("tokens", "loss (nats per token)")
    figure, grid = panel_grid(len(rungs), columns=columns, size=(2.5, 2.1), handles=arm_handles(arms), labels=labels)
    for axes, rung in zip(grid, rungs, strict=True):
        part = curves[curves["rung"] == rung]
        values = []
        for arm in arms:
            dress = look(arms, arm)
            for _, run in some_runs(part[part["arm"] == arm], "run").groupby("run", sort=True):
                run = run.sort_values("tokens", kind="stable")
                train = run[run["train_loss"].notna()]
                window = -(-len(train) // WINDOWS_PER_RUN)
                smooth = train["train_loss"].rolling(window, center=True, min_periods=1).mean()
                axes.plot(train["tokens"], train["train_loss"], color=dress.colour, linewidth=0.4, alpha=0.25)
                axes.plot(train["tokens"], smooth, **dress.line, linewidth=1.0)
                held = run[run["validation_loss"].notna()]
                axes.plot(held["tokens"], held["validation_loss"], **dress.points, markersize=3.5)
                values += [train["train_loss"].to_numpy(), held["validation_loss"].to_numpy()]
        _scale(axes, part, np.concatenate([*values, np.array([])]))
        axes.set_title(str(rung), loc="left")
    return figure


def some_runs(own: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows of at most `MAX_LINES` runs, evenly chosen in the order of their names in the column `key`."""
    runs = np.sort(own[key].unique())
    if len(runs) <= MAX_LINES:
        return own
    return own[own[key].isin(runs[np.linspace(0, len(runs) - 1, MAX_LINES).round().astype(int)])]


def _scale(axes: Axes, part: pd.DataFrame, values: Array) -> None:
    tokens = part["tokens"].to_numpy(dtype=np.float64)
    tokens = tokens[tokens > 0]
    if len(tokens) and len(values):
        right, left = tokens.max() * 1.1, max(tokens.min(), tokens.max() / 50) * 0.9
        axes.set_xlim(left, right)
        bottom, top = float(values.min()), float(np.quantile(values, 0.98))
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.1 * (top - bottom))
        plain_log_axis(axes, "x", span=right / left, small=True)
        axes.xaxis.set_major_formatter(short_counts)
