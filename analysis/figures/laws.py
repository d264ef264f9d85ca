"""Loss against compute: the runs, their laws, and the residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures.style import (
    EXTRAPOLATION_DASHES,
    MUTED,
    arm_label,
    compute_axis,
    look,
    new_figure,
    plain_log_axis,
    styled,
)
from analysis.fitting.laws import PowerLaw
from analysis.ratio.compare import Comparison
from analysis.ratio.formatting import law_math, ratio_text
from analysis.ratio.match import compute_law
from analysis.ratio.study import Study

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled()
def loss_against_compute(study: Study, frame: pd.DataFrame, comparison: Comparison | None = None) -> Figure:
    """Runs of a comparison's two arms with their laws, and the residuals below.

    Args:
        study: Gives every arm its look.
        frame: The checked table; only rows that the fits used are drawn.
        comparison: Which pair; the first when not given.
    """
    comparison = comparison or study.comparisons[0]
    figure = new_figure(5.6, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1.0))
    highs = [fit.compute_range[1] for fit in comparison.fits.values()]
    label, factor = compute_axis(max(highs))
    for arm in comparison.fits:
        _draw_arm(study, frame, comparison, arm, upper, lower, factor)
    _arrow(comparison, upper, factor)
    low = min(fit.compute_range[0] for fit in comparison.fits.values())
    highs += [comparison.rungs[-1].baseline_compute] if comparison.rungs else []
    left, right = low / 1.5 * factor, min(max(highs), 6 * max(highs[:2])) * 1.6 * factor
    losses = [value for fit in comparison.fits.values() for value in fit.loss_range]
    laws = [compute_law(fit.law).loss(right / factor) for fit in comparison.fits.values()]
    bottom, top = min([*losses, *laws]) * 0.99, max(losses) * 1.015
    upper.set(xlim=(left, right), ylim=(bottom, top), ylabel="loss (nats per token)")
    plain_log_axis(upper, "x", span=right / left)
    plain_log_axis(upper, "y", span=top / bottom)
    for text in upper.legend(loc="upper right").get_texts():
        text.set_parse_math(True)
    lower.axhline(0.0, color=MUTED, linewidth=0.7)
    lower.set(xlabel=label, ylabel="residual (%)")
    plain_log_axis(lower, "x", span=right / left)
    return figure


def _draw_arm(
    study: Study, frame: pd.DataFrame, comparison: Comparison, arm: str, upper: Axes, lower: Axes, factor: float
) -> None:
    fit, band, dress = comparison.fits[arm], comparison.bands[arm], look(study.arms, arm)
    law = compute_law(fit.law)
    used = frame.loc[[row - 1 for row in fit.rows]]
    compute = used["flops"].to_numpy(dtype=np.float64) / 8.64e19
    many = len(used) > 60
    size = 3.0 if many else 5.0
    points = {**dress.points, "alpha": 0.5 if many else 1.0, "rasterized": len(used) > 2000}
    edge: dict[str, Any] = {"markeredgewidth": 0.0 if many else 0.5, "markeredgecolor": "white"}
    upper.plot(compute * factor, used["loss"], **points, **edge, markersize=size, zorder=3)
    x = np.array(band.compute)
    upper.fill_between(x * factor, band.low, band.high, color=dress.colour, alpha=0.13, linewidth=0.0)
    low, high = fit.compute_range
    dense = np.geomspace(low, high, 60)
    line: dict[str, Any] = {"color": dress.colour, "linewidth": 1.4}
    upper.plot(dense * factor, law.loss(dense), **line)
    label = arm_label(arm).replace("$", r"\$") + f": {law_math(law_in_units(law, factor))}"
    upper.plot(
        [], [], **line, marker=dress.marker, markersize=5.0, markeredgecolor="white", markeredgewidth=0.5, label=label
    )
    for side in (x[x <= low], x[x >= high]):
        beyond = np.sort(np.append(side, low if len(side) and side[0] < low else high))
        upper.plot(beyond * factor, law.loss(beyond), color=dress.colour, linewidth=1.1, dashes=EXTRAPOLATION_DASHES)
    if not many and len(np.unique(compute)) == len(compute):
        points["linestyle"] = ":"
    residuals = 100.0 * (np.exp(fit.residuals) - 1.0)
    lower.plot(compute * factor, residuals, **points, linewidth=0.8, markersize=size - 1.0)


def law_in_units(law: PowerLaw, factor: float) -> PowerLaw:
    """A law of compute in PFLOP/s-days as one of compute in a smaller unit, `factor` of which make a PFLOP/s-day.

    With ``C' = factor C`` the term ``scale C^-exponent`` is ``scale factor^exponent C'^-exponent``.
    """
    return PowerLaw(scale=law.scale * factor**law.exponent, exponent=law.exponent, floor=law.floor)


def _arrow(comparison: Comparison, axes: Axes, factor: float) -> None:
    point = comparison.headline
    ends = [point.challenger_compute * factor, point.baseline_compute * factor]
    axes.annotate(
        "",
        xy=(ends[0], point.loss),
        xytext=(ends[1], point.loss),
        arrowprops={"arrowstyle": "-|>", "color": "#222222", "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        zorder=4,
    )
    low, high = point.low, point.high
    interval = "" if low is None or high is None else f" [{ratio_text(low)}, {ratio_text(high)}]"
    axes.annotate(
        f"×{ratio_text(point.ratio)}{interval} FLOPs",
        xy=(min(ends), point.loss),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.0,
    )
