"""The format of tuning.json: the studies of a campaign, their trials and best settings, and the rules fitted to them.

Every number comes from records of runs. Losses are held-out, in nats per token, at the end of a complete schedule;
FLOPs are 6ND; None is a number that is not available.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scaling.io import Strict
from scaling.power_rule import PowerRule
from sweeps.config.search_space import Values

Verdict = Literal["bracketed", "low edge", "high edge", "flat", "too few"]
"""``flat``: the loss does not depend visibly on the value; ``too few``: fewer trials than the parabola has numbers."""


class Bracket(Strict, frozen=True):
    """Position of the optimum of one hyper-parameter in its search range."""

    name: str
    verdict: Verdict
    best: float
    """Value in the best trial."""
    optimum: float
    """Minimum of the parabola, or `best` where it has none inside the range."""
    low: float | None
    """95 % interval of the optimum; None where the parabola is not resolved."""
    high: float | None
    range_low: float
    """Ends of the final search range."""
    range_high: float
    searched_low: float
    """Lowest and highest values tried."""
    searched_high: float
    curvature: float
    """Second derivative of the loss on the scale of the search, nats per squared unit; 0 without a fit."""
    widened: int = 0
    """Number of times that the range was widened."""
    note: str = ""
    """Reason why a search that ends on an edge was not widened."""


class TrialResult(Strict, frozen=True):
    """One trial of a study."""

    number: int
    values: Values
    run: str
    """Id of the full run."""
    state: Literal["running", "finished", "diverged", "pruned", "failed"]
    loss: float | None
    short_run: str | None = None
    """Id of the shorter run that comes first under halving."""
    short_loss: float | None = None


class StudyResult(Strict, frozen=True):
    """The study of one arm at one rung."""

    arm: str
    rung: str
    optimizer: str
    params: int
    """Parameters of the blocks."""
    tokens: int
    flops: int
    """FLOPs of one full run."""
    planned: int
    """Trials that the study is to complete."""
    completed: int
    """Trials that are finished, diverged or pruned."""
    failed: int
    diverged: int
    pruned: int
    flops_spent: int
    """FLOPs of all runs of the study, each counted once."""
    best_loss: float | None
    best_run: str | None
    best_values: Values
    brackets: tuple[Bracket, ...]
    trials: tuple[TrialResult, ...]
    manifest: str | None
    """SHA-256 of the data manifest. With `data_seed` it determines the tokens and their order."""
    data_seed: int
    schedule: str
    held_out: bool
    """True if the rung is left out of the fit of the rules."""


class TransferResult(Strict, frozen=True):
    """A held-out rung: the loss at the setting that the rules predict, against the best of its own study."""

    arm: str
    rung: str
    values: Values
    """The predicted setting."""
    run: str
    predicted_loss: float | None
    tuned_loss: float | None
    regret: float | None
    """Cost of the transfer: `predicted_loss` minus `tuned_loss`, nats per token."""


class ArmTuning(Strict, frozen=True):
    """Tuning of one arm over all its rungs."""

    arm: str
    optimizer: str
    how: Literal["tuned", "reused", "fixed"]
    reuses: str | None
    trials: int
    """Completed trials of all its studies."""
    flops: int
    """FLOPs spent on its studies."""
    tuned_from: float | None
    """FLOPs of one run at its smallest and largest tuned rung; settings far outside are untested."""
    tuned_to: float | None


class BudgetRow(Strict, frozen=True):
    """The match ratio if each arm had had fewer trials."""

    arm: str
    """The challenger."""
    baseline: str
    against: Literal["equal", "full"]
    """``equal``: both arms have `trials`; ``full``: the baseline has `trials`, the challenger all of its own."""
    trials: int
    ratio: float
    """Challenger compute over baseline compute at equal loss: the median over orders of the trials."""
    low: float
    high: float
    """95 % range over orders."""


class OutsideRow(Strict, frozen=True):
    """A rung whose setting is extrapolated beyond the compute at which its arm was tuned."""

    arm: str
    rung: str
    flops: int
    """FLOPs of its run."""
    times: float
    """Its compute over the largest tuned compute, or the smallest tuned compute over its own."""


class NoiseRow(Strict, frozen=True):
    """Spread over seeds of one arm at one rung."""

    arm: str
    rung: str
    seeds: int
    mean_loss: float
    sd: float
    """Sample standard deviation, nats per token."""


class Tuning(Strict, frozen=True):
    """The content of tuning.json."""

    campaign: str
    sampler: str
    sampler_seed: int
    trials: int
    """Trials of each study."""
    in_flight: int
    complete: bool
    studies: tuple[StudyResult, ...]
    rules: dict[str, dict[str, PowerRule]]
    """Fitted rules by arm and hyper-parameter."""
    transfer: tuple[TransferResult, ...]
    settings: dict[str, dict[str, Values]]
    """By arm and rung; empty until every study is complete."""
    sources: dict[str, dict[str, Literal["best trial", "rule"]]]
    """Origin of each setting, by arm and rung."""
    arms: tuple[ArmTuning, ...]
    budget: tuple[BudgetRow, ...]
    outside: tuple[OutsideRow, ...]
    """Empty where every rung was tuned or lies between tuned ones; beyond three times, a setting is a guess."""
    noise: tuple[NoiseRow, ...]
    """Empty until rungs with several seeds are trained."""
    search: str | None = None
    """`search_hash` of the ``[tune]`` table that was searched; None in files of earlier versions."""


def tuning_file(root: Path, campaign: str) -> Path:
    """Path of a campaign's tuning.json."""
    return root / "results" / campaign / "tuning.json"
