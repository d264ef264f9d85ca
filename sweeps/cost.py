"""What a campaign will take: hours a run, from measured runs like it where there are any, else from an assumption.

Speeds are FLOP/s under the convention ``attention`` (head and causal attention counted), since 6ND leaves out work that
takes a third of the time of a small model. A prediction says what it rests on.
"""

from __future__ import annotations

import functools
import heapq
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from scaling.errors import Refusal
from scaling.flops import train_flops, train_flops_per_token
from scaling.records import RunDirectory, RunRecord
from scaling.spec import RunSpec
from sweeps.placement import PlacementTable
from sweeps.plan import PlannedRun

CONVENTION = "attention"
Basis = Literal["itself", "like", "fitted", "assumed"]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted time of one run."""

    hours: float
    """Wall-clock hours of training."""
    basis: Basis
    """This very run was measured; runs of the same shape and optimizer were; only other sizes were; none was."""
    explanation: str
    devices: float = 1.0
    """GPUs that the run occupies, a share of one where several runs share it; without GPUs 1."""

    @property
    def gpu_hours(self) -> float:
        """Hours times devices."""
        return self.hours * self.devices


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
    cuda = _on_cuda(table)
    devices = (table.slurm.devices or table.devices) if cuda else max(table.slurm.processes, table.devices)
    share = devices / table.runs_per_gpu if cuda else 1.0

    def cost(hours: float, basis: Basis, explanation: str) -> Cost:
        return Cost(hours=hours, devices=share, basis=basis, explanation=explanation)

    itself = [record for record in measured if record.spec.id == run.id]
    if itself:
        return cost(itself[0].seconds / 3600, "itself", "measured")
    comparable = [record for record in measured if _same_kind(record, run, table)]
    like = [record for record in comparable if record.spec.shape == run.spec.shape]
    if like:
        rate = statistics.median(_flops_per_second(record) for record in like)
        return cost(work / rate / devices / 3600, "like", f"{rate:.3g} FLOP/s, measured at this size")
    assumed = table.peak_flops / max(table.slurm.devices, 1) * table.utilisation
    if comparable:
        points = tuple(sorted((*_work(record.spec), 1.0 / _tokens_per_second(record)) for record in comparable))
        speed = fit_speed(points, assumed)
        flops, layers = _work(run.spec)
        seconds = run.spec.budget.tokens * speed.seconds_per_token(flops, layers) / devices
        sizes = len({record.spec.shape for record in comparable})
        told = (
            f"{speed.layer * 1e6:.3g} us a layer and step and {speed.rate:.3g} FLOP/s beyond, from "
            f"{sizes} other size{'s' if sizes > 1 else ''}"
        )
        return cost(seconds / 3600, "fitted", told)
    return cost(work / assumed / devices / 3600, "assumed", assumption(table))


class Speed(NamedTuple):
    """How long a token takes: a fixed time for each layer of a step, shared by the batch's tokens, and its FLOPs."""

    layer: float
    """Seconds a layer and step: launches, Python, the optimizer; what leaves small models below the device's speed."""
    rate: float
    """FLOP/s that a large model would come to."""

    def seconds_per_token(self, flops: float, layers: float) -> float:
        """Of one device.

        Args:
            flops: Of a token.
            layers: Divided by the tokens of a batch.
        """
        return self.layer * layers + flops / self.rate


TRUST = (0.05, 0.5)
"""Spread of ln speed between like runs, and of the assumed speed around the one that a large model comes to."""


@functools.lru_cache(maxsize=64)
def fit_speed(points: tuple[tuple[float, float, float], ...], assumed: float) -> Speed:
    """The likeliest `Speed` under measured runs, with the assumed one as what is known beforehand.

    One size alone cannot tell the fixed time from the rate, so the rate then stays near the assumption; two sizes
    outvote it.

    Args:
        points: FLOPs of a token, layers over tokens of a batch, seconds of a token on one device.
        assumed: FLOP/s.
    """
    import numpy as np

    flops, layers, seconds = np.array(points).T
    # Runs of one size are one observation with many repeats: their systematic error is shared.
    _, size, counts = np.unique(flops, return_inverse=True, return_counts=True)
    weight = 1.0 / counts[size]
    rates = assumed * np.exp(np.linspace(-4.0, 4.0, 401))[:, None, None]
    most = float(np.max(seconds / layers))
    fixed = most * np.linspace(0.0, 1.0, 201)[None, :, None]
    misfit = np.log(fixed * layers + flops / rates) - np.log(seconds)
    loss = np.sum(weight * misfit**2, axis=2) / TRUST[0] ** 2 + np.log(rates[..., 0] / assumed) ** 2 / TRUST[1] ** 2
    at, of = np.unravel_index(int(np.argmin(loss)), loss.shape)
    return Speed(layer=float(fixed[0, of, 0]), rate=float(rates[at, 0, 0]))


def wall_hours(hours: Iterable[float], slots: int) -> float:
    """Hours until the last run ends where `slots` run at once, each free slot taking the next of the list."""
    free = [0.0] * max(slots, 1)
    for each in hours:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def slots(table: PlacementTable) -> int:
    """Runs at the same time: the array's limit, else what this machine holds."""
    if table.slurm.parallel is not None:
        return table.slurm.parallel
    if _on_cuda(table):
        return table.runs_per_gpu
    return max(1, (os.cpu_count() or 1) // table.threads)


def assumption(table: PlacementTable) -> str:
    """What a prediction rests on while nothing was measured."""
    return (
        f"assumed: {table.utilisation:.0%} of {table.peak_flops:.4g} FLOP/s, the peak of {table.accelerator}"
        f" (FLOPs with head and causal attention)"
    )


def _on_cuda(table: PlacementTable) -> bool:
    return table.device == "cuda" or (table.device == "auto" and table.accelerator != "cpu")


def _same_kind(record: RunRecord, run: PlannedRun, table: PlacementTable) -> bool:
    return (
        record.spec.optimizer.name == run.spec.optimizer.name
        and record.spec.precision == run.spec.precision
        and (record.device.kind == "cuda") == _on_cuda(table)
    )


def _tokens_per_second(record: RunRecord) -> float:
    """Of one device."""
    return record.tokens_per_second / record.device.count


def _flops_per_second(record: RunRecord) -> float:
    return _tokens_per_second(record) * train_flops_per_token(record.spec.shape, CONVENTION)


def _work(spec: RunSpec) -> tuple[float, float]:
    """FLOPs of a token, and layers over tokens of a batch."""
    return train_flops_per_token(spec.shape, CONVENTION), spec.shape.layers / spec.batch_tokens
