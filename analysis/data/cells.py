"""Selection of the rows that a fit uses, and cells: the rows of several arms that share size, tokens, data order and seed.

A cell is the unit of resampling. A run whose checkpoints are in the table enters a ratio with its last row only: before
the learning rate has decayed, a loss is not the loss that the compute of the run can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.data.table import COUNTS, RunsTable
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

SAME_COMPUTE = 0.02
"""Relative difference up to which two computes are equal: labels and rounding differ by less, rungs by more."""

MAX_LISTED_CHECKPOINTS = 50
"""Intermediate checkpoints up to which each is listed as left out; more are counted for each arm."""


class LeftOut(Strict, frozen=True):
    """A row that a fit did not use."""

    row: int
    """Row number in the table; the first data row is 1."""
    arm: str
    reason: str


class Rows(NamedTuple):
    """The numbers of the rows that a fit uses, one array a column, each of shape ``(rows,)``."""

    arm: NDArray[np.intp]
    """Number of the arm in the list of arms."""
    loss: Array
    """Nats per token."""
    columns: Mapping[str, Array]
    """Counts (params, tokens, flops) by name."""

    def take(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(self.arm[which], self.loss[which], {name: values[which] for name, values in self.columns.items()})


class Cells(NamedTuple):
    """The rows of some arms, ready for a fit."""

    rows: Rows
    numbers: NDArray[np.intp]
    """Row numbers in the table, shape ``(rows,)``; the first data row is 1."""
    cell: NDArray[np.intp]
    """Number of the cell of each row. Equal numbers in two arms: the same tokens in the same order."""
    rung: NDArray[np.intp]
    """Number of the rung (compute) of each row, from the smallest."""
    arms: tuple[str, ...]
    left_out: list[LeftOut]

    @property
    def paired(self) -> NDArray[np.intp]:
        """Cells in which every arm has a row."""
        count = int(self.cell.max()) + 1
        present = [np.bincount(self.cell[self.rows.arm == arm], minlength=count) > 0 for arm in range(len(self.arms))]
        return np.flatnonzero(np.all(present, axis=0))


def run_of(frame: pd.DataFrame) -> pd.Series:
    """A key of the run of each row: the column `run` where it is filled, else the columns that checkpoints share."""
    if "run" in frame and frame["run"].notna().all():
        return frame["arm"] + "\0" + frame["run"].astype(str)
    if "step" in frame and frame["step"].notna().any():
        parts = [c for c in ("arm", "params", "cell", "rung", "seed", "peak_lr", "batch_tokens") if c in frame]
        return frame.groupby(parts, dropna=False, sort=False).ngroup()
    return frame.index.to_series()


def select(table: RunsTable, arms: tuple[str, ...], *, ends_only: bool = True) -> Cells:
    """The usable rows of some arms with their cells.

    Args:
        table: The checked table.
        arms: Names of the arms; their order gives the arm numbers.
        ends_only: Keep the last row of each run.
    """
    frame = table.frame[table.frame["arm"].isin(arms)]
    unused = frame.loc[frame["left_out"] != "", ["arm", "left_out"]]
    left_out = [LeftOut(row=int(i) + 1, arm=str(arm), reason=str(reason)) for i, arm, reason in unused.itertuples()]
    used = frame[frame["left_out"] == ""]
    run = run_of(used)
    if ends_only and run.duplicated().any():
        time = "tokens" if "tokens" in used else "flops"
        last = used.assign(run_=run.to_numpy()).sort_values(time, kind="stable").groupby("run_", sort=False).tail(1)
        middle = used.index.difference(last.index)
        if len(middle) <= MAX_LISTED_CHECKPOINTS:
            reason = "a checkpoint before the end of its run"
            left_out += [
                LeftOut(row=int(i) + 1, arm=str(arm), reason=reason) for i, arm in used.loc[middle, "arm"].items()
            ]
        else:
            for arm, group in used.loc[middle].groupby("arm", sort=True):
                reason = f"one of {len(group):,} checkpoints of this arm before the end of their runs"
                left_out.append(LeftOut(row=int(group.index[0]) + 1, arm=str(arm), reason=reason))
        used = used.loc[last.index.sort_values()]
    used, worse = _best_settings(used)
    left_out += worse
    columns = {name: used[name].to_numpy(dtype=np.float64) for name in COUNTS if name in used}
    places = {name: number for number, name in enumerate(arms)}
    numbers = np.array([places[name] for name in used["arm"]], dtype=np.intp)
    rows = Rows(arm=numbers, loss=used["loss"].to_numpy(dtype=np.float64), columns=columns)
    rung = rungs(columns["flops"])
    return Cells(
        rows=rows,
        numbers=used.index.to_numpy(dtype=np.intp) + 1,
        cell=_cells(used, rows, rung, replicates=ends_only),
        rung=rung,
        arms=arms,
        left_out=sorted(left_out, key=lambda out: out.row),
    )


def _best_settings(used: pd.DataFrame) -> tuple[pd.DataFrame, list[LeftOut]]:
    """Rows at the best learning rate of each arm and point, by the mean over seeds, and the rows at other rates."""
    if "peak_lr" not in used or not used["peak_lr"].notna().all():
        return used, []
    point = ["arm", *(name for name in COUNTS if name in used)]
    if not (used.groupby(point)["peak_lr"].nunique() > 1).any():
        return used, []
    mean = used.groupby([*point, "peak_lr"])["loss"].transform("mean")
    best = mean <= mean.groupby([used[name] for name in point]).transform("min")
    # Of two rates with equal means the lower is kept.
    lowest = used["peak_lr"].where(best).groupby([used[name] for name in point]).transform("min")
    keep = used["peak_lr"] == lowest
    lost = used.assign(best_=lowest).loc[~keep, ["arm", "peak_lr", "best_"]]
    worse = [
        LeftOut(row=int(at) + 1, arm=str(arm), reason=f"peak_lr {rate:.4g} did worse at this size than {best:.4g}")
        for at, arm, rate, best in lost.itertuples()
    ]
    return used[keep], worse


def rungs(flops: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rung numbers from the smallest compute: a new one where compute grows by more than `SAME_COMPUTE`."""
    order = np.argsort(flops, kind="stable")
    ends = np.concatenate([[False], np.diff(np.log(flops[order])) > SAME_COMPUTE])
    numbers = np.empty(len(flops), dtype=np.intp)
    numbers[order] = np.cumsum(ends)
    return numbers


def _cells(used: pd.DataFrame, rows: Rows, rung: NDArray[np.intp], *, replicates: bool) -> NDArray[np.intp]:
    """Cell number of each row, such that no arm has two rows in one cell if `replicates` is set.

    A column `cell` that names only the rung holds several runs of an arm. In one cell their differences, which are the
    noise of a run, would cancel, so each becomes a cell of its own: by `seed` where there is that column, which keeps the
    pairs, else in the order of the table.
    """
    import pandas as pd

    named = "cell" in used and bool(used["cell"].notna().all())
    keys = pd.DataFrame({"arm": rows.arm})
    if named:
        keys["cell"] = used["cell"].astype(str).to_numpy()
    else:
        # A cell is one point in the plane of sizes and tokens; further rows at one point are numbered in order.
        for name in ("params", "tokens"):
            if name in rows.columns:
                keys[name] = rungs(rows.columns[name])
        keys["rung"] = rung
    replicates = replicates or not named
    if "seed" in used and used["seed"].notna().all() and (not named or (replicates and keys.duplicated().any())):
        keys["seed"] = used["seed"].astype(str).to_numpy()
    if replicates:
        keys["number"] = keys.groupby(list(keys.columns), sort=False).cumcount()
    cell = keys.groupby(list(keys.columns[1:]), sort=False).ngroup()
    return np.asarray(cell, dtype=np.intp)
