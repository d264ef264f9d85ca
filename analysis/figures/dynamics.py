"""How runs train, beside how well: gradient norms, attention logits and updates along a run, and spectra of weights.

After Moonlight's Figures 4 and 7 (arXiv:2502.16982). Thin lines are seeds, thick ones their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.curves import some_runs
from analysis.figures.style import legend_name, look, new_figure, short_counts, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = ["arm", "seed", "tokens"]


def along_the_run(curves: pd.DataFrame, measured: pd.DataFrame, arms: Sequence[str], rung: str) -> Figure:
    """Training loss, gradient norm, largest attention logit of any layer, and update RMS of the blocks' matrices.

    Args:
        curves: Columns arm, rung, seed, tokens, train_loss, grad_norm, as ``curves.parquet`` has them.
        measured: As ``dynamics.parquet`` has it.
        arms: All arms, which give the looks.
        rung: Which size.
    """
    curves = curves[curves["rung"] == rung]
    measured = measured[measured["rung"] == rung]
    logits = _of(measured, "largest_logit").groupby(KEYS)["value"].max().reset_index()
    updates = _of(measured, "update_rms")
    updates = updates[updates["part"].isin(_matrices(measured))].groupby(KEYS)["value"].mean().reset_index()
    panels = [
        ("training loss (nats per token)", curves.rename(columns={"train_loss": "value"})),
        ("gradient norm", curves.rename(columns={"grad_norm": "value"})),
        ("largest attention logit", logits),
        ("update RMS / learning rate", updates),
    ]
    with styled():
        figure = new_figure(6.4, 4.4)
        for axes, (label, table) in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
            _lines(axes, table, arms)
            axes.set_ylabel(label)
            axes.set_ylim(0.0 if label != panels[0][0] else None, _top(table))
        figure.axes[0].legend(loc="upper right")
        figure.supxlabel("tokens", fontsize=9)
    return figure


def spectra(measured: pd.DataFrame, arms: Sequence[str], rung: str) -> Figure:
    """SVD entropy of the weights, one panel a class of matrix: 1 where all singular values are equal.

    Args:
        measured: As ``dynamics.parquet`` has it.
        arms: All arms, which give the looks.
        rung: Which size.
    """
    entropy = _of(measured[measured["rung"] == rung], "svd_entropy")
    parts = list(dict.fromkeys(entropy["part"]))
    columns = min(len(parts), 4)
    lines = -(-len(parts) // columns)
    with styled():
        figure = new_figure(1.9 * columns + 0.4, 1.7 * lines + 0.4)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, part in zip(grid, parts, strict=False):
            _lines(axes, entropy[entropy["part"] == part], arms)
            axes.set_title(part, loc="left")
        for axes in grid[len(parts) :]:
            axes.set_visible(False)
        for axes in grid[max(len(parts) - columns, 0) : len(parts)]:  # the lowest that is seen in its column
            axes.tick_params(labelbottom=True)
        grid[0].legend(loc="lower left")
        figure.supxlabel("tokens", fontsize=9)
        figure.supylabel("SVD entropy of the weights", fontsize=9)
    return figure


def _of(measured: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return measured[measured["quantity"] == quantity]


def _matrices(measured: pd.DataFrame) -> list[str]:
    """Classes whose spectra were measured: the matrices, and not the vectors that AdamW has in every arm."""
    return list(dict.fromkeys(_of(measured, "svd_entropy")["part"]))


def _lines(axes: Axes, table: pd.DataFrame, arms: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for arm in arms:
        own = table[(table["arm"] == arm) & table["value"].notna()]
        colour = look(arms, arm).colour
        for _, run in some_runs(own, "seed").groupby("seed", sort=True):
            run = run.sort_values("tokens", kind="stable")
            axes.plot(run["tokens"], run["value"], color=colour, linewidth=0.5, alpha=0.5)
        mean = own.groupby("tokens")["value"].mean()
        axes.plot(mean.index, mean, color=colour, linewidth=1.2, label=legend_name(arm))
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(short_counts)


def _top(table: pd.DataFrame) -> float:
    """A little over nearly all values past the first steps, which with a few spikes would flatten the rest."""
    past = table[table["tokens"] > 0.05 * table["tokens"].max()]["value"]
    return float(1.15 * np.nanquantile(past, 0.995))
