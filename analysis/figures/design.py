"""Width of the interval against cost: every simulated design, and the narrowest for their cost by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.figures.style import COLOURS, MARKERS, MUTED, arm_label, new_figure, plain_log_axis, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.power.forecast import DesignForecast

MAX_NAMED_DESIGNS = 6
"""Designs of the frontier that are named in the figure; the table has all."""


@styled()
def width_against_cost(answer: DesignForecast) -> Figure:
    """Designs as points, the frontier as a line with its designs numbered and named below, the plan as a square."""
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    rows = [row for row in answer.searched if row.width is not None]
    hours, widths = [row.hours for row in rows], [row.width or 0.0 for row in rows]
    axes.plot(hours, widths, ".", color="#c4c4c4", markersize=3, label="designs")
    front = answer.frontier
    best_hours, best_widths = [row.hours for row in front], [row.width or 0.0 for row in front]
    label = "narrowest for their cost"
    axes.plot(best_hours, best_widths, color=COLOURS[0], marker="o", markersize=4, linewidth=1.2, label=label)
    hours.append(answer.plan.hours)
    if answer.plan.width is not None:
        widths.append(answer.plan.width)
        label = f"as planned: {answer.plan.design}"
        axes.plot(hours[-1], widths[-1], MARKERS[1], color=COLOURS[1], markersize=7, label=label)
    step = max(1, -(-len(front) // MAX_NAMED_DESIGNS))
    for number, row in enumerate(front[::-1][::step][::-1], 1):
        axes.plot([], [], " ", label=f"{number}  {row.design}")
        at = (row.hours, row.width or 0.0)
        axes.annotate(str(number), at, xytext=(4, 5), textcoords="offset points", color=COLOURS[0])
    if answer.wanted is not None:
        axes.axhline(answer.wanted, color=MUTED, linewidth=0.8, linestyle="--", label=f"wanted: {answer.wanted:g}")
    if answer.budget is not None:
        axes.axvline(answer.budget, color=MUTED, linewidth=0.8, linestyle=":", label=f"budget: {answer.budget:g} h")
    # Designs without degrees of freedom have intervals that only squeeze the others together.
    top = min(max(widths), 30.0 * min(widths)) * 1.15
    plain_log_axis(axes, "x", span=max(hours) / min(hours))
    plain_log_axis(axes, "y", span=top / min(widths))
    axes.set_ylim(min([*widths, answer.wanted or max(widths)]) / 1.15, top)
    ylabel = f"width of the 95 % interval of the ratio\nat the loss of {answer.target_rung}"
    axes.set(xlabel="GPU-hours (on a CPU: hours of runs)", ylabel=ylabel)
    arms = f"{arm_label(answer.challenger)} against {arm_label(answer.baseline)}"
    axes.set_title(f"{answer.campaign}: {arms}", loc="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1, fontsize=7)
    return figure
