"""tuning.json: what was tuned, with how much, what came out, and what follows. Everything in it comes from records.

Whoever audits or plots reads this file. Losses are held-out, in nats per token, at the end of a complete schedule;
FLOPs are 6ND; a ``None`` is a number that could not be given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scaling.io import Strict
from sweeps.config.search_space import Values


class TrialResult(Strict, frozen=True):
    """One trial."""

    number: int
    values: Values
    run: str
    """Id of the full run."""
    state: Literal["running", "finished", "diverged", "pruned", "failed"]
    loss: float | None
    short_run: str | None = None
    """Id of the smaller run that halving begins with."""
    short_loss: float | None = None


class StudyResult(Strict, frozen=True):
    """One arm at one rung."""

    arm: str
    rung: str
    optimizer: str
    params: int
    """Weights of the blocks."""
    tokens: int
    flops: int
    """Of one full run."""
    wanted: int
    """Trials."""
    told: int
    """Trials that came to an end: finished, diverged or pruned."""
    failed: int
    diverged: int
    pruned: int
    flops_spent: int
    """Of all runs of the study, each counted once."""
    best_loss: float | None
    best_run: str | None
    best_values: Values
    brackets: tuple[Bracket, ...]
    """Verdict ``bracketed`` for each searched hyper-parameter is what a reader hopes for."""
    trials: tuple[TrialResult, ...]
    manifest: str | None
    """SHA-256 of the data manifest, and"""
    data_seed: int
    """the seed: together they say which tokens came in which order."""
    schedule: str
    held_out: bool
    """Whether the law never saw this rung."""


class FittedRule(Strict, frozen=True):
    """One hyper-parameter of one arm as ``coefficient * C**exponent``, C in FLOPs."""

    name: str
    coefficient: float
    exponent: float
    low: float | None
    """95 % interval of the exponent."""
    high: float | None
    rungs: tuple[str, ...]
    """Whose optima it was fitted to."""
    kind: Literal["power", "constant"]
    note: str = ""


class TransferResult(Strict, frozen=True):
    """A rung that the law never saw: the loss where the law points, against the best that a study of its own found."""

    arm: str
    rung: str
    values: Values
    """That the law predicts."""
    run: str
    predicted_loss: float | None
    tuned_loss: float | None
    regret: float | None
    """Predicted minus tuned, nats per token; what the transfer costs."""


class ArmTuning(Strict, frozen=True):
    """One arm of the campaign."""

    arm: str
    optimizer: str
    how: Literal["tuned", "reused", "fixed"]
    reuses: str | None
    trials: int
    """Told, over all its studies."""
    flops: int
    """Spent on tuning it."""
    tuned_from: float | None
    """Compute of its smallest and largest tuned rung, FLOPs of one run; a rung far outside has an untested setting."""
    tuned_to: float | None


class BudgetRow(Strict, frozen=True):
    """The match ratio if each arm had had only so many trials."""

    arm: str
    """The challenger."""
    baseline: str
    against: Literal["equal", "full"]
    """Whether the challenger had as few, or all of its trials while only the baseline had few."""
    trials: int
    ratio: float
    """Challenger compute over baseline compute at equal loss: the median over orders of the trials."""
    low: float
    high: float
    """Where 95 % of the orders lie."""


class OutsideRow(Strict, frozen=True):
    """A rung whose setting was carried beyond the compute that its arm was tuned at."""

    arm: str
    rung: str
    flops: int
    """Of its run."""
    times: float
    """How far: its compute over the largest tuned one, or the smallest tuned one over its own."""


class NoiseRow(Strict, frozen=True):
    """Spread over seeds of one arm at one rung."""

    arm: str
    rung: str
    seeds: int
    mean_loss: float
    sd: float
    """Sample standard deviation, nats per token."""


class Tuning(Strict, frozen=True):
    """The whole file."""

    campaign: str
    sampler: str
    sampler_seed: int
    trials: int
    """Of each study."""
    in_flight: int
    complete: bool
    studies: tuple[StudyResult, ...]
    laws: dict[str, tuple[FittedRule, ...]]
    """By arm."""
    transfer: tuple[TransferResult, ...]
    settings: dict[str, dict[str, Values]]
    """By arm and rung; empty until every study is done."""
    sources: dict[str, dict[str, Literal["best trial", "law"]]]
    """Where each setting comes from."""
    arms: tuple[ArmTuning, ...]
    budget: tuple[BudgetRow, ...]
    outside: tuple[OutsideRow, ...]
    """Empty where every rung was tuned or lies between tuned ones; three times and more is a guess."""
    noise: tuple[NoiseRow, ...]
    """Empty until rungs with several seeds are trained."""
    search: str | None = None
    """`search_hash` of the ``[tune]`` table that was searched; None in files of earlier versions."""


def facts_file(root: Path, campaign: str) -> Path:
    """Where a campaign's tuning.json lies."""
    return root / "results" / campaign / "tuning.json"


Verdict = Literal["bracketed", "low edge", "high edge", "flat", "too few"]
"""``flat``: the loss does not tell where the optimum is; ``too few``: fewer trials than the parabola has numbers."""


class Bracket(Strict, frozen=True):
    """Where the optimum of one hyper-parameter lies."""

    name: str
    verdict: Verdict
    best: float
    """In the best trial."""
    optimum: float
    """The parabola's lowest point, or `best` where there is none inside the range."""
    low: float | None
    """95 % interval of the optimum; None where the parabola is not resolved."""
    high: float | None
    range_low: float
    """What was searched in the end."""
    range_high: float
    searched_low: float
    """The lowest and highest values that were tried."""
    searched_high: float
    curvature: float
    """Second derivative of the loss on the scale, nats per squared unit; 0 where it was not fitted."""
    widened: int = 0
    """Times that the range was widened."""
    note: str = ""
    """Why a search on the edge was not widened."""
