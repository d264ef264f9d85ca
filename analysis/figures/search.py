"""The search for settings: loss against peak learning rate, and the ratio against the number of trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures.style import MUTED, arm_handles, arm_label, look, new_figure, panel_grid, plain_log_axis, styled
from scaling.units import human

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_PANELS = 6


def has_bowls(frame: pd.DataFrame) -> bool:
    """True where some size was tried with three or more learning rates."""
    if "peak_lr" not in frame or not frame["peak_lr"].notna().any():
        return False
    usable = frame[frame["loss"].notna()]
    return bool((usable.groupby(["arm", "params"])["peak_lr"].nunique() >= 3).any())


@styled()
def learning_rate_bowls(frame: pd.DataFrame, arms: list[str]) -> Figure:
    """Points are the best run of a rate; the best rate is hollow where it is the smallest or the largest tried."""
    frame = frame[frame["arm"].isin(arms) & frame["loss"].notna() & frame["peak_lr"].notna()]
    tried = frame.groupby(["arm", "params"])["peak_lr"].nunique().reset_index()
    sizes = sorted({float(params) for params in tried.loc[tried["peak_lr"] >= 3, "params"]})[-MAX_PANELS:]
    shown = [arm for arm in arms if (tried["arm"] == arm).any()]
    handles, labels = arm_handles(arms, shown), ("peak learning rate", "loss (nats per token)")
    figure, grid = panel_grid(len(sizes), columns=min(len(sizes), 3), size=(2.4, 2.1), handles=handles, labels=labels)
    for axes, size in zip(grid, sizes, strict=True):
        for arm in shown:
            part = frame[(frame["arm"] == arm) & (frame["params"] == size)]
            if part["peak_lr"].nunique() < 2:
                continue
            best = part.groupby("peak_lr")["loss"].min()
            rates, losses = best.index.to_numpy(dtype=np.float64), best.to_numpy(dtype=np.float64)
            dress = look(arms, arm)
            axes.plot(rates, losses, **dress.marked_line, linewidth=1.0, markersize=3.5)
            low = int(np.argmin(losses))
            face, edge = ("white", dress.colour) if low in (0, len(losses) - 1) else (dress.colour, "black")
            best_look: dict[str, Any] = {
                "markersize": 8,
                "markerfacecolor": face,
                "markeredgecolor": edge,
                "markeredgewidth": 1.0,
            }
            axes.plot(rates[low], losses[low], marker=dress.marker, **best_look)
        rates = frame.loc[frame["params"] == size, "peak_lr"].to_numpy(dtype=np.float64)
        plain_log_axis(axes, "x", span=max(rates.max() / rates.min(), 1.5), small=True)
        axes.set_title(f"N = {human(size)}", loc="left")
    return figure


@styled()
def ratio_by_trials(budget: pd.DataFrame, arms: list[str]) -> Figure:
    """The match ratio against the number of trials that each arm had.

    Args:
        budget: As in `analysis.data.tuning.TuningTables`.
        arms: All arms of the study; their order sets the looks.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(5.2, 3.3)
    axes = figure.add_subplot()
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    for (arm, against), rows in budget.groupby(["arm", "against"], sort=False):
        rows = rows.sort_values("trials", kind="stable")
        dress = look(arms, str(arm))
        equal = against == "equal"
        label = f"as many as {arm_label(rows['baseline'].iloc[0])}" if equal else "all of its trials"
        line = {**dress.marked_line, "linestyle": "-" if equal else "--", "label": f"{arm_label(str(arm))}, {label}"}
        axes.plot(rows["trials"], rows["ratio"], **line, markersize=3.5, linewidth=1.2)
        if equal:
            axes.fill_between(rows["trials"], rows["low"], rows["high"], color=dress.colour, alpha=0.15, linewidth=0)
    shown = budget.loc[budget["trials"] > 1, ["low", "high"]]
    plain_log_axis(axes, "y", span=float(shown["high"].max() / shown["low"].min()) if len(shown) else 2.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trials for each arm at each rung", ylabel="FLOPs to match the baseline")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
