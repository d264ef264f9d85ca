"""One study: the search for the best setting of one arm at one rung, in generations.

The trials of a generation are proposed together and depend on earlier generations alone. The set of trials is therefore
a function of the campaign: it depends neither on which run ends first nor on how often the tuner was killed. Every method
is a function of the lines of trials.jsonl and the records of runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from scaling.errors import UserError
from scaling.flops import train_flops
from scaling.run.record import RunRecord
from scaling.spec import Budget, RunSpec
from sweeps.config.search_space import Dimension, Values, with_values
from sweeps.config.tune import TuneConfig
from sweeps.config.tuning_results import Bracket
from sweeps.planning.tuned_settings import trials_of
from sweeps.tuning.bracket import brackets
from sweeps.tuning.samplers import propose
from sweeps.tuning.trials import RecordCache, Trial, TrialLine, TrialState

MAX_FAILED_TRIALS = 5
"""Trials of one study whose runs may fail before the study stops with an error."""

DUPLICATE_OFFSET = 10_000
"""Index at which the quasi-random sequence replaces a proposal that was tried before."""


@dataclass(frozen=True, kw_only=True)
class TuningStudy:
    """The search space, the template and the ``[tune]`` table of one arm at one rung."""

    arm: str
    rung: str
    template: RunSpec
    """The run that the searched hyper-parameters are put into."""
    dimensions: tuple[Dimension, ...]
    config: TuneConfig
    records: RecordCache = field(compare=False)
    _known_brackets: dict[Any, tuple[Bracket, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Brackets by the trials that they were fitted to, because a step needs the same ones several times."""

    @property
    def name(self) -> str:
        """Name of the study in trials.jsonl."""
        return f"{self.arm}/{self.rung}"

    @property
    def trials(self) -> int:
        """Number of trials to complete."""
        return trials_of(self.config, self.dimensions)

    @property
    def held_out(self) -> bool:
        """True if the rung is left out of the fit of the rules."""
        return self.rung in self.config.held_out

    @property
    def uniform_loss(self) -> float:
        """The loss of a uniform guess, nats per token: the loss of a diverged run for the sampler."""
        return math.log(self.template.model.vocabulary)

    def spec(self, values: Values) -> RunSpec:
        """The full run of a setting."""
        return with_values(self.template, values)

    def short_spec(self, values: Values) -> RunSpec | None:
        """The first, shorter run under halving, with a complete schedule of its own; None without halving."""
        if self.config.halving is None:
            return None
        full = self.spec(values)
        share = self.config.halving.share
        tokens = max(round(full.budget.tokens * share), full.batch_tokens)
        decay = full.schedule.decay_tokens
        schedule = msgspec.structs.replace(
            full.schedule,
            warmup_tokens=round(full.schedule.warmup_tokens * share),
            decay_tokens=None if decay is None else round(decay * share),
        )
        budget = Budget(tokens=tokens, flops=train_flops(full.model, tokens))
        return msgspec.structs.replace(full, budget=budget, schedule=schedule)

    def read(self, lines: Sequence[TrialLine]) -> list[Trial]:
        """The trials of the study by number, each with its state."""
        trials = []
        for line in {line.number: line for line in lines}.values():
            record = None if line.failed is not None else self.records.get(line.run)
            state: TrialState = "complete" if record else "running" if line.failed is None else "failed"
            loss = None if record is None else self.loss(record)
            trials.append(Trial(number=line.number, values=line.values, run=line.run, state=state, loss=loss))
        return [self._after_halving(trials, trial) for trial in trials]

    def step(self, lines: Sequence[TrialLine], *, failed: Mapping[str, str]) -> list[TrialLine]:
        """The lines to append: failed trials, then proposals until a generation is in flight or the study is complete.

        `failed` holds reasons by id of runs that an executor could not train.

        Raises:
            UserError: Too many runs failed, or the lines belong to another campaign of the same name.
        """
        new = []
        names = {dimension.name for dimension in self.dimensions}
        for trial in self.read(lines):
            if set(trial.values) != names or self.spec(trial.values).id != trial.run:
                raise UserError(
                    f"study {self.name}: trial {trial.number} belongs to run {trial.run}, which is not a run of this "
                    "campaign: its data, its model or its search space has changed. Give the campaign another name, or "
                    "move its tuning folder away; finished runs are found again."
                )
            short = self.short_spec(trial.values)
            reason = failed.get(trial.run) or (failed.get(short.id) if short else None)
            if trial.state == "running" and reason is not None:
                new.append(self._line(trial.number, trial.values, failed=reason))
        # A setting that another study or campaign has trained is complete at once, and the next generation follows.
        while missing := self.missing(trials := self.read([*lines, *new])):
            for _ in range(missing):
                line = self._line(trials[-1].number + 1 if trials else 0, self.next_values(trials))
                trials.append(Trial(number=line.number, values=line.values, run=line.run, state="running", loss=None))
                new.append(line)
        return new

    def missing(self, trials: Sequence[Trial]) -> int:
        """Number of trials to propose now: the rest of a generation, or the next one if all trials have ended."""
        live = _live(trials)
        if len(trials) - len(live) > MAX_FAILED_TRIALS:
            raise UserError(
                f"{self.name}: {len(trials) - len(live)} trials failed, the last as run {trials[-1].run}. "
                "Fix the cause that its log gives; then run the same command, which continues with other trials."
            )
        running = [index for index, trial in enumerate(live) if trial.state == "running"]
        generation = (running[0] if running else len(live)) // self.config.in_flight
        return max(0, min((generation + 1) * self.config.in_flight, self.trials) - len(live))

    def next_values(self, trials: Sequence[Trial]) -> Values:
        """The setting of the next trial: a function of the generations before its own."""
        live = _live(trials)
        index = len(live)
        first = index // self.config.in_flight * self.config.in_flight
        # The proposal must not depend on which run of its own generation ends first.
        before = [*live[:first], *(msgspec.structs.replace(t, state="running", loss=None) for t in live[first:])]
        dimensions, _ = self.ranges(trials)
        context = self.template.model.context
        values = propose(self.config, dimensions, before, index, context)
        tried = [trial.values for trial in trials]
        quasi_random = msgspec.structs.replace(self.config, sampler="quasi-random")
        for other in range(DUPLICATE_OFFSET) if self.config.sampler != "grid" else ():
            if values not in tried:
                break
            values = propose(quasi_random, dimensions, before, DUPLICATE_OFFSET + index + other, context)
        return values

    def ranges(self, trials: Sequence[Trial]) -> tuple[tuple[Dimension, ...], dict[str, int]]:
        """The current search space, and how often each range was widened.

        After the quasi-random start, a range grows between generations where the optimum of the trials so far is on its
        edge. The number of trials stays the same, so that arms have equal budgets.
        """
        dimensions, counts = list(self.dimensions), {d.name: 0 for d in self.dimensions}
        live = _live(trials)
        if not self.config.widen or all(d.values for d in dimensions):
            return self.dimensions, counts
        for end in range(self.config.in_flight, min(len(live), self.trials - 1) + 1, self.config.in_flight):
            ended = live[:end]
            if end < self.config.startup or any(trial.state == "running" for trial in ended):
                continue
            for number, found in enumerate(self._brackets(ended, dimensions)):
                grown = dimensions[number].widened(down=found.verdict == "low edge")
                if "edge" in found.verdict and grown is not None and counts[found.name] < self.config.widen:
                    dimensions[number] = grown
                    counts[found.name] += 1
        return tuple(dimensions), counts

    def brackets(self, trials: Sequence[Trial]) -> tuple[Bracket, ...]:
        """The bracket of each hyper-parameter from the trials so far, with a note where the search ends on an edge."""
        dimensions, counts = self.ranges(trials)
        found = []
        for dimension, bracket in zip(dimensions, self._brackets(trials, dimensions), strict=False):
            note = ""
            if "edge" in bracket.verdict:
                if dimension.values:
                    note = "only the listed values were allowed"
                elif dimension.widened(down=bracket.verdict == "low edge") is None:
                    note = "the limit of the hyper-parameter's own range is reached"
                elif counts[bracket.name] >= self.config.widen:
                    note = f"it was widened {counts[bracket.name]} times, the maximum"
                else:
                    note = "no trials were left to widen it for"
            found.append(msgspec.structs.replace(bracket, widened=counts[bracket.name], note=note))
        return tuple(found)

    def runs_to_train(self, trials: Sequence[Trial]) -> list[RunSpec]:
        """The next run of every trial in flight: under halving the short one first."""
        runs = []
        for trial in _live(trials):
            if trial.state != "running":
                continue
            short = self.short_spec(trial.values)
            if short is not None and self.records.get(short.id) is None:
                runs.append(short)
            elif short is None or self._promoted(trials, trial):
                runs.append(self.spec(trial.values))
        return runs

    def loss(self, record: RunRecord) -> float:
        """The loss of a record for the sampler."""
        return self.uniform_loss if record.validation_loss is None else min(record.validation_loss, self.uniform_loss)

    def _line(self, number: int, values: Values, *, failed: str | None = None) -> TrialLine:
        return TrialLine(study=self.name, number=number, values=values, run=self.spec(values).id, failed=failed)

    def _after_halving(self, trials: Sequence[Trial], trial: Trial) -> Trial:
        """The trial, pruned if its short run was among the worse of its generation."""
        short = self.short_spec(trial.values) if trial.state == "running" else None
        if short is None or self._promoted(trials, trial) is not False:
            return trial
        record = self.records.get(short.id)
        assert record is not None
        return msgspec.structs.replace(trial, state="pruned", loss=self.loss(record))

    def _promoted(self, trials: Sequence[Trial], trial: Trial) -> bool | None:
        """True if a trial's short run is among the better of its generation; None until all of them are done."""
        assert self.config.halving is not None
        live = _live(trials)
        first = live.index(trial) // self.config.in_flight * self.config.in_flight
        size = min(self.config.in_flight, self.trials - first)
        losses = {}
        for peer in live[first : first + size]:
            short = self.short_spec(peer.values)
            record = self.records.get(short.id) if short else None
            if record is not None:
                losses[peer.number] = self.loss(record)
        if len(losses) < size:
            return None
        kept = math.ceil(self.config.halving.keep * size)
        return trial.number in sorted(losses, key=lambda number: (losses[number], number))[:kept]

    def _brackets(self, trials: Sequence[Trial], dimensions: Sequence[Dimension]) -> tuple[Bracket, ...]:
        finished = [
            (trial.values, trial.loss)
            for trial in trials
            if trial.state == "complete" and trial.loss is not None and trial.loss < self.uniform_loss
        ]
        ranges = tuple((d.search.low, d.search.high) for d in dimensions)
        key = (tuple((tuple(values.items()), loss) for values, loss in finished), ranges)
        if key not in self._known_brackets:
            self._known_brackets[key] = brackets(finished, dimensions, seed=self.config.seed)
        return self._known_brackets[key]


def _live(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that count: a failed one is replaced by another."""
    return [trial for trial in trials if trial.state != "failed"]
