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

from scaling.errors import UserError
from scaling.flops import train_flops, train_flops_per_token
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.directory import RunDirectory
from scaling.run.record import RunRecord
from scaling.spec import RunSpec
from sweeps.config.placement import PlacementConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.tuned_settings import dimensions_of, trials_of, tuned_rungs

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
        except UserError:
            continue
        if record is not None and record.status == "finished" and record.tokens_per_second > 0:
            found.append(record)
    return found


def predict(run: PlannedRun, table: PlacementConfig, measured: list[RunRecord]) -> Cost:
    """Hours of one run.

    Args:
        run: The planned run.
        table: Its rung's placement, for the assumption.
        measured: As `measured_runs` gives them.
    """
    work = train_flops(run.spec.model, run.spec.budget.tokens, CONVENTION)
    cuda = _on_cuda(table)
    devices = (table.slurm.devices or table.devices) if cuda else max(table.slurm.processes, table.devices)
    share = devices / table.runs_per_gpu if cuda else 1.0

    def cost(hours: float, basis: Basis, explanation: str) -> Cost:
        return Cost(hours=hours, devices=share, basis=basis, explanation=explanation)

    itself = [record for record in measured if record.spec.id == run.id]
    if itself:
        return cost(itself[0].seconds / 3600, "itself", "measured")
    comparable = [record for record in measured if _same_kind(record, run, table)]
    like = [record for record in comparable if record.spec.model == run.spec.model]
    if like:
        rate = statistics.median(_flops_per_second(record) for record in like)
        return cost(work / rate / devices / 3600, "like", f"{rate:.3g} FLOP/s, measured at this size")
    peak = table.peak_flops / max(table.slurm.devices, 1)
    if comparable:
        points = tuple(sorted((*work_of(record.spec), 1.0 / _tokens_per_second(record)) for record in comparable))
        speed = fit_speed(points, peak)
        seconds = run.spec.budget.tokens * speed.seconds_per_token(work_of(run.spec)) / devices
        sizes = len({record.spec.model for record in comparable})
        return cost(seconds / 3600, "fitted", f"{speed}, from {sizes} other size{'s' if sizes > 1 else ''}")
    return cost(work / (peak * table.utilisation) / devices / 3600, "assumed", assumption(table))


class Work(NamedTuple):
    """What a token of a run asks of a device."""

    layers: float
    """Layers over tokens of a batch: a step's fixed work is shared by them."""
    activations: float
    """Layers times width: what is read and written beside matrix products grows with it."""
    flops: float
    """Of matrix products, the optimizer's among them."""


def work_of(spec: RunSpec) -> Work:
    """What a token of a run asks for."""
    shape = spec.model
    products = train_flops_per_token(shape, CONVENTION) + run_optimizer_flops(spec) / spec.budget.tokens
    return Work(layers=shape.layers / spec.batch_tokens, activations=shape.layers * shape.width, flops=products)


class Speed(NamedTuple):
    """How long each kind of `Work` takes on one device."""

    layer: float
    """Seconds of a layer and step: launches, Python, the optimizer's own passes."""
    activation: float
    """Seconds of a token, layer and unit of width: norms, softmax, gates, residual sums, forward and backward."""
    rate: float
    """FLOP/s of matrix products."""

    def seconds_per_token(self, work: Work) -> float:
        """The three one after another."""
        return self.layer * work.layers + self.activation * work.activations + work.flops / self.rate

    def __str__(self) -> str:
        """The three, for the explanation of a prediction."""
        return (
            f"{self.layer * 1e6:.3g} us a layer and step, {self.activation * 1e9:.3g} ns a token, layer and unit of width,"
            f" {self.rate:.3g} FLOP/s"
        )


LIKE_RUNS = 0.05
"""Spread of ln speed between runs of one shape."""
LAYER = (1e-3, 1.0)
"""Seconds of a layer and step before anything is measured, and the spread of their logarithm: some hundred launches."""
BALANCE = (128.0, 0.7)
"""Width at which a layer's element-wise work takes as long as its products, and the spread of its logarithm."""
PRODUCTS = (0.8, 0.5)
"""Share of the peak that large matrix products reach, and the spread of its logarithm."""


@functools.lru_cache(maxsize=64)
def fit_speed(points: tuple[tuple[float, float, float, float], ...], peak: float) -> Speed:
    """The likeliest `Speed` under measured runs, with what is assumed of a device as what is known beforehand.

    One measured size says how fast all is together and hardly how the time divides, which is what other sizes hang on;
    `LAYER`, `BALANCE` and `PRODUCTS` then decide. Further sizes outvote them.

    Args:
        points: The `Work` of a token and its seconds on one device.
        peak: FLOP/s of one device.
    """
    import numpy as np
    from numpy.typing import NDArray
    from scipy.optimize import least_squares

    *work, seconds = np.array(points).T
    # Runs of one size are one observation with many repeats: their systematic error is shared.
    _, size, counts = np.unique(work[2], return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(counts[size]) / LIKE_RUNS
    rate = peak * PRODUCTS[0]
    known = np.log([LAYER[0], _WEIGHTS_OF_A_LAYER * BALANCE[0] * 6.0 / rate, rate])
    spread = np.array([LAYER[1], BALANCE[1], PRODUCTS[1]])

    def misfit(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        layer, activation, rate = np.exp(logarithms)
        predicted = layer * work[0] + activation * work[1] + work[2] / rate
        return np.concatenate([weight * np.log(predicted / seconds), (logarithms - known) / spread])

    layer, activation, rate = np.exp(least_squares(misfit, known).x).tolist()
    return Speed(layer=layer, activation=activation, rate=rate)


_WEIGHTS_OF_A_LAYER = 12.0
"""Of a Llama-like block over its width squared, near enough for what is known beforehand."""


def wall_hours(hours: Iterable[float], slots: int) -> float:
    """Hours until the last run ends where `slots` run at once, each free slot taking the next of the list."""
    free = [0.0] * max(slots, 1)
    for each in hours:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def slots(table: PlacementConfig) -> int:
    """Runs at the same time: the array's limit, else what this machine holds."""
    if table.slurm.max_parallel is not None:
        return table.slurm.max_parallel
    if _on_cuda(table):
        return table.runs_per_gpu
    return max(1, (os.cpu_count() or 1) // table.threads)


def assumption(table: PlacementConfig) -> str:
    """What a prediction rests on while nothing was measured."""
    return (
        f"assumed: {table.utilisation:.0%} of {table.peak_flops:.4g} FLOP/s, the peak of {table.accelerator}"
        f" (FLOPs with head and causal attention)"
    )


def _on_cuda(table: PlacementConfig) -> bool:
    return table.device == "cuda" or (table.device == "auto" and table.accelerator != "cpu")


def _same_kind(record: RunRecord, run: PlannedRun, table: PlacementConfig) -> bool:
    return (
        record.spec.optimizer.name == run.spec.optimizer.name
        and record.spec.precision == run.spec.precision
        and (record.device.kind == "cuda") == _on_cuda(table)
    )


def _tokens_per_second(record: RunRecord) -> float:
    """Of one device."""
    return record.tokens_per_second / record.device.count


def _flops_per_second(record: RunRecord) -> float:
    return _tokens_per_second(record) * train_flops_per_token(record.spec.model, CONVENTION)


def plan_costs(plan: CampaignPlan) -> dict[str, Cost]:
    """Predicted time of every run, by id."""
    measured = measured_runs(plan.root)
    return {run.id: predict(run, plan.placements[run.rung], measured) for run in plan.runs}


def tuning_hours(plan: CampaignPlan, costs: dict[str, Cost]) -> list[tuple[float, PlacementConfig]]:
    """GPU-hours and placement of each study of ``[tune]``, with every trial counted at full length.

    Args:
        plan: The plan of a campaign, with or without ``[tune]``.
        costs: Predicted time of every run, by id, as from `plan_costs`.
    """
    table = plan.campaign.tune
    if table is None:
        return []
    run_of = {(run.arm, run.rung): run for run in plan.runs}
    found = []
    for rung in tuned_rungs(plan.campaign, plan.rungs):
        for arm in plan.campaign.arms:
            run = run_of.get((arm.name, rung.name))
            if arm.tuned and run is not None:
                trials = trials_of(table, dimensions_of(plan.campaign, arm, rung))
                found.append((costs[run.id].gpu_hours * trials, plan.placements[rung.name]))
    return found
