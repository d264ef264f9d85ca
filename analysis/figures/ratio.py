"""The match ratio as a curve, grey where a law is beyond its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import (
    EXTRAPOLATION_DASHES,
    MUTED,
    arm_handles,
    arm_label,
    compute_axis,
    look,
    new_figure,
    plain_log_axis,
    styled,
)
from analysis.ratio.compare import Comparison
from analysis.ratio.formatting import ratio_text
from analysis.ratio.match import compute_law
from analysis.ratio.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled()
def ratio_curve(study: Study) -> Figure:
    """Challenger over baseline compute at equal loss against the baseline's compute, one curve a challenger."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    label, factor = compute_axis(max(comparison.headline.baseline_compute for comparison in study.comparisons))
    shown = [_draw(study, comparison, axes, factor) for comparison in study.comparisons]
    left, right = min(s[0] for s in shown), max(s[1] for s in shown)
    bottom, top = min(s[2] for s in shown), max(s[3] for s in shown)
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    bottom, top = min(bottom / 1.12, 0.97), max(top * 1.06, 1.03)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    plain_log_axis(axes, "x", span=right / left)
    plain_log_axis(axes, "y", span=top / bottom)
    baseline = arm_label(study.baseline)
    axes.set(xlabel=f"{baseline}'s {label}", ylabel=f"FLOPs to match the loss,\nrelative to {baseline}")
    axes.annotate(
        f"equal to {baseline}",
        xy=(1.0, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=7.5,
    )
    handles = [
        *arm_handles(study.arms, [comparison.challenger for comparison in study.comparisons]),
        Patch(color=MUTED, alpha=0.3, linewidth=0.0, label="95 % interval"),
        Line2D([], [], color=MUTED, linewidth=1.1, dashes=EXTRAPOLATION_DASHES, label="beyond the runs"),
        Line2D([], [], color=MUTED, linewidth=0.6, label="other laws through the same runs"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw(study: Study, comparison: Comparison, axes: Axes, factor: float) -> tuple[float, float, float, float]:
    dress = look(study.arms, comparison.challenger)
    points = comparison.curve
    x = np.array([point.baseline_compute for point in points]) * factor
    ratio = np.array([point.ratio for point in points])
    low = np.array([np.nan if point.low is None else point.low for point in points])
    high = np.array([np.nan if point.high is None else point.high for point in points])
    inside = np.array([point.support == "interpolated" for point in points])
    edges = inside | np.roll(inside, 1) | np.roll(inside, -1)
    axes.fill_between(x, low, high, where=np.isfinite(low), color=MUTED, alpha=0.13, linewidth=0.0)
    axes.fill_between(x, low, high, where=edges & np.isfinite(low), color=dress.colour, alpha=0.2, linewidth=0.0)
    _other_laws(comparison, axes, factor, dress.colour)
    axes.plot(x, ratio, color=MUTED, linewidth=1.1, dashes=EXTRAPOLATION_DASHES)
    axes.plot(x[inside], ratio[inside], **dress.line, linewidth=1.8)
    head = comparison.headline
    at = (head.baseline_compute * factor, head.ratio)
    axes.plot(*at, **dress.points, markersize=6, markeredgecolor="white", zorder=4)
    axes.annotate(
        ratio_text(head.ratio),
        xy=at,
        xytext=(5, -11),
        textcoords="offset points",
        color=dress.colour,
        fontsize=8.5,
        fontweight="bold",
    )
    near = ratio[inside] if inside.any() else np.array([head.ratio])
    band = np.concatenate([low[inside], high[inside]])
    band = band[np.isfinite(band)]
    ends = np.concatenate([near, band.clip(near.min() / 4, near.max() * 4), [head.ratio]])
    return x.min(), min(x.max(), x[inside].max() * 12 if inside.any() else x.max()), ends.min(), ends.max()


def _other_laws(comparison: Comparison, axes: Axes, factor: float, colour: str) -> None:
    """The curve under every other family as a thin line, because the band does not include that spread."""
    losses = np.array([point.loss for point in comparison.curve])
    for model in comparison.models:
        laws = [compute_law(model.laws[arm]) for arm in (comparison.baseline, comparison.challenger)]
        reached = losses[losses > max(law.floor for law in laws) + 1e-9]
        if model.family == comparison.family or min(law.exponent for law in laws) <= 0 or len(reached) < 2:
            continue
        baseline, challenger = (law.compute(reached) for law in laws)
        axes.plot(baseline * factor, challenger / baseline, color=colour, alpha=0.7, linewidth=0.6, zorder=1.5)
