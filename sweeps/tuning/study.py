"""One study: an arm at a rung. ProposedTrial and told in generations, from records alone.

The trials of a generation are asked together and see only the generations before theirs, so what is asked does not
depend on which of them ends first, nor on how often the tuner was killed: the set of trials is a function of the
campaign. No process holds the study. Who steps it takes the journal, tells what the run directories say, asks what is
missing, and lets go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from scaling.errors import UserError
from scaling.flops import train_flops
from scaling.io import Strict
from scaling.run.directory import RunDirectory
from scaling.run.record import RunRecord
from scaling.spec import Budget, RunSpec
from sweeps.config.search_space import Dimension, Values, with_values
from sweeps.config.tune import HalvingConfig
from sweeps.config.tuning_results import Bracket
from sweeps.tuning.bracket import brackets
from sweeps.tuning.samplers import CompletedTrial, Sampling, grid, propose
from sweeps.tuning.trials import add_running, tell

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution
    from optuna.study import Study as OptunaStudy
    from optuna.trial import FrozenTrial

FAILURES = 5
"""Trials of one study whose runs may fail before it is given up."""

OTHER_POINTS = 10_000
"""Where the quasi-random sequence goes on for trials whose proposal was tried before."""


class ProposedTrial(Strict, frozen=True):
    """One line of trials.jsonl: what the journal can be rebuilt from, together with the runs' records."""

    study: str
    number: int
    values: Values
    run: str


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial as the journal and the records have it."""

    number: int
    values: Values
    run: str
    state: str
    """``running``, ``complete``, ``pruned`` or ``failed``."""
    loss: float | None
    """What was told; a diverged run counts as guessing uniformly."""


@dataclass(frozen=True, kw_only=True)
class TuningStudy:
    """What is searched for one arm at one rung, and how. Everything that changes is in the journal and the records."""

    name: str
    arm: str
    rung: str
    template: RunSpec
    """The run that the searched hyper-parameters are put into."""
    dimensions: tuple[Dimension, ...]
    sampling: Sampling
    trials: int
    in_flight: int
    widen: int
    halving: HalvingConfig | None = None
    held_out: bool = False
    records: RecordsOf = field(compare=False)
    _judged: dict[Any, tuple[Bracket, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Brackets by the trials behind them: a step asks for the same ones again and again."""

    def __post_init__(self) -> None:
        """Refuse a grid of another size than is wanted."""
        if self.sampling.sampler == "grid" and self.trials != len(grid(self.dimensions)):
            raise ValueError(f"{self.name}: a grid of {len(grid(self.dimensions))} points and {self.trials} trials")

    @property
    def guess(self) -> float:
        """The loss of a uniform guess, nats per token: what a diverged run is told as."""
        return math.log(self.template.model.vocabulary)

    def spec(self, values: Values) -> RunSpec:
        """The full run of a setting."""
        return with_values(self.template, values)

    def short_spec(self, values: Values) -> RunSpec | None:
        """The smaller run that halving begins with, with a complete schedule of its own."""
        if self.halving is None:
            return None
        full = self.spec(values)
        share = self.halving.share
        tokens = max(round(full.budget.tokens * share), full.batch_tokens)
        decay = full.schedule.decay_tokens
        schedule = msgspec.structs.replace(
            full.schedule,
            warmup_tokens=round(full.schedule.warmup_tokens * share),
            decay_tokens=None if decay is None else round(decay * share),
        )
        budget = Budget(tokens=tokens, flops=train_flops(full.model, tokens))
        return msgspec.structs.replace(full, budget=budget, schedule=schedule)

    def read(self, study: OptunaStudy) -> list[Trial]:
        """All trials by number."""
        return [_trial(trial) for trial in study.get_trials(deepcopy=False)]

    def seen(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials, those whose run is done as if they had been told."""
        done = [self.records.of(trial.run) if trial.state == "running" else None for trial in trials]
        return [
            msgspec.structs.replace(trial, state="complete", loss=self.loss(record)) if record else trial
            for trial, record in zip(trials, done, strict=True)
        ]

    def step(self, study: OptunaStudy, *, failed: Iterable[str] = ()) -> None:
        """Tell what has ended and ask what is missing; call it while the journal is held.

        Args:
            study: This study in the journal.
            failed: Ids of runs that were tried and cannot be run.

        Raises:
            UserError: Too many runs failed, or the trials on disk belong to another template.
        """
        trials = self.read(study)
        self._refuse_foreign(trials)
        while True:
            if self._tell(study, trials, set(failed)):
                trials = self.read(study)
            missing = self.missing(trials)
            if not missing:
                break
            for _ in range(missing):
                values = self.next_values(trials)
                run = self.spec(values).id
                distributions = {d.name: _distribution(d, values[d.name]) for d in self.ranges(trials)[0]}
                add_running(study, values, distributions, run)
                trials = self.read(study)
            # A setting that another study or campaign has run is told at once, and the next generation follows.

    def missing(self, trials: Sequence[Trial]) -> int:
        """How many trials are to be asked now: the rest of a generation, or the next one if all are told."""
        live = _live(trials)
        if len(trials) - len(live) > FAILURES:
            raise UserError(
                f"{self.name}: {len(trials) - len(live)} trials failed, the last as run {trials[-1].run}. "
                "Fix what its log says; then the same command goes on, with other trials in their place."
            )
        untold = [index for index, trial in enumerate(live) if trial.state == "running"]
        generation = (untold[0] if untold else len(live)) // self.in_flight
        return max(0, min((generation + 1) * self.in_flight, self.trials) - len(live))

    def next_values(self, trials: Sequence[Trial]) -> Values:
        """The setting of the next trial: a function of the generations before its own."""
        live = _live(trials)
        index = len(live)
        first = index // self.in_flight * self.in_flight
        seen = [
            CompletedTrial(
                values=trial.values,
                loss=trial.loss if number < first else None,
                pruned=number < first and trial.state == "pruned",
            )
            for number, trial in enumerate(live)
        ]
        dimensions, _ = self.ranges(trials)
        context = self.template.model.context
        values = propose(self.sampling, dimensions, seen, index, context)
        tried = [trial.values for trial in trials]
        again = msgspec.structs.replace(self.sampling, sampler="quasi-random")
        for other in range(OTHER_POINTS) if self.sampling.sampler != "grid" else ():
            if values not in tried:
                break
            values = propose(again, dimensions, seen, OTHER_POINTS + index + other, context)
        return values

    def ranges(self, trials: Sequence[Trial]) -> tuple[tuple[Dimension, ...], dict[str, int]]:
        """What is searched by now, and how often each range was widened.

        A range grows between generations, once the quasi-random start is over, where the optimum of the trials so far
        is on its edge. It takes no further trials, so that arms stay equal.
        """
        dimensions, counts = list(self.dimensions), {d.name: 0 for d in self.dimensions}
        live = _live(trials)
        for end in range(self.in_flight, min(len(live), self.trials - 1) + 1, self.in_flight):
            told = live[:end]
            growing = self.widen and not all(d.values for d in dimensions)
            if not growing or end < self.sampling.startup or any(trial.state == "running" for trial in told):
                continue
            for number, found in enumerate(self._brackets(told, dimensions)):
                grown = dimensions[number].widened(down=found.verdict == "low edge")
                if "edge" in found.verdict and grown is not None and counts[found.name] < self.widen:
                    dimensions[number] = grown
                    counts[found.name] += 1
        return tuple(dimensions), counts

    def brackets(self, trials: Sequence[Trial]) -> tuple[Bracket, ...]:
        """The verdict on each hyper-parameter from the trials told so far; on an edge, why it was left there."""
        dimensions, counts = self.ranges(trials)
        judged = []
        for dimension, found in zip(dimensions, self._brackets(trials, dimensions), strict=False):
            note = ""
            if "edge" in found.verdict:
                if dimension.values:
                    note = "only the listed values were to be tried"
                elif dimension.widened(down=found.verdict == "low edge") is None:
                    note = "the limit of the hyper-parameter's own row is reached"
                elif counts[found.name] >= self.widen:
                    note = f"it was widened {counts[found.name]} times, which is the cap"
                else:
                    note = "no trials were left to widen it for"
            judged.append(msgspec.structs.replace(found, widened=counts[found.name], note=note))
        return tuple(judged)

    def wanted(self, trials: Sequence[Trial]) -> list[RunSpec]:
        """Runs that the trials in flight need next: the smaller ones first where there is halving."""
        runs = []
        for trial in _live(trials):
            if trial.state != "running":
                continue
            short = self.short_spec(trial.values)
            if short is not None and self.records.of(short.id) is None:
                runs.append(short)
            elif short is None or self._promoted(trials, trial):
                runs.append(self.spec(trial.values))
        return runs

    def _tell(self, study: OptunaStudy, trials: Sequence[Trial], failed: set[str]) -> bool:
        told = False
        for trial in trials:
            if trial.state != "running":
                continue
            record = self.records.of(trial.run)
            short = self.short_spec(trial.values)
            if record is not None:
                tell(study, trial.number, self.loss(record))
            elif trial.run in failed or (short is not None and short.id in failed):
                tell(study, trial.number, None)
            elif short is not None and self._promoted(trials, trial) is False:
                small = self.records.of(short.id)
                assert small is not None
                tell(study, trial.number, self.loss(small), pruned_at=small.tokens)
            else:
                continue
            told = True
        return told

    def _promoted(self, trials: Sequence[Trial], trial: Trial) -> bool | None:
        """Whether a trial's small run was among the better of its generation; None until all of them are done."""
        assert self.halving is not None
        live = _live(trials)
        number = live.index(trial)
        first = number // self.in_flight * self.in_flight
        peers = live[first : min(first + self.in_flight, self.trials)]
        if len(peers) < min(self.in_flight, self.trials - first):
            return None
        losses = {}
        for peer in peers:
            short = self.short_spec(peer.values)
            record = self.records.of(short.id) if short else None
            if record is None:
                return None
            losses[peer.number] = self.loss(record)
        kept = math.ceil(self.halving.keep * len(peers))
        return trial.number in sorted(losses, key=lambda peer: (losses[peer], peer))[:kept]

    def loss(self, record: RunRecord) -> float:
        """What a record is told as."""
        loss = record.validation_loss
        return self.guess if loss is None else min(loss, self.guess)

    def _brackets(self, trials: Sequence[Trial], dimensions: Sequence[Dimension]) -> tuple[Bracket, ...]:
        finished = [
            (trial.values, trial.loss)
            for trial in trials
            if trial.state == "complete" and trial.loss is not None and trial.loss < self.guess
        ]
        key = (
            tuple((tuple(values.items()), loss) for values, loss in finished),
            tuple((d.search.low, d.search.high) for d in dimensions),
        )
        if key not in self._judged:
            self._judged[key] = brackets(finished, dimensions, seed=self.sampling.seed)
        return self._judged[key]

    def _refuse_foreign(self, trials: Sequence[Trial]) -> None:
        names = {dimension.name for dimension in self.dimensions}
        for trial in trials:
            if set(trial.values) != names or self.spec(trial.values).id != trial.run:
                raise UserError(
                    f"study {self.name}: trial {trial.number} belongs to run {trial.run}, which this campaign does not "
                    "make: its data, its model or what it searches were changed since. Give the campaign another name, "
                    "or move its tuning folder away; finished runs are found again."
                )


class RecordsOf:
    """Records of runs by id, read once each."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._known: dict[str, RunRecord] = {}

    def of(self, run: str) -> RunRecord | None:
        """What came out of a run; None while it is not done."""
        if run not in self._known:
            record = RunDirectory(self.runs / run).record()
            if record is None:
                return None
            self._known[run] = record
        return self._known[run]


def rebuild(study: OptunaStudy, lines: Sequence[ProposedTrial], dimensions: Sequence[Dimension]) -> int:
    """Trials that were asked and that the journal has lost, put back as running ones; how many."""
    there = len(study.get_trials(deepcopy=False))
    for line in sorted(lines, key=lambda line: line.number)[there:]:
        distributions = {d.name: _distribution(d, line.values[d.name]) for d in dimensions}
        add_running(study, line.values, distributions, line.run)
    return max(0, len(lines) - there)


def _live(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that count: a failed one is asked again as another."""
    return [trial for trial in trials if trial.state != "failed"]


def _trial(trial: FrozenTrial) -> Trial:
    return Trial(
        number=trial.number,
        values={name: float(value) for name, value in trial.params.items()},
        run=str(trial.user_attrs["run"]),
        state={"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
        loss=trial.value,
    )


def _distribution(dimension: Dimension, value: float) -> FloatDistribution:
    """What the journal says about a value: its range, as wide as it was then, on a plain or a log axis."""
    from optuna.distributions import FloatDistribution

    low, high = (
        (dimension.values[0], dimension.values[-1])
        if dimension.values
        else (dimension.search.low, dimension.search.high)
    )
    return FloatDistribution(min(low, value), max(high, value), log=dimension.search.scale == "log")
