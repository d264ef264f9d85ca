"""A campaign of two tuned arms, and an executor that trains nothing: losses are what a known bowl says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from recorded import write_record

from scaling.spec import RunSpec
from sweeps.campaign import Campaign, load_campaign
from sweeps.plan import Plan
from sweeps.tune import Executed
from sweeps.tuning.facts import Tuning

CAMPAIGN = """
name = "tiny-tuned"
[data]
source = "text"
path = "{text}"
repeat = true
[model]
vocabulary = 256
context = 16
ffn_multiple = 8
[training]
batch_tokens = 128
[evaluation]
tokens = 512
times = 0
[[arms]]
name = "adamw"
optimizer = "adamw"
tuned = true
[[arms]]
name = "muon-reused"
optimizer = "muon"
reuse = "adamw"
[[arms]]
name = "muon"
optimizer = "muon"
tuned = true
[[rungs]]
name = "a"
layers = 1
width = 16
heads = 2
tokens = 3_840
[[rungs]]
name = "b"
layers = 2
width = 16
heads = 2
tokens = 7_680
[[rungs]]
name = "c"
layers = 3
width = 16
heads = 2
tokens = 15_360
[[rungs]]
name = "d"
layers = 4
width = 16
heads = 2
tokens = 30_720
[tune]
{tune}
[placement]
device = "cpu"
"""

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


def loader(text: Path, folder: Path) -> Callable[..., Campaign]:
    """Writes variants of the campaign to a folder and loads them."""

    def load(table: str = TUNE, *, name: str = "tiny-tuned") -> Campaign:
        file = folder / f"{name}.toml"
        file.write_text(CAMPAIGN.format(text=text, tune=table).replace("tiny-tuned", name))
        return load_campaign(file)

    return load


def bowl(spec: RunSpec) -> float:
    """A known bowl: AdamW's best rate falls with compute as C^-0.25, Muon's lies three times higher and stays."""
    compute = float(spec.budget.flops)
    best = 0.01 * (compute / 1e8) ** -0.25 if spec.optimizer.name == "adamw" else 0.03
    gain = 0.0 if spec.optimizer.name == "adamw" else 0.1
    rate = math.log(spec.optimizer.peak_lr / best) ** 2
    decay = math.log(spec.optimizer.weight_decay / 0.1) ** 2
    return 4.0 * (compute / 1e8) ** -0.05 - gain + 0.05 * rate + 0.01 * decay


def recorder(
    loss: Callable[[RunSpec], float | None] = bowl, log: list[str] | None = None
) -> Callable[[Plan], Executed]:
    """An executor that trains nothing and writes what the bowl says."""

    def execute(trials: Plan) -> Executed:
        for run in trials.distinct():
            directory = trials.directory(run)
            if directory.record() is None:
                directory.create(run.spec, run.placement)
                write_record(directory, run.spec, loss(run.spec))
                if log is not None:
                    log.append(run.id)
        return Executed(failed={}, waiting=False)

    return execute


def told(tuning: Tuning) -> list[tuple[object, ...]]:
    """Everything that trials are: what was tried where, in which order, and with which loss."""
    return [
        (s.arm, s.rung, t.number, sorted(t.values.items()), t.run, t.loss) for s in tuning.studies for t in s.trials
    ]
