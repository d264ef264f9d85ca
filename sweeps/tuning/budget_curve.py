"""The match ratio against the tuning budget: what each arm would have reached with its first k trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from sweeps.config.tuning_results import BudgetRow

ORDERS = 1000
"""Random orders of the trials behind each row."""

Array = npt.NDArray[np.float64]


def budget_rows(
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    computes: Mapping[str, float],
    *,
    baseline: str,
    seed: int = 0,
) -> tuple[BudgetRow, ...]:
    """The budget curve: the match ratio if each arm had had only its first k trials.

    The order of trials is random, so the curve is a distribution over random orders. With best losses ``L(k, rung)`` of
    both arms and the exponent b of the baseline's loss law ``L = a C**-b``, the ratio is ``exp(-g / b)``, where g is
    the mean over rungs of ``ln L_baseline - ln L_challenger``. This needs no more than two rungs. It shows how the ratio
    depends on the tuning budget; the reported ratio is that of `analysis.ratio`.

    Args:
        losses: Losses of all trials by arm and rung, nats per token; ``inf`` for a diverged or pruned one.
        computes: FLOPs of one run by rung.
        baseline: Name of the baseline arm, with which every other arm that has the same rungs is compared.
        seed: Seed of the random orders.

    Returns:
        No rows where there are fewer than two rungs, or the baseline's loss does not fall with compute.
    """
    rungs = [rung for rung in computes if rung in losses[baseline]]
    if len(rungs) < 2:
        return ()
    logs = np.log([computes[rung] for rung in rungs])
    best = np.log([min(losses[baseline][rung]) for rung in rungs])
    exponent = -float(np.polyfit(logs, best, 1)[0])
    if not exponent > 0:
        return ()
    rng = np.random.default_rng(seed)
    # By arm and rung: the best loss of the first k trials, shape (ORDERS, trials).
    running = {
        arm: [_best_of_first(by_rung[rung], rng) for rung in rungs]
        for arm, by_rung in losses.items()
        if all(rung in by_rung for rung in rungs)
    }
    rows = []
    against: Literal["equal", "full"]
    for arm, own in running.items():
        if arm == baseline:
            continue
        for against in ("equal", "full"):
            for trials in range(1, min(table.shape[1] for table in (*own, *running[baseline])) + 1):
                challenger = np.stack([table[:, trials - 1 if against == "equal" else -1] for table in own])
                base = np.stack([table[:, trials - 1] for table in running[baseline]])
                known = np.isfinite(base).all(axis=0) & np.isfinite(challenger).all(axis=0)
                gap = np.mean(np.log(base[:, known] / challenger[:, known]), axis=0)
                if len(gap) < ORDERS // 2:
                    continue  # With so few trials, most orders have nothing but diverged runs at some rung.
                low, middle, high = (float(q) for q in np.quantile(np.exp(-gap / exponent), [0.025, 0.5, 0.975]))
                rows.append(
                    BudgetRow(
                        arm=arm, baseline=baseline, against=against, trials=trials, ratio=middle, low=low, high=high
                    )
                )
    return tuple(rows)


def _best_of_first(losses: Sequence[float], rng: np.random.Generator) -> Array:
    """The best loss of the first k trials in random orders, shape ``(ORDERS, trials)``."""
    orders = rng.permuted(np.tile(np.array(losses), (ORDERS, 1)), axis=1)
    best: Array = np.minimum.accumulate(orders, axis=1)
    return best
