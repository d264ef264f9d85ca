"""Arms at one budget: final losses side by side, and the difference to the baseline along the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import MUTED, arm_handles, arm_label, look, new_figure, short_counts, styled
from analysis.single_arm.same_budget import BudgetOutcome
from scaling.units import human

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_BANDS = 4
"""Arms whose intervals are drawn as bands along the run; more bands hide each other and the lines."""


@styled()
def final_losses(found: Sequence[BudgetOutcome], arms: Sequence[str], rung: str) -> Figure:
    """One line an arm: the mean held-out loss, its interval over seeds as a bar, the baseline as a line through all.

    Args:
        found: As `analysis.single_arm.same_budget.outcomes` returns them.
        arms: All arms of the study; their order sets the looks.
        rung: The rung drawn.
    """
    here = [outcome for outcome in found if outcome.rung == rung]
    figure = new_figure(4.6, 0.6 + 0.27 * len(here))
    axes = figure.add_subplot()
    places = np.arange(len(here))[::-1]
    base = here[0].loss
    axes.axvline(base, color=MUTED, linewidth=0.8, linestyle="--")
    for place, outcome in zip(places, here, strict=True):
        dress = look(arms, outcome.arm)
        if outcome.low is not None and outcome.high is not None:
            # The interval of the paired difference, drawn about the baseline that it belongs to.
            axes.plot([base + outcome.low, base + outcome.high], [place] * 2, color=dress.colour, linewidth=1.6)
        at = base + outcome.difference if outcome.difference is not None else outcome.loss
        axes.plot(at, place, dress.marker, color=dress.colour, markersize=5)
    axes.set_yticks(places, [arm_label(outcome.arm) for outcome in here])
    axes.grid(visible=False, axis="y")
    xlabel = f"held-out loss after {human(here[0].tokens)} tokens (nats per token)"
    axes.set(ylim=(-0.6, len(here) - 0.4), xlabel=xlabel)
    return figure


@styled()
def gap_curves(table: pd.DataFrame, arms: Sequence[str], rung: str) -> Figure:
    """Held-out loss minus the baseline's against tokens, with 95 % intervals over seeds where there are few arms.

    Args:
        table: As `analysis.single_arm.same_budget.gaps` returns it.
        arms: All arms of the study, the baseline first; their order sets the looks.
        rung: The rung drawn.
    """
    here, baseline = table[table["rung"] == rung], arms[0]
    shown = [arm for arm in arms if arm == baseline or (here["arm"] == arm).any()]
    figure = new_figure(5.2, 2.9 + 0.2 * (len(shown) // 3))
    axes = figure.add_subplot()
    axes.axhline(0.0, color=look(arms, baseline).colour, linewidth=1.2)
    for arm in shown:
        if arm == baseline:
            continue
        own = here[here["arm"] == arm]
        dress = look(arms, arm)
        axes.plot(own["tokens"], own["gap"], **dress.marked_line, markersize=3.5, linewidth=1.2)
        if len(shown) <= MAX_BANDS + 1:
            axes.fill_between(own["tokens"], own["low"], own["high"], color=dress.colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_formatter(short_counts)
    ylabel = f"held-out loss minus {arm_label(baseline)}'s\n(nats per token)"
    axes.set(xlim=(0, None), xlabel="tokens", ylabel=ylabel)
    figure.legend(handles=arm_handles(arms, shown), loc="outside lower center", ncols=3)
    return figure
