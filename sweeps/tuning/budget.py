"""How much of a gain is tuning: the match ratio if each arm had had only its first k trials.

The order in which trials were tried is chance, so it is drawn again and again. The estimator is the simplest that
needs no more than two rungs: the gap of log losses over the baseline's exponent, averaged over rungs. It says how the
ratio moves with the budget; the ratio itself is the analysis's to give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sweeps.tuning.facts import BudgetRow

ORDERS = 1000

Array = npt.NDArray[np.float64]


def budget_rows(
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    computes: Mapping[str, float],
    *,
    baseline: str,
    seed: int = 0,
) -> tuple[BudgetRow, ...]:
    """The ratio against the number of trials.

    Args:
        losses: Of all trials by arm and rung, nats per token; a diverged or pruned one as ``inf``.
        computes: FLOPs of one run by rung.
        baseline: The arm compared against.
        seed: Of the orders.

    Returns:
        Rows for every other arm with the same rungs; empty where there are fewer than two rungs, or the baseline's loss
        does not fall with compute.
    """
    rungs = [rung for rung in computes if rung in losses[baseline]]
    if len(rungs) < 2:
        return ()
    logs = np.log([computes[rung] for rung in rungs])
    finals = np.log([min(losses[baseline][rung]) for rung in rungs])
    exponent = -float(np.polyfit(logs, finals, 1)[0])
    if not exponent > 0:
        return ()
    rng = np.random.default_rng(seed)
    rows = []
    running = {arm: [_best_of_first(by_rung[rung], rng) for rung in rungs] for arm, by_rung in losses.items()
               if all(rung in by_rung for rung in rungs)}  # fmt: skip
    for arm, own in running.items():
        if arm == baseline:
            continue
        for against in ("equal", "full"):
            most = min(table.shape[1] for table in (*own, *running[baseline]))
            for trials in range(1, most + 1):
                challenger = [table[:, trials - 1 if against == "equal" else -1] for table in own]
                base = [table[:, trials - 1] for table in running[baseline]]
                known = np.all([np.isfinite(table) for table in (*base, *challenger)], axis=0)
                gap = np.mean([np.log(b[known] / c[known]) for b, c in zip(base, challenger, strict=True)], axis=0)
                ratios = np.exp(-gap / exponent)
                if len(ratios) < ORDERS // 2:
                    continue  # with so few trials, most orders have nothing but diverged runs at some rung
                low, middle, high = (float(q) for q in np.quantile(ratios, [0.025, 0.5, 0.975]))
                rows.append(
                    BudgetRow(
                        arm=arm,
                        baseline=baseline,
                        against="equal" if against == "equal" else "full",
                        trials=trials,
                        ratio=middle,
                        low=low,
                        high=high,
                    )
                )
    return tuple(rows)


def _best_of_first(losses: Sequence[float], rng: np.random.Generator) -> Array:
    """The best loss of the first k trials, shape ``(ORDERS, trials)``, for as many random orders."""
    values = np.array([loss if math.isfinite(loss) else np.inf for loss in losses])
    orders = rng.permuted(np.tile(values, (ORDERS, 1)), axis=1)
    best: Array = np.minimum.accumulate(orders, axis=1)
    return best
