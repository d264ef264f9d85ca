"""Arms at one budget: by how much the losses differ, where no ladder of sizes asks for FLOPs to match.

For studies of one setting at one size (weight decay, the size of the update): final held-out losses with the paired
differences to a baseline, and the same differences along the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.intervals import t_quantile
from analysis.solve import Array
from scaling.spec import Strict

if TYPE_CHECKING:
    import pandas as pd


class Outcome(Strict, frozen=True):
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


def outcomes(runs: pd.DataFrame, arms: Sequence[str]) -> list[Outcome]:
    """Every arm at every rung.

    Args:
        runs: A table checked by `analysis.load`; `rung` and `cell` (or `seed`) say what is paired.
        arms: The arms to compare, the baseline first: `analysis.study.choose_arms`.
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
                Outcome(
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


def last_crossing(table: pd.DataFrame, first: str, second: str, *, rung: str) -> float | None:
    """Tokens after which the mean curve of `second` stays below that of `first`, between two evaluations by a line.

    Args:
        table: What `gaps` returns.
        first: An arm, or the baseline, whose gap is zero.
        second: Another arm.
        rung: Where.

    Returns:
        None where `second` does not end below `first`; the first tokens where it lies below from the start.
    """
    here = table[table["rung"] == rung].pivot_table(index="tokens", columns="arm", values="gap")
    both = [here[arm] if arm in here else 0.0 * here.iloc[:, 0] for arm in (first, second)]
    apart = (both[1] - both[0]).dropna()
    tokens, values = apart.index.to_numpy(dtype=float), apart.to_numpy()
    if not len(values) or values[-1] >= 0:
        return None
    above = np.flatnonzero(values >= 0)
    if not len(above):
        return float(tokens[0])
    at = above[-1]
    share = values[at] / (values[at] - values[at + 1])
    return float(tokens[at] + share * (tokens[at + 1] - tokens[at]))
