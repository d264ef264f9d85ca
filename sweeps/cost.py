"""What a campaign will take: hours a run, from measured runs like it where there are any, else from an assumption.

Speeds are FLOP/s under the convention ``attention`` (head and causal attention counted), since 6ND leaves out work that
takes a third of the time of a small model. A prediction says what it rests on.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Literal

import msgspec

from scaling.errors import Refusal
from scaling.flops import train_flops, train_flops_per_token
from scaling.records import RunDirectory, RunRecord
from scaling.spec import RunSpec
from sweeps.placement import PlacementTable
from sweeps.plan import PlannedRun

CONVENTION = "attention"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted time of one run."""

    hours: float
    """Wall-clock hours of training."""
    basis: Literal["itself", "like", "nearest", "assumed"]
    """This very run was measured; runs of the same shape and optimizer were; only other sizes were; none was."""
    explanation: str


def measured_runs(root: Path) -> list[RunRecord]:
    """Records of all finished runs under a root, of whichever campaign; unreadable ones are left out."""
    found = []
    for file in sorted((root / "runs").glob("*/record.json")):
        try:
            record = RunDirectory(file.parent).record()
        except Refusal:
            continue
        if record is not None and record.status == "finished" and record.tokens_per_second > 0:
            found.append(record)
    return found


def predict(run: PlannedRun, table: PlacementTable, measured: list[RunRecord]) -> Cost:
    """Hours of one run.

    Args:
        run: The planned run.
        table: Its rung's placement, for the assumption.
        measured: As `measured_runs` gives them.
    """
    work = train_flops(run.spec.shape, run.spec.budget.tokens, CONVENTION)
    itself = [record for record in measured if record.spec.id == run.id]
    if itself:
        return Cost(hours=itself[0].seconds / 3600, basis="itself", explanation="measured")
    comparable = [record for record in measured if _same_kind(record, run, table)]
    like = [record for record in comparable if record.spec.shape == run.spec.shape]
    if like:
        rate = statistics.median(_flops_per_second(record) for record in like)
        return Cost(hours=work / rate / 3600, basis="like", explanation=f"{rate:.3g} FLOP/s, measured at this size")
    if comparable:
        own = _log_size(run.spec)
        distance = min(abs(_log_size(record.spec) - own) for record in comparable)
        near = [record for record in comparable if abs(_log_size(record.spec) - own) <= distance + 1e-9]
        rate = statistics.median(_flops_per_second(record) for record in near)
        return Cost(
            hours=work / rate / 3600,
            basis="nearest",
            explanation=f"{rate:.3g} FLOP/s, measured at a size {math.exp(distance):.2g} times off",
        )
    rate = table.peak_flops * table.utilisation
    return Cost(hours=work / rate / 3600, basis="assumed", explanation=assumption(table))


def assumption(table: PlacementTable) -> str:
    """What a prediction rests on while nothing was measured."""
    return (
        f"assumed: {table.utilisation:.0%} of {table.peak_flops:.4g} FLOP/s, the peak of {table.accelerator}"
        f" (FLOPs with head and causal attention)"
    )


def _same_kind(record: RunRecord, run: PlannedRun, table: PlacementTable) -> bool:
    cuda = table.device == "cuda" or (table.device == "auto" and table.accelerator != "cpu")
    return (
        record.spec.optimizer.name == run.spec.optimizer.name
        and record.spec.precision == run.spec.precision
        and (record.device.kind == "cuda") == cuda
    )


def _flops_per_second(record: RunRecord) -> float:
    return record.tokens_per_second * train_flops_per_token(record.spec.shape, CONVENTION)


def _log_size(spec: RunSpec) -> float:
    return math.log(train_flops_per_token(spec.shape, CONVENTION))
