"""Which rows a comparison uses, and which rows of the two arms belong together.

The unit of resampling is the cell: one size with one token budget, data order and seed, both optimizers. Runs that
stand in the table with their checkpoints enter the ratio with their last row alone, because before its decay ends a
run says nothing about the compute that it spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


SAME_POINT = 0.02
"""Compute of two runs that counts as the same, relative; labels and rounding differ by less, rungs by more."""


class Cells(NamedTuple):
    """The rows of some arms, ready for a fit."""

    rows: Rows
    numbers: NDArray[np.intp]
    """Row numbers in the table; the first data row is 1."""
    cell: NDArray[np.intp]
    """Number of the cell of each row. The same number in two arms: the same tokens in the same order."""
    rung: NDArray[np.intp]
    """Number of the rung (compute) of each row, from the smallest."""
    arms: tuple[str, ...]
    left_out: list[LeftOut]

    @property
    def paired(self) -> NDArray[np.intp]:
        """Cells that every arm has."""
        count = int(self.cell.max()) + 1
        held = [np.bincount(self.cell[self.rows.arm == arm], minlength=count) > 0 for arm in range(len(self.arms))]
        return np.flatnonzero(np.all(held, axis=0))


def run_of(frame: pd.DataFrame) -> pd.Series:
    """What names the run of each row: `run` where there is one, else what the checkpoints of a run share."""
    if "run" in frame and frame["run"].notna().all():
        return frame["arm"] + "\0" + frame["run"].astype(str)
    if "step" in frame and frame["step"].notna().any():
        parts = [c for c in ("arm", "params", "cell", "rung", "seed", "peak_lr", "batch_tokens") if c in frame]
        return frame.groupby(parts, dropna=False, sort=False).ngroup()
    return frame.index.to_series()


def select(frame: pd.DataFrame, arms: tuple[str, ...], *, ends_only: bool = True) -> Cells:
    """The usable rows of some arms with their cells.

    Args:
        frame: A checked table.
        arms: In the order that the rows are to number them.
        ends_only: Keep the last row of each run.
    """
    frame = frame[frame["arm"].isin(arms)]
    unused = frame[frame["left_out"] != ""]
    left_out = [
        LeftOut(row=int(index) + 1, arm=str(arm), reason=str(reason))
        for index, arm, reason in zip(unused.index, unused["arm"], unused["left_out"], strict=True)
    ]
    used = frame[frame["left_out"] == ""]
    run = run_of(used)
    if ends_only and run.duplicated().any():
        last = used.assign(run_=run.to_numpy()).sort_values("tokens", kind="stable").groupby("run_", sort=False).tail(1)
        middle = used.index.difference(last.index)
        if len(middle) <= 50:
            left_out += [
                LeftOut(row=int(i) + 1, arm=str(used.at[i, "arm"]), reason="a checkpoint before the end of its run")
                for i in middle
            ]
        else:
            for arm, group in used.loc[middle].groupby("arm", sort=True):
                reason = f"one of {len(group):,} checkpoints of this arm before the end of their runs"
                left_out.append(LeftOut(row=int(group.index[0]) + 1, arm=str(arm), reason=reason))
        used = used.loc[last.index.sort_values()]
    used, worse = _best_settings(used)
    left_out += worse
    columns = {name: used[name].to_numpy(dtype=np.float64) for name in ("params", "tokens", "flops")}
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
    """The rows at the best learning rate of each arm and point, by the mean over seeds; and the others, named."""
    if "peak_lr" not in used or not used["peak_lr"].notna().all():
        return used, []
    point = ["arm", "params", "tokens", "flops"]
    if not (used.groupby(point)["peak_lr"].nunique() > 1).any():
        return used, []
    mean = used.groupby([*point, "peak_lr"])["loss"].transform("mean")
    best = mean <= mean.groupby([used[name] for name in point]).transform("min")
    # Two rates with one mean: the lower stays.
    lowest = used["peak_lr"].where(best).groupby([used[name] for name in point]).transform("min")
    keep = used["peak_lr"] == lowest
    lost = used[~keep].assign(best_=lowest[~keep])
    worse = [
        LeftOut(row=int(at) + 1, arm=str(arm), reason=f"peak_lr {rate:.4g} did worse at this size than {best:.4g}")
        for at, arm, rate, best in zip(lost.index, lost["arm"], lost["peak_lr"], lost["best_"], strict=True)
    ]
    return used[keep], worse


def rungs(flops: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rung numbers from the smallest compute: a new one where compute grows by more than `SAME_POINT`."""
    order = np.argsort(flops, kind="stable")
    ends = np.concatenate([[False], np.diff(np.log(flops[order])) > SAME_POINT])
    numbers = np.empty(len(flops), dtype=np.intp)
    numbers[order] = np.cumsum(ends)
    return numbers


def _cells(used: pd.DataFrame, rows: Rows, rung: NDArray[np.intp], *, replicates: bool) -> NDArray[np.intp]:
    """The number of each row's cell, so that no arm has two rows in one where `replicates` is set.

    A column `cell` that names the rung alone holds several runs of an arm. As one cell their differences, which are the
    noise of a run, would cancel, so they become cells of their own: by `seed` where there is that column, which keeps the
    pairs, else in the order of the table.
    """
    import pandas as pd

    named = "cell" in used and bool(used["cell"].notna().all())
    keys = pd.DataFrame({"arm": rows.arm})
    if named:
        keys["cell"] = used["cell"].astype(str).to_numpy()
    else:
        # Same point of the plane of sizes and tokens, same seed; further rows at one point are numbered in order.
        keys["params"], keys["tokens"] = rungs(rows.columns["params"]), rungs(rows.columns["tokens"])
        keys["rung"] = rung
    replicates = replicates or not named
    if "seed" in used and used["seed"].notna().all() and (not named or (replicates and keys.duplicated().any())):
        keys["seed"] = used["seed"].astype(str).to_numpy()
    if replicates:
        keys["number"] = keys.groupby(list(keys.columns), sort=False).cumcount()
    cell = keys.groupby(list(keys.columns[1:]), sort=False).ngroup()
    return np.asarray(cell, dtype=np.intp)


class Rows(NamedTuple):
    """The numbers of the rows that a fit uses, one array a column."""

    arm: NDArray[np.intp]
    """Number of the arm in the list of arms."""
    loss: Array
    columns: Mapping[str, Array]
    """Counts (params, tokens, flops) by name."""

    def take(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(self.arm[which], self.loss[which], {name: values[which] for name, values in self.columns.items()})


Array = NDArray[np.float64]


class LeftOut(Strict, frozen=True):
    """A row that a fit did not use."""

    row: int
    """First data row of the table is 1."""
    arm: str
    reason: str
