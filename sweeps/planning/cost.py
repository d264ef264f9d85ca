"""Predicted cost of a campaign: hours of each run, from measured runs if there are any, else from an assumed speed.

Speeds are FLOP/s under the convention ``attention`` (head and causal attention counted), because 6ND leaves out work that
takes a third of the time of a small model. Each prediction names its basis.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from scaling.errors import UserError
from scaling.flops import train_flops, train_flops_per_token
from scaling.model_config import ModelConfig
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.directory import RunDirectory
from scaling.run.record import Code, RunRecord, RunState
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
    """Measured runs behind the prediction: this run, runs of its shape and optimizer, other runs, or none."""
    explanation: str
    devices: float = 1.0
    """GPUs that the run occupies, idle ones included; a fraction if runs share a GPU; 1 without GPUs."""

    @property
    def gpu_hours(self) -> float:
        """Hours times devices."""
        return self.hours * self.devices


class Measured(NamedTuple):
    """Speed of a run that is finished or under way."""

    spec: RunSpec
    cuda: bool
    tokens_per_second: float
    """Speed of one device."""
    seconds: float | None = None
    """Training time of a finished run; None for one under way."""


class Measurements:
    """Measured speeds by run id, in groups of comparable runs, so that a prediction is linear in its group."""

    def __init__(self, runs: Mapping[str, Measured]) -> None:
        self.runs = runs
        self._groups: dict[tuple[object, ...], list[Measured]] = {}
        self._speeds: dict[tuple[object, ...], Speed] = {}
        for run in runs.values():
            device = (run.spec.precision, run.cuda)
            optimizer = (*device, run.spec.optimizer.name)
            for key in (device, optimizer, (*optimizer, run.spec.model)):
                self._groups.setdefault(key, []).append(run)
        self._rates = {
            key: statistics.median(run.tokens_per_second for run in group) * train_flops_per_token(model, CONVENTION)
            for key, group in self._groups.items()
            if isinstance(model := key[-1], ModelConfig)
        }

    def rate(self, spec: RunSpec, *, cuda: bool) -> float | None:
        """Median FLOP/s of one device over runs of the same shape, optimizer and precision; None without such runs."""
        return self._rates.get((spec.precision, cuda, spec.optimizer.name, spec.model))

    def speed(self, spec: RunSpec, peak: float, *, cuda: bool) -> tuple[Speed, str] | None:
        """`fit_speed` over comparable runs of other sizes, and a description of those runs; None without such runs.

        Without runs of the same optimizer those of another one are used: the optimizer's matrix products are part of
        the `Work`, and times of arms are only comparable if they rest on the same assumptions.
        """
        device = (spec.precision, cuda)
        key = next((k for k in ((*device, spec.optimizer.name), device) if k in self._groups), None)
        if key is None:
            return None
        group = self._groups[key]
        if (*key, peak) not in self._speeds:
            points = tuple(sorted((*work_of(run.spec), 1.0 / run.tokens_per_second) for run in group))
            self._speeds[*key, peak] = fit_speed(points, peak)
        sizes = len({run.spec.model for run in group})
        source = "runs of another optimizer" if key == device else f"{sizes} other size{'s' * (sizes > 1)}"
        return self._speeds[*key, peak], source


def records_under(root: Path) -> dict[str, RunRecord]:
    """Readable records of all runs under a root, by id."""
    found = {}
    for file in sorted((root / "runs").glob("*/record.json")):
        with contextlib.suppress(UserError):
            record = RunDirectory(file.parent).record()
            if record is not None:
                found[file.parent.name] = record
    return found


def measured_runs(records: Mapping[str, RunRecord]) -> dict[str, Measured]:
    """Speeds of the finished runs, by id."""
    return {
        run: Measured(
            spec=record.spec,
            cuda=record.device.kind == "cuda",
            tokens_per_second=record.tokens_per_second / record.device.count,
            seconds=record.seconds,
        )
        for run, record in records.items()
        if record.status == "finished" and record.tokens_per_second > 0
    }


def predict(run: PlannedRun, table: PlacementConfig, measured: Measurements) -> Cost:
    """Hours of one run; its rung's placement gives the assumed speed where nothing was measured."""
    work = train_flops(run.spec.model, run.spec.budget.tokens, CONVENTION)
    cuda, devices = table.on_cuda, table.processes

    def cost(hours: float, basis: Basis, explanation: str) -> Cost:
        return Cost(hours=hours, devices=table.gpus or 1.0, basis=basis, explanation=explanation)

    itself = measured.runs.get(run.id)
    if itself is not None and itself.seconds is not None:
        return cost(itself.seconds / 3600, "itself", "measured")
    rate = measured.rate(run.spec, cuda=cuda)
    if rate is not None:
        return cost(work / rate / devices / 3600, "like", f"{rate:.3g} FLOP/s, measured at this size")
    peak = table.peak_flops
    fitted = measured.speed(run.spec, peak, cuda=cuda)
    if fitted is not None:
        speed, source = fitted
        seconds = run.spec.budget.tokens * speed.seconds_per_token(work_of(run.spec)) / devices
        return cost(seconds / 3600, "fitted", f"{speed}, from {source}")
    return cost(work / (peak * table.utilisation) / devices / 3600, "assumed", f"assumed: {assumption(table)}")


class Work(NamedTuple):
    """Work of a device for one token."""

    layers: float
    """Layers over tokens of a batch, which share a step's fixed work."""
    activations: float
    """Layers times width, which element-wise work grows with."""
    flops: float
    """FLOPs of matrix products, the optimizer's included."""


def work_of(spec: RunSpec) -> Work:
    """The `Work` for one token of a run."""
    shape = spec.model
    products = train_flops_per_token(shape, CONVENTION) + run_optimizer_flops(spec) / spec.budget.tokens
    return Work(layers=shape.layers / spec.batch_tokens, activations=shape.layers * shape.width, flops=products)


class Speed(NamedTuple):
    """Time of each kind of `Work` on one device."""

    layer: float
    """Seconds per layer and step: kernel launches, Python, the optimizer's element-wise passes."""
    activation: float
    """Seconds per token, layer and unit of width: norms, softmax, gates, residual sums, forward and backward."""
    rate: float
    """FLOP/s of matrix products."""

    def seconds_per_token(self, work: Work) -> float:
        """``layer * layers + activation * activations + flops / rate``: the three do not overlap."""
        return self.layer * work.layers + self.activation * work.activations + work.flops / self.rate

    def __str__(self) -> str:
        """The three times, for the explanation of a prediction."""
        activation = f"{self.activation * 1e9:.3g} ns a token, layer and unit of width"
        return f"{self.layer * 1e6:.3g} us a layer and step, {activation}, {self.rate:.3g} FLOP/s"


SAME_SHAPE_SPREAD = 0.05
"""Standard deviation of ln speed between runs of one shape."""
LAYER_PRIOR = (1e-3, 1.0)
"""Seconds per layer and step before anything is measured (some hundred launches), and the deviation of its logarithm."""
BALANCE_PRIOR = (128.0, 0.7)
"""Width at which a layer's element-wise work takes as long as its products, and the deviation of its logarithm."""
PRODUCTS_PRIOR = (0.8, 0.5)
"""Share of the peak that large matrix products reach, and the deviation of its logarithm."""
PARAMETERS_PER_SQUARED_WIDTH = 12.0
"""Parameters of a Llama-like block over its squared width, approximately."""


def fit_speed(points: tuple[tuple[float, float, float, float], ...], peak: float) -> Speed:
    """The most probable `Speed` given measured runs and the priors above.

    It minimises, over the logarithms x of the three times::

        sum_i w_i^2 ln(predicted_i(x) / seconds_i)^2  +  sum_j ((x_j - prior_j) / spread_j)^2

    One measured size tells the total time but hardly its division into three parts, which decides the times of other
    sizes; there the priors decide. Further sizes outweigh them.
    `points` are the `Work` of a token and its seconds on one device; `peak` is the FLOP/s of one device.
    """
    import numpy as np
    from numpy.typing import NDArray
    from scipy.optimize import least_squares

    *work, seconds = np.array(points).T
    # Runs of one size share their systematic error, so n of them weigh as much as one run: each gets 1 / sqrt(n).
    _, size, counts = np.unique(work[2], return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(counts[size]) / SAME_SHAPE_SPREAD
    rate = peak * PRODUCTS_PRIOR[0]
    # At the balance width W: activation * W = 6 * 12 W^2 / rate per layer and token, hence activation = 72 W / rate.
    prior = np.log([LAYER_PRIOR[0], PARAMETERS_PER_SQUARED_WIDTH * BALANCE_PRIOR[0] * 6.0 / rate, rate])
    spread = np.array([LAYER_PRIOR[1], BALANCE_PRIOR[1], PRODUCTS_PRIOR[1]])

    def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        layer, activation, rate = np.exp(logarithms)
        predicted = layer * work[0] + activation * work[1] + work[2] / rate
        return np.concatenate([weight * np.log(predicted / seconds), (logarithms - prior) / spread])

    layer, activation, rate = np.exp(least_squares(residuals, prior).x).tolist()
    return Speed(layer=layer, activation=activation, rate=rate)


def wall_hours(hours: Iterable[float], slots: int) -> float:
    """Hours until the last run ends if `slots` run at the same time and each free slot takes the next of the list."""
    free = [0.0] * max(slots, 1)
    for each in hours:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def slots(table: PlacementConfig) -> int:
    """Runs at the same time: the limit of the SLURM array, else the capacity of this machine."""
    if table.slurm.max_parallel is not None:
        return table.slurm.max_parallel
    if table.on_cuda:
        return table.runs_per_gpu
    return max(1, (os.cpu_count() or 1) // table.threads)


def assumption(table: PlacementConfig) -> str:
    """The assumed speed of a device, in words."""
    peak = f"{table.peak_flops:.4g} FLOP/s, the peak of {table.accelerator}"
    return f"{table.utilisation:.0%} of {peak}, for FLOPs with head and causal attention"


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """States and predicted costs of a plan's runs, read from disk once."""

    states: dict[str, RunState]
    costs: dict[str, Cost]
    code: tuple[Code, ...] = ()
    """Code of the runs that are finished or diverged."""


def outlook(plan: CampaignPlan) -> Outlook:
    """States, costs and code of every run; reads each record under the root once."""
    records = records_under(plan.root)
    runs = plan.distinct()
    done = {run.id: records[run.id] for run in runs if run.id in records}
    return Outlook(
        states={run.id: done[run.id].status if run.id in done else plan.state(run) for run in runs},
        costs=plan_costs(plan, measured_runs(records)),
        code=tuple(record.code for record in done.values()),
    )


def plan_costs(plan: CampaignPlan, measured: dict[str, Measured] | None = None) -> dict[str, Cost]:
    """Predicted time of every run, by id; by default from all measured runs under the root."""
    known = Measurements(measured_runs(records_under(plan.root)) if measured is None else measured)
    return {run.id: predict(run, plan.placements[run.rung], known) for run in plan.runs}


def tuning_hours(plan: CampaignPlan, costs: Mapping[str, Cost]) -> list[tuple[float, PlacementConfig]]:
    """GPU-hours and placement of each study of ``[tune]``, with every trial counted at full length."""
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


def hours_text(hours: float) -> str:
    """A duration in a readable unit: seconds, minutes or hours."""
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"
