"""Training dynamics: gradient norms, attention logits and updates along a run, and spectra of weights.

After Moonlight's Figures 4 and 7 (arXiv:2502.16982). Thin lines are seeds, thick ones their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures.curves import some_runs
from analysis.figures.style import arm_handles, look, panel_grid, short_counts, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYS = ["arm", "seed", "tokens"]


@styled()
def along_the_run(curves: pd.DataFrame, measured: pd.DataFrame, arms: Sequence[str], rung: str) -> Figure:
    """Training loss, gradient norm, largest attention logit of any layer, and update RMS of the blocks' matrices.

    Args:
        curves: Columns arm, rung, seed, tokens, train_loss, grad_norm, as ``curves.parquet`` has them.
        measured: As ``dynamics.parquet`` has it.
        arms: All arms of the study; their order sets the looks.
        rung: The rung drawn.
    """
    curves = curves[curves["rung"] == rung]
    measured = measured[measured["rung"] == rung]
    logits = _of(measured, "largest_logit").groupby(KEYS)["value"].max().reset_index()
    updates = _of(measured, "update_rms")
    # Classes whose spectra were measured: the matrices, without the vectors, which every arm updates by AdamW.
    updates = updates[updates["part"].isin(_of(measured, "svd_entropy")["part"])]
    updates = updates.groupby(KEYS)["value"].mean().reset_index()
    panels = [
        ("training loss (nats per token)", curves.rename(columns={"train_loss": "value"})),
        ("gradient norm", curves.rename(columns={"grad_norm": "value"})),
        ("largest attention logit", logits),
        ("update RMS / learning rate", updates),
    ]
    figure, grid = panel_grid(4, columns=2, size=(3.0, 2.1), handles=arm_handles(arms), labels=("tokens", ""))
    for axes, (label, table) in zip(grid, panels, strict=True):
        _lines(axes, table, arms)
        axes.set(ylabel=label, ylim=(0.0 if label != panels[0][0] else None, _top(table)))
    return figure


@styled()
def spectra(measured: pd.DataFrame, arms: Sequence[str], rung: str) -> Figure:
    """SVD entropy of the weights, one panel a class of matrix: 1 where all singular values are equal.

    Args:
        measured: As ``dynamics.parquet`` has it.
        arms: All arms of the study; their order sets the looks.
        rung: The rung drawn.
    """
    entropy = _of(measured[measured["rung"] == rung], "svd_entropy")
    parts = list(dict.fromkeys(entropy["part"]))
    columns = min(len(parts), 4)
    handles, labels = arm_handles(arms), ("tokens", "SVD entropy of the weights")
    figure, grid = panel_grid(
        len(parts), columns=columns, size=(1.9, 1.7), handles=handles, labels=labels, sharex=True, sharey=True
    )
    for axes, part in zip(grid, parts, strict=True):
        _lines(axes, entropy[entropy["part"] == part], arms)
        axes.set_title(part, loc="left")
    for axes in grid[-columns:]:  # the lowest panel of each column
        axes.tick_params(labelbottom=True)
    return figure


def _of(measured: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return measured[measured["quantity"] == quantity]


def _lines(axes: Axes, table: pd.DataFrame, arms: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for arm in arms:
        own = table[(table["arm"] == arm) & table["value"].notna()]
        dress = look(arms, arm)
        for _, run in some_runs(own, "seed").groupby("seed", sort=True):
            run = run.sort_values("tokens", kind="stable")
            axes.plot(run["tokens"], run["value"], color=dress.colour, linewidth=0.5, alpha=0.5)
        mean = own.groupby("tokens")["value"].mean()
        axes.plot(mean.index, mean, **dress.line, linewidth=1.2)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(short_counts)


def _top(table: pd.DataFrame) -> float:
    """Upper end of an axis: the first steps and a few spikes are cut off, because they would flatten the rest."""
    past = table[table["tokens"] > 0.05 * table["tokens"].max()]["value"]
    return float(1.15 * np.nanquantile(past, 0.995))
