"""A campaign of two tuned arms, and an executor that writes records with the losses of a known bowl."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from recorded import write_record
from tiny import ON_CPU, arm_table, campaign_head, rung_table

from scaling.spec import RunSpec
from sweeps.config.campaign import Campaign, load_campaign
from sweeps.config.tuning_results import Tuning
from sweeps.planning.plan import CampaignPlan
from sweeps.tuning.tuner import ExecutionResult

CAMPAIGN = (
    campaign_head("tiny-tuned")
    + arm_table("adamw", "tuned = true")
    + arm_table("muon-reused", 'reuse = "adamw"', optimizer="muon")
    + arm_table("muon", "tuned = true")
    + "".join(rung_table(name, layers=layers, tokens=1_920 * 2**layers) for layers, name in enumerate("abcd", start=1))
    + "[tune]\n{tune}\n"
    + ON_CPU
)

TUNE = """
trials = 8
startup = 4
in_flight = 2
rungs = ["a", "b"]
held_out = ["c"]
[tune.search.peak_lr]
low = 1e-3
high = 1e-1
[tune.search.weight_decay]
low = 0.02
high = 0.5
"""


Load = Callable[..., Campaign]


def loader(text: Path, folder: Path) -> Load:
    """A function that writes a variant of the campaign to a folder and loads it."""

    def load(table: str = TUNE, *, name: str = "tiny-tuned") -> Campaign:
        file = folder / f"{name}.toml"
        file.write_text(CAMPAIGN.format(text=text, tune=table).replace("tiny-tuned", name))
        return load_campaign(file)

    return load


def bowl(spec: RunSpec) -> float:
    """The loss of a run: AdamW's best rate falls with compute as C^-0.25, Muon's is constant at 0.03."""
    compute = float(spec.budget.flops)
    best = 0.01 * (compute / 1e8) ** -0.25 if spec.optimizer.name == "adamw" else 0.03
    gain = 0.0 if spec.optimizer.name == "adamw" else 0.1
    rate = math.log(spec.optimizer.peak_lr / best) ** 2
    decay = math.log(spec.optimizer.weight_decay / 0.1) ** 2
    return 4.0 * (compute / 1e8) ** -0.05 - gain + 0.05 * rate + 0.01 * decay


def recorder(
    loss: Callable[[RunSpec], float | None] = bowl, log: list[str] | None = None
) -> Callable[[CampaignPlan], ExecutionResult]:
    """An executor that writes records without training; `log` gets the ids in order."""

    def execute(trials: CampaignPlan) -> ExecutionResult:
        for run in trials.distinct():
            directory = trials.directory(run)
            if directory.record() is None:
                directory.create(run.spec, run.placement)
                write_record(directory, run.spec, loss(run.spec))
                if log is not None:
                    log.append(run.id)
        return ExecutionResult(failed={}, waiting=False)

    return execute


def trial_outcomes(tuning: Tuning) -> list[tuple[object, ...]]:
    """Study, number, setting, run and loss of every trial."""
    return [
        (s.arm, s.rung, t.number, sorted(t.values.items()), t.run, t.loss) for s in tuning.studies for t in s.trials
    ]
