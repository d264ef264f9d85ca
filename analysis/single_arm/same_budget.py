"""Comparison of arms at one budget: final losses with paired differences to a baseline, and differences along the runs.

For studies of one setting at one size (weight decay, the size of the update), which have no ladder for FLOPs to match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.data.cells import SAME_COMPUTE, Array, rungs
from analysis.data.table import RunsTable, check_table
from analysis.ratio.study import usable_text
from analysis.uncertainty.intervals import ROUNDING, t_quantile
from scaling.errors import UserError
from scaling.io import Strict

if TYPE_CHECKING:
    import pandas as pd


class BudgetOutcome(Strict, frozen=True):
    """One arm at one budget. Losses in nats per token; intervals of 95 % by t over seeds, None with a single one."""

    rung: str
    arm: str
    tokens: float
    seeds: int
    loss: float
    """Mean over seeds."""
    spread: float | None
    """Standard deviation over seeds."""
    difference: float | None
    """Mean over the seeds that the baseline has too of this arm's loss minus the baseline's; None for the baseline."""
    low: float | None
    high: float | None
    pairs: int


class Overtaking(NamedTuple):
    """An arm whose mean curve crosses below another's and stays below, with the gap at the end."""

    rung: str
    arm: str
    other: str
    tokens: float
    gap: float
    """Held-out loss of `arm` minus that of `other` at the end, mean over seeds; below zero."""
    low: float
    high: float


def outcomes(table: RunsTable | pd.DataFrame, arms: Sequence[str]) -> list[BudgetOutcome]:
    """Every arm at every rung.

    Args:
        table: A table of runs, paired by `cell` and `seed`. Without a column `rung`, runs within 2 % of one size and one
            number of tokens share a budget.
        arms: The arms to compare, the baseline first: `analysis.ratio.study.choose_arms`.

    Raises:
        UserError: No run can be used, or an arm has runs of several budgets in one rung.
    """
    table = check_table(table)
    name, runs = table.name, table.frame
    used = runs[(runs["left_out"] == "") & runs["arm"].isin(arms)]
    if not len(used):
        raise UserError(f"{name}: there are {usable_text(runs)}; a comparison needs some. Finish runs first.")
    used = used.assign(rung=_budgets(used, name))
    used = used.assign(pair=_pairs(used))
    _check_budgets(used, name)
    found = []
    for rung, here in used.groupby("rung", sort=False):
        reference = here[here["arm"] == arms[0]].groupby("pair")["loss"].mean()
        for arm in arms:
            own = here[here["arm"] == arm]
            if not len(own):
                continue
            losses = own.groupby("pair")["loss"].mean()
            apart = (losses - reference).dropna().to_numpy() if arm != arms[0] else np.array([])
            low, high = mean_interval(apart)
            found.append(
                BudgetOutcome(
                    rung=str(rung),
                    arm=arm,
                    tokens=float(own["tokens"].iloc[0]),
                    seeds=len(losses),
                    loss=float(losses.mean()),
                    spread=float(losses.std(ddof=1)) if len(losses) > 1 else None,
                    difference=float(apart.mean()) if len(apart) else None,
                    low=low,
                    high=high,
                    pairs=len(apart),
                )
            )
    return found


def _budgets(used: pd.DataFrame, name: str) -> pd.Series:
    """Name of each run's budget: the column `rung`, else the size, with its tokens where a size has several budgets."""
    from scaling.units import human

    if "rung" in used:
        empty = used["rung"].isna() | (used["rung"].astype(str).str.strip() == "")
        if empty.any():
            raise UserError(
                f"{name}, column rung, row {int(used.index[empty.to_numpy()][0]) + 1}: found nothing; every row needs the "
                "name of a budget. Fill the column, or remove it to compare runs of equal params and tokens."
            )
        return used["rung"].astype(str).str.strip()
    at = used[["params", "tokens"]].apply(lambda counts: rungs(counts.to_numpy(dtype=float)))
    size = used["params"].groupby(at["params"]).transform("median").map(human)
    several = at.groupby("params")["tokens"].transform("nunique") > 1
    tokens = used["tokens"].groupby(at["tokens"]).transform("median").map(human)
    return size.where(~several, size + ", " + tokens + " tokens")


def _pairs(used: pd.DataFrame) -> pd.Series:
    """Pair number of each run: by `cell`, by `seed` too where a cell has several runs of an arm, then by their order."""
    keys = used[["rung", "arm"]]
    for column in ("cell", "seed"):
        if column in used and keys.duplicated().any():
            keys = keys.assign(**{column: used[column].astype(str)})
    if len(keys.columns) == 2:  # no column pairs the runs
        return used.index.to_series()
    keys = keys.assign(number=keys.groupby(list(keys.columns), sort=False).cumcount())
    return keys.drop(columns=["rung", "arm"]).groupby(list(keys.columns[2:]), sort=False).ngroup()


def _check_budgets(used: pd.DataFrame, name: str) -> None:
    """Refuse arms whose runs of one rung differ in size or tokens: their mean loss would belong to no budget."""
    for column in ("params", "tokens"):
        ends = used.groupby(["rung", "arm"], sort=False)[column].agg(["min", "max"])
        wide = ends[ends["max"] > (1.0 + SAME_COMPUTE) * ends["min"]]
        if len(wide):
            (rung, arm), low, high = wide.index[0], wide["min"].iloc[0], wide["max"].iloc[0]
            raise UserError(
                f"{name}, column rung, {rung}: runs of arm {arm} have {column} from {low:.4g} to {high:.4g}. A comparison "
                "averages runs of one budget over seeds: give each budget its own rung, and keep the last row of each run."
            )


def mean_interval(values: Array) -> tuple[float, float] | tuple[None, None]:
    """The 95 % t interval of a mean; None with fewer than two values, or where all are equal up to rounding."""
    if len(values) < 2 or float(np.ptp(values)) <= ROUNDING:
        return None, None
    half = float(t_quantile(len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def gaps(curves: pd.DataFrame, *, baseline: str) -> pd.DataFrame:
    """Held-out loss minus the baseline's of the same rung and seed at the same tokens, along the runs.

    Args:
        curves: Columns arm, rung, seed, tokens, validation_loss, as ``curves.parquet`` has them.
        baseline: The arm that is subtracted.

    Returns:
        Columns rung, arm, tokens, gap (mean over seeds), low, high (NaN with one seed), in the order of tokens.
    """
    import pandas as pd

    held = curves[curves["validation_loss"].notna()]
    keys = ["rung", "seed", "tokens"]
    own = held[held["arm"] == baseline].set_index(keys)["validation_loss"].rename("reference")
    joined = held[held["arm"] != baseline].join(own, on=keys, how="inner")
    rows = []
    for (rung, arm, tokens), group in joined.groupby(["rung", "arm", "tokens"], sort=False):
        apart = (group["validation_loss"] - group["reference"]).to_numpy()
        low, high = mean_interval(apart)
        rows.append((rung, arm, tokens, apart.mean(), low, high))
    result = pd.DataFrame(rows, columns=["rung", "arm", "tokens", "gap", "low", "high"])
    result = result.astype({"tokens": float, "gap": float, "low": float, "high": float})
    return result.sort_values(["rung", "arm", "tokens"], kind="stable").reset_index(drop=True)


def overtakings(curves: pd.DataFrame, arms: Sequence[str]) -> list[Overtaking]:
    """Pairs of arms whose curves (as for `gaps`) cross and whose gap at the end excludes zero, in the order of `arms`.

    Crossings within the noise are left out.
    """
    found = []
    for other in arms:
        table = gaps(curves, baseline=other)
        for (rung, arm), along in table.groupby(["rung", "arm"], sort=False):
            end = along.iloc[-1]
            tokens = last_crossing(along)
            if arm in arms and tokens is not None and tokens > along["tokens"].iloc[0] and end["high"] < 0:
                found.append(
                    Overtaking(
                        str(rung), str(arm), other, tokens, float(end["gap"]), float(end["low"]), float(end["high"])
                    )
                )
    return found


def last_crossing(along: pd.DataFrame) -> float | None:
    """Tokens after which the mean gap of one rung and arm (rows of `gaps`) stays below zero, interpolated linearly.

    None where the gap does not end below zero; the first tokens where it is below zero from the start.
    """
    tokens, gap = along["tokens"].to_numpy(dtype=float), along["gap"].to_numpy(dtype=float)
    if not len(gap) or gap[-1] >= 0:
        return None
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return float(tokens[0])
    at = above[-1]
    share = gap[at] / (gap[at] - gap[at + 1])
    return float(tokens[at] + share * (tokens[at + 1] - tokens[at]))
