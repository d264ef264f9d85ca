"""Resampled laws as they scatter, and what each point does to the fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import LOOKS, MUTED, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.data.cells import Array
    from analysis.single_arm.fit_arm import ArmFit

NAMES = {"alpha": "α", "beta": "β"}


def posterior_pairs(draws: dict[str, Array], centre: dict[str, float]) -> Figure:
    """Each pair of a law's numbers over resamples of the runs; crosses mark the fit.

    Args:
        draws: One array a number, whole laws in the same order (`analysis.single_arm.fit_arm.resampled_laws`). Constants far from 1 are
            drawn as logarithms.
        centre: The fit's own numbers.
    """
    names = [name for name in draws if name in centre and not name.startswith("a =")]
    values, points, labels = [], [], []
    for name in names:
        log = name in ("A", "B", "scale")
        values.append(np.log(np.clip(draws[name], 1e-300, None)) if log else draws[name])
        points.append(np.log(centre[name]) if log else centre[name])
        labels.append(f"ln {NAMES.get(name, name)}" if log else NAMES.get(name, name))
    size = len(names)
    with styled():
        figure = new_figure(1.45 * size + 0.6, 1.45 * size + 0.4)
        grid = figure.subplots(size, size, squeeze=False)
        for i in range(size):
            for j in range(size):
                axes = grid[i, j]
                if j > i:
                    axes.set_visible(False)
                    continue
                low, high = np.quantile(values[j], [0.002, 0.998])
                if i == j:
                    axes.hist(values[i].clip(low, high), bins=40, color=LOOKS[0].colour, alpha=0.8, linewidth=0)
                    axes.axvline(points[i], color="black", linewidth=0.8)
                    axes.set_yticks([])
                else:
                    axes.plot(
                        values[j],
                        values[i],
                        linestyle="",
                        marker=".",
                        markersize=1.5,
                        alpha=0.25,
                        color=LOOKS[0].colour,
                        rasterized=True,
                    )
                    axes.plot([points[j]], [points[i]], marker="+", color="black", markersize=9, markeredgewidth=1.2)
                    axes.set_ylim(*np.quantile(values[i], [0.002, 0.998]))
                axes.set_xlim(low, high)
                axes.locator_params(axis="x", nbins=3)
                if i != j:
                    axes.locator_params(axis="y", nbins=3)
                axes.tick_params(labelsize=7, labelbottom=i == size - 1, labelleft=j == 0 and i > 0)
                if i == size - 1:
                    axes.set_xlabel(labels[j])
                if j == 0 and i > 0:
                    axes.set_ylabel(labels[i])
    return figure


def influence_plot(found: ArmFit, name: str = "") -> Figure:
    """How far each point moves one number of the law when it is left out, against its residual.

    Args:
        found: A fit with influences.
        name: Which number; the last exponent when not given.
    """
    moves = [(item.row, 100.0 * (np.exp(item.residual) - 1.0), item.moves) for item in found.influence]
    chosen = name or [key for key in moves[0][2] if not key.startswith("a =")][-1]
    with styled():
        figure = new_figure(5.2, 3.2)
        axes = figure.subplots()
        x = np.array([residual for _, residual, _ in moves])
        y = np.array([change[chosen] for _, _, change in moves])
        axes.axhline(0.0, color=MUTED, linewidth=0.7)
        axes.axvline(0.0, color=MUTED, linewidth=0.7)
        axes.plot(x, y, linestyle="", marker="o", markersize=3.5, color=LOOKS[0].colour, alpha=0.8, markeredgewidth=0)
        for at in np.argsort(-np.abs(y), kind="stable")[:5]:
            axes.annotate(
                f"row {moves[at][0]}", (x[at], y[at]), xytext=(4, 3), textcoords="offset points", fontsize=7.5
            )
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel("residual of the point (%)")
        axes.set_ylabel(f"change of {NAMES.get(chosen, chosen)} without it")
    return figure
