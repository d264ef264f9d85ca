"""The same ratio under other counts: FLOPs with the head, with attention, with the optimizer; wall-clock; GPU-hours.

FLOPs of a model do not see what an optimizer itself costs. A count of its matrix products does, and so does a ratio in
measured time, which sees the rest of it too; both belong beside the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from analysis.data.cells import Array, Cells
from analysis.fitting.families import LawFamily, fit_family, ratio_of
from analysis.fitting.fit import Fitted
from analysis.uncertainty.intervals import t_interval
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


LABELS = {
    "flops_matmul": "FLOPs with the head",
    "flops_attention": "FLOPs with head and causal attention",
    "flops_attention_full": "FLOPs with head and full attention",
    "flops_with_optimizer": "FLOPs with the optimizer's own",
    "flops_attention_with_optimizer": "FLOPs with head, causal attention and the optimizer's own",
    "tokens": "tokens",
    "seconds": "wall-clock",
    "cpu_seconds": "processor time",
    "gpu_hours": "GPU-hours",
}
"""Columns that can stand for the price of a run, and what they are called. Other ``flops_*`` columns keep their name."""

TIMES = ("seconds", "cpu_seconds", "gpu_hours")
"""Those that are measured time."""

UNEVEN = 0.1
"""Standard deviation of ln (seconds / cpu_seconds) over runs above which they waited for processors unevenly: others used
the machine, and a ratio in wall-clock would compare their visits."""


class ConventionRatio(Strict, frozen=True):
    """The ratio of another price at the headline's loss."""

    column: str
    label: str
    ratio: float
    low: float | None
    high: float | None
    how: str


def convention_ratios(
    frame: pd.DataFrame, cells: Cells, family: LawFamily, fitted: Fitted, loss: float
) -> list[ConventionRatio]:
    """The ratio in every price that the table has for all used rows, besides `flops`.

    On a ladder each price gets its own laws of the same family. On a grid the surface stays, and the ratio is scaled
    by what a FLOP of the challenger costs relative to one of the baseline.
    """
    used = frame.loc[cells.numbers - 1]
    columns = [name for name in LABELS if name in used and (name != "tokens" or family.design == "ladder")]
    columns += [str(name) for name in used.columns if str(name).startswith("flops_") and name not in LABELS]
    if "seconds" in columns and waited_unevenly(used):
        columns.remove("seconds")
    found = []
    for column in columns:
        price = _numbers(used, column)
        if price is None:
            continue
        made = (
            _on_ladder(cells, family, price, loss)
            if family.design == "ladder"
            else _on_grid(cells, fitted, price, loss)
        )
        if made is not None:
            ratio, low, high, how = made
            found.append(
                ConventionRatio(
                    column=column, label=LABELS.get(column, column), ratio=ratio, low=low, high=high, how=how
                )
            )
    return found


def waited_unevenly(used: pd.DataFrame) -> bool:
    """Whether clocks of these runs say more about what else the machine did than about the runs."""
    if "seconds" not in used or "cpu_seconds" not in used:
        return False
    seconds, worked = _numbers(used, "seconds"), _numbers(used, "cpu_seconds")
    return seconds is not None and worked is not None and float(np.std(np.log(seconds / worked))) > UNEVEN


def _numbers(used: pd.DataFrame, column: str) -> Array | None:
    import pandas as pd

    values = pd.to_numeric(used[column], errors="coerce").to_numpy(dtype=np.float64)
    return values if np.all(np.isfinite(values) & (values > 0)) else None


Made = tuple[float, float | None, float | None, str]


def _on_ladder(cells: Cells, family: LawFamily, price: Array, loss: float) -> Made | None:
    priced = cells._replace(rows=cells.rows._replace(columns={**cells.rows.columns, "flops": price}))
    if any(len(np.unique(price[cells.rows.arm == arm])) < 3 for arm in range(len(cells.arms))):
        return None
    fitted = fit_family(family, priced.rows, len(cells.arms), best_of=4)
    losses = np.array([loss])

    def quantity(theta: Array) -> Array:
        return ratio_of(fitted, theta, losses)

    value = float(quantity(fitted.theta)[0])
    if not np.isfinite(value):
        return None
    low, high = (float(end[0]) for end in t_interval(fitted, priced, quantity))
    sure = np.isfinite(low) and np.isfinite(high)
    return (
        float(np.exp(value)),
        float(np.exp(low)) if sure else None,
        float(np.exp(high)) if sure else None,
        "laws of the same family fitted to this price",
    )


def _on_grid(cells: Cells, fitted: Fitted, price: Array, loss: float) -> Made | None:
    value = float(ratio_of(fitted, fitted.theta, np.array([loss]))[0])
    if not np.isfinite(value):
        return None
    per_flop = np.log(price / cells.rows.columns["flops"])
    first, second = (float(per_flop[cells.rows.arm == arm].mean()) for arm in (0, 1))
    return float(np.exp(value + second - first)), None, None, "the FLOPs ratio times the mean price of a FLOP"
