"""Scatter of a law's parameters over resamples of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.style import COLOURS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.data.cells import Array

SYMBOLS = {"alpha": "α", "beta": "β"}


@styled()
def posterior_pairs(draws: dict[str, Array], centre: dict[str, float]) -> Figure:
    """Each pair of a law's parameters over resamples of the runs; crosses mark the fit.

    Args:
        draws: One array a parameter, whole laws in the same order (`analysis.single_arm.fit_arm.resampled_laws`);
            constants far from 1 are drawn as logarithms.
        centre: The fit's own parameters.
    """
    names = [name for name in draws if name in centre and not name.startswith("a =")]
    values, points, labels = [], [], []
    for name in names:
        log = name in ("A", "B", "scale")
        values.append(np.log(np.clip(draws[name], 1e-300, None)) if log else draws[name])
        points.append(np.log(centre[name]) if log else centre[name])
        labels.append(f"ln {SYMBOLS.get(name, name)}" if log else SYMBOLS.get(name, name))
    size = len(names)
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
                axes.hist(values[i].clip(low, high), bins=40, color=COLOURS[0], alpha=0.8, linewidth=0)
                axes.axvline(points[i], color="black", linewidth=0.8)
                axes.set_yticks([])
            else:
                axes.plot(values[j], values[i], ".", markersize=1.5, alpha=0.25, color=COLOURS[0], rasterized=True)
                axes.plot(points[j], points[i], marker="+", color="black", markersize=9, markeredgewidth=1.2)
                axes.set_ylim(*np.quantile(values[i], [0.002, 0.998]))
                axes.locator_params(axis="y", nbins=3)
            axes.set_xlim(low, high)
            axes.locator_params(axis="x", nbins=3)
            axes.tick_params(labelsize=7, labelbottom=i == size - 1, labelleft=j == 0 and i > 0)
            if i == size - 1:
                axes.set_xlabel(labels[j])
            if j == 0 and i > 0:
                axes.set_ylabel(labels[i])
    return figure
