"""The ratio in other costs: FLOPs with the head, with attention, with the optimizer; wall-clock; GPU-hours.

FLOPs of a model leave out the optimizer. A count with its matrix products includes them, and measured time includes the
rest of its cost.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from analysis.data.cells import Array, Cells
from analysis.fitting.families import LawFamily, fit_family, ratio_of
from analysis.fitting.fit import Minimum
from analysis.uncertainty.intervals import t_interval
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


COST_LABELS = {
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
"""Columns with a cost of a run, and their labels. Other ``flops_*`` columns are labelled by their names."""

TIMES = ("seconds", "cpu_seconds", "gpu_hours")
"""Columns of measured time."""

MAX_WAITING_SCATTER = 0.1
"""Standard deviation of ln (seconds / cpu_seconds) over runs above which they waited for processors unevenly: the machine
was shared, and a ratio in wall-clock would compare the load by others."""


class ConventionRatio(Strict, frozen=True):
    """The ratio in another cost at the headline's loss."""

    column: str
    label: str
    ratio: float
    low: float | None
    high: float | None
    how: str


def convention_ratios(
    frame: pd.DataFrame, cells: Cells, family: LawFamily, fitted: Minimum, loss: float
) -> list[ConventionRatio]:
    """The ratio in every cost that the table has for all used rows, besides `flops`.

    On a ladder each cost gets laws of its own, of the same family. On a grid the surface is kept, and the ratio is scaled
    by the mean cost of a FLOP of the challenger relative to the baseline.
    """
    used = frame.loc[cells.numbers - 1]
    columns = [name for name in COST_LABELS if name in used and (name != "tokens" or family.design == "ladder")]
    columns += [str(name) for name in used.columns if str(name).startswith("flops_") and name not in COST_LABELS]
    if "seconds" in columns and waited_unevenly(used):
        columns.remove("seconds")
    found = []
    for column in columns:
        cost = _numbers(used, column)
        if cost is None:
            continue
        if family.design == "ladder":
            value, low, high = _on_ladder(cells, family, cost, loss)
            how = "laws of the same family fitted to this cost"
        else:
            value, low, high = _on_grid(cells, fitted, cost, loss), np.nan, np.nan
            how = "the FLOPs ratio times the mean cost of a FLOP"
        if not np.isfinite(value):
            continue
        sure = np.isfinite(low) and np.isfinite(high)
        found.append(
            ConventionRatio(
                column=column,
                label=COST_LABELS.get(column, column),
                ratio=float(np.exp(value)),
                low=float(np.exp(low)) if sure else None,
                high=float(np.exp(high)) if sure else None,
                how=how,
            )
        )
    return found


def waited_unevenly(used: pd.DataFrame) -> bool:
    """True if other work on the machine decided the wall-clock times of these runs more than the runs did."""
    if "seconds" not in used or "cpu_seconds" not in used:
        return False
    seconds, worked = _numbers(used, "seconds"), _numbers(used, "cpu_seconds")
    return seconds is not None and worked is not None and float(np.std(np.log(seconds / worked))) > MAX_WAITING_SCATTER


def _numbers(used: pd.DataFrame, column: str) -> Array | None:
    import pandas as pd

    values = pd.to_numeric(used[column], errors="coerce").to_numpy(dtype=np.float64)
    return values if np.all(np.isfinite(values) & (values > 0)) else None


def _on_ladder(cells: Cells, family: LawFamily, cost: Array, loss: float) -> tuple[float, float, float]:
    """Log ratio under laws of this cost, and the ends of its interval; NaN where there is none."""
    if any(len(np.unique(cost[cells.rows.arm == arm])) < 3 for arm in range(len(cells.arms))):
        return np.nan, np.nan, np.nan
    costed = cells._replace(rows=cells.rows._replace(columns={**cells.rows.columns, "flops": cost}))
    fitted = fit_family(family, costed.rows, len(cells.arms), best_of=4)
    quantity = partial(ratio_of, fitted, losses=np.array([loss]))
    value = float(quantity(fitted.theta)[0])
    if not np.isfinite(value):
        return np.nan, np.nan, np.nan
    low, high = (float(end[0]) for end in t_interval(fitted, costed, quantity))
    return value, low, high


def _on_grid(cells: Cells, fitted: Minimum, cost: Array, loss: float) -> float:
    value = float(ratio_of(fitted, fitted.theta, np.array([loss]))[0])
    per_flop = np.log(cost / cells.rows.columns["flops"])
    first, second = (float(per_flop[cells.rows.arm == arm].mean()) for arm in (0, 1))
    return value + second - first
