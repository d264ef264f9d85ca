"""Arms at one budget: by how much the losses differ, where no ladder of sizes asks for FLOPs to match.

For studies of one setting at one size (weight decay, the size of the update): final held-out losses with the paired
differences to a baseline, and the same differences along the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis.data.cells import Array
from analysis.uncertainty.intervals import t_quantile
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
    """An arm whose mean curve falls below another's for good, and by how much it ends below."""

    rung: str
    arm: str
    other: str
    tokens: float
    gap: float
    """Held-out loss of `arm` minus that of `other` at the end, mean over seeds; below zero."""
    low: float
    high: float


def outcomes(runs: pd.DataFrame, arms: Sequence[str]) -> list[BudgetOutcome]:
    """Every arm at every rung.

    Args:
        runs: A table checked by `analysis.data.table`; `rung` and `cell` (or `seed`) say what is paired.
        arms: The arms to compare, the baseline first: `analysis.ratio.study.choose_arms`.
    """
    used = runs[runs["left_out"] == ""] if "left_out" in runs else runs
    first = arms[0]
    used = used.assign(
        rung=used.get("rung", "all"),
        pair=used["cell"] if "cell" in used else used["seed"] if "seed" in used else range(len(used)),
    )
    found = []
    for rung, here in used.groupby("rung", sort=False):
        reference = here[here["arm"] == first].groupby("pair")["loss"].mean()
        for arm in arms:
            own = here[here["arm"] == arm]
            if not len(own):
                continue
            losses = own.groupby("pair")["loss"].mean()
            apart = (losses - reference).dropna().to_numpy() if arm != first else np.array([])
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


def mean_interval(values: Array, *, level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """The t interval of a mean; nothing where there are fewer than two values."""
    if len(values) < 2:
        return None, None
    half = float(t_quantile(len(values) - 1, level)) * float(values.std(ddof=1)) / len(values) ** 0.5
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
    made = pd.DataFrame(rows, columns=["rung", "arm", "tokens", "gap", "low", "high"])
    made = made.astype({"tokens": float, "gap": float, "low": float, "high": float})
    return made.sort_values(["rung", "arm", "tokens"], kind="stable").reset_index(drop=True)


def overtakings(curves: pd.DataFrame, arms: Sequence[str]) -> list[Overtaking]:
    """Who overtakes whom along the way and is surely below at the end: crossings within the noise are left out.

    Args:
        curves: As for `gaps`.
        arms: The arms, in the order of the answer.
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
    """Tokens after which a mean gap stays below zero, by a line between two evaluations.

    Args:
        along: The rows of one rung and arm of what `gaps` returns.

    Returns:
        None where the gap does not end below zero; the first tokens where it lies below from the start.
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
