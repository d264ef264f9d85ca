"""IsoFLOP valleys, and the loss surface with the optimal path across it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import MUTED, arm_label, look, new_figure, plain_log_axis, styled
from analysis.single_arm.isoflop import Allocations

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@styled()
def isoflop_valleys(found: Allocations, arms: list[str]) -> Figure:
    """Loss against parameters, one valley a compute; stars are minima, hollow ones stay out of the law."""
    from matplotlib import colormaps

    dress = look(arms, found.arm)
    figure = new_figure(5.6, 4.0)
    axes = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(found.valleys), 2)))
    for valley, shade in zip(found.valleys, shades, strict=False):
        axes.plot(valley.params, valley.losses, **{**dress.points, "color": shade}, markersize=4)
        x = np.log(valley.params)
        fit = np.polyfit(x - x.mean(), valley.losses, 2)
        dense = np.linspace(x[0] - 0.15, x[-1] + 0.15, 80)
        label = f"{valley.flops:.2g}".replace("e+", "e")
        axes.plot(np.exp(dense), np.polyval(fit, dense - x.mean()), color=shade, linewidth=1.0, label=label)
        if valley.params_optimal is not None and valley.loss_optimal is not None and valley.position != "outside":
            face, edge = (shade, "black") if valley.position == "interior" else ("white", shade)
            star = {"marker": "*", "color": shade, "markerfacecolor": face, "markeredgecolor": edge}
            axes.plot(valley.params_optimal, valley.loss_optimal, **star, markersize=10, markeredgewidth=0.5, zorder=4)
    optimal = [found.surface.optimum(valley.flops) for valley in found.valleys]
    params, minima = [point.params for point in optimal], [point.loss for point in optimal]
    axes.plot(params, minima, color="black", linewidth=1.0, linestyle="--", label="surface's optimum")
    every = np.concatenate([valley.params for valley in found.valleys])
    losses = np.concatenate([valley.losses for valley in found.valleys])
    plain_log_axis(axes, "x", span=every.max() / every.min())
    axes.set_ylim(losses.min() - 0.04 * np.ptp(losses), losses.max() + 0.06 * np.ptp(losses))
    axes.set(xlabel="parameters N", ylabel="loss (nats per token)")
    axes.legend(title="FLOPs", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5, title_fontsize=8)
    return figure


@styled()
def surface_contours(found: Allocations, frame: pd.DataFrame, arms: list[str]) -> Figure:
    """Lines of equal loss over parameters and tokens, the runs, and the path of best splits."""
    own = frame[(frame["arm"] == found.arm) & (frame["left_out"] == "")]
    params, tokens = own["params"].to_numpy(dtype=np.float64), own["tokens"].to_numpy(dtype=np.float64)
    figure = new_figure(5.0, 4.2)
    axes = figure.subplots()
    x = np.geomspace(params.min() / 1.6, params.max() * 1.6, 120)
    y = np.geomspace(tokens.min() / 1.6, tokens.max() * 1.6, 120)
    loss = found.surface.loss(x[None, :], y[:, None])
    levels = np.quantile(loss, np.linspace(0.02, 0.97, 12))
    lines = axes.contour(x, y, loss, levels=levels, cmap="Greys_r", linewidths=0.8)
    axes.clabel(lines, fmt="%.2f", fontsize=7)
    axes.plot(
        params,
        tokens,
        **look(arms, found.arm).points,
        markersize=3.5 if len(own) < 400 else 1.5,
        alpha=0.7,
        markeredgewidth=0,
        label=f"{arm_label(found.arm)}, {len(own):,} runs",
        rasterized=len(own) > 2000,
    )
    budgets = 6.0 * np.geomspace(params.min() * tokens.min(), params.max() * tokens.max(), 60)
    path = [found.surface.optimum(float(flops)) for flops in budgets]
    best_params, best_tokens = [point.params for point in path], [point.tokens for point in path]
    axes.plot(best_params, best_tokens, color="black", linewidth=1.3, label="best split of compute")
    for decade in range(int(np.floor(np.log10(budgets[0]))), int(np.ceil(np.log10(budgets[-1]))) + 1):
        axes.plot(x, 10.0**decade / 6.0 / x, color=MUTED, linewidth=0.5, linestyle=":")
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="parameters N", ylabel="tokens D")
    plain_log_axis(axes, "x", span=x[-1] / x[0])
    plain_log_axis(axes, "y", span=y[-1] / y[0])
    figure.legend(loc="outside lower center", ncols=2)
    return figure
