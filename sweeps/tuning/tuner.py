"""``scaling tune``: drive the studies of a campaign to their end, then write down what follows from them.

Step, train, step: a step takes the journal, tells the studies what the run directories say, asks for the next
generation and lets go; the runs that are asked for are ordinary runs, trained by whichever executor trains a campaign.
A tuner that is killed leaves nothing to repair, and two at once share the work.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from scaling.errors import UserError, unknown_name
from scaling.io import append_line, read_json, read_lines, write_atomic, write_json
from scaling.spec import RunSpec
from sweeps.config.campaign import ArmConfig, Campaign
from sweeps.config.hyperparameter_rules import write_rule_file
from sweeps.config.tuning_results import Tuning, facts_file
from sweeps.planning.ladder import Rung, rungs_of
from sweeps.planning.plan import CampaignPlan, PlannedRun, micro_batch, plan, with_data
from sweeps.planning.tuned_settings import dimensions_of, middles
from sweeps.tuning.results import Told, gather, laws_of, transfer_specs, trial_rows
from sweeps.tuning.samplers import Sampling, grid
from sweeps.tuning.study import ProposedTrial, RecordsOf, TuningStudy, rebuild
from sweeps.tuning.trials import Journal

TRIES = 3
"""Attempts of a run under SLURM that may fail before its trial counts as failed."""

POLL_SECONDS = 20.0


class ExecutionResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of runs that were handed to an executor."""

    failed: dict[str, str]
    """Why, by id: they were tried and cannot be run."""
    waiting: bool
    """Whether some are not at their end: interrupted, or in a queue."""


Execute = Callable[[CampaignPlan], ExecutionResult]


class Tuner:
    """The studies of a campaign under a root, against what its disk holds.

    Args:
        campaign: With a ``[tune]`` table.
        root: Folder for data, runs and results.

    Raises:
        UserError: There is no ``[tune]``, a rung that it names is not there, or the data cannot be prepared.
    """

    def __init__(
        self, campaign: Campaign, root: Path | str, *, progress: bool | None = None, prepare: bool = True
    ) -> None:
        if campaign.tune is None:
            raise UserError(
                f"{campaign.file}: there is no [tune] table, so nothing to tune. See the campaign quick-tuned."
            )
        self.table = campaign.tune
        self.rungs = rungs_of(campaign)
        self.campaign = msgspec.structs.replace(campaign, settings={}, untuned=False)
        # Settings that are known, so that the plan does not ask for those that are to be found.
        wished = plan(msgspec.structs.replace(campaign, settings=middles(campaign, self.rungs), untuned=False), root)
        self.template = with_data(wished, progress=progress) if prepare else wished
        self.records = RecordsOf(self.template.root / "runs")
        self.studies = [self._study(arm, rung) for rung in self._tuned_rungs() for arm in campaign.arms if arm.tuned]
        folder = self.template.results / "tuning"
        self.journal = Journal(folder / "journal.log")
        self.ledger = folder / "trials.jsonl"

    def step(self, failed: dict[str, str] | None = None) -> list[PlannedRun]:
        """Tell and ask, under the journal's lock; the runs that are to be trained next, none when all is done.

        Args:
            failed: Reasons by id of runs that an executor could not run.

        Raises:
            UserError: Trials on disk belong to another campaign, or too many failed.
        """
        wanted: list[PlannedRun] = []
        with self.journal.held():
            lines = read_lines(self.ledger, ProposedTrial)
            self._restore(lines)
            written = {(line.study, line.number) for line in lines}
            for study in self.studies:
                stored = self.journal.study(study.name)
                study.step(stored, failed=failed or {})
                for trial in study.read(stored):
                    if (study.name, trial.number) not in written:
                        append_line(
                            self.ledger,
                            ProposedTrial(study=study.name, number=trial.number, values=trial.values, run=trial.run),
                        )
                wanted += [self._planned(study, spec) for spec in study.wanted(study.read(stored))]
            if not wanted:
                told = self._told()
                for study, _, spec in transfer_specs(told, laws_of(told, self.table)):
                    if self.records.of(spec.id) is None:
                        wanted.append(self._planned(study, spec))
        return wanted

    def runs(self, wanted: list[PlannedRun]) -> CampaignPlan:
        """Runs of studies as a plan that any executor takes, after those whose weights they start from.

        Its files lie beside the campaign's own.
        """
        campaign = msgspec.structs.replace(self.template.campaign, name=f"{self.campaign.name}-trials")
        starts = {run.spec.warm_start.run for run in wanted if run.spec.warm_start is not None}
        before = [run for run in self.template.distinct() if run.id in starts]
        return msgspec.structs.replace(self.template, campaign=campaign, runs=(*before, *wanted))

    def told(self) -> Told:
        """Studies with their trials as they stand, those that the next step will tell included; nothing is written."""
        names = self.journal.names()
        return [
            (study, study.seen(study.read(self.journal.study(study.name)))) if study.name in names else (study, [])
            for study in self.studies
        ]

    def gather(self) -> Tuning:
        """What tuning.json would say now."""
        told = self.told()
        found = gather(self.campaign, self.rungs, told, self.records, final=None)
        if not found.settings:
            return found
        final = plan(msgspec.structs.replace(self.campaign, settings=found.settings), self.template.root)
        return gather(self.campaign, self.rungs, told, self.records, final=final)

    def write(self) -> Tuning:
        """tuning.json and trials.csv, written anew from the records; when all is done, also ``rules/<arm>.toml``."""
        found = self.gather()
        write_atomic(self.template.results / "trials.csv", _csv(trial_rows(found, self.records)))
        write_json(facts_file(self.template.root, self.campaign.name), found)
        if found.complete:
            for arm in found.laws:
                write_rule_file(found, arm, self.template.results / "rules" / f"{arm}.toml")
        return found

    def _told(self) -> Told:
        return [(study, study.read(self.journal.study(study.name))) for study in self.studies]

    def _restore(self, lines: list[ProposedTrial]) -> None:
        """Put back what a journal has lost; one that contradicts the ledger is set aside and written anew."""
        by_study = {study.name: [line for line in lines if line.study == study.name] for study in self.studies}
        for study in self.studies:
            stored = study.read(self.journal.study(study.name))
            known = {line.number: line.run for line in by_study[study.name]}
            if any(known.get(trial.number, trial.run) != trial.run for trial in stored):
                self.journal.set_aside()
                break
        for study in self.studies:
            rebuild(self.journal.study(study.name), by_study[study.name], study.dimensions)

    def _planned(self, study: TuningStudy, spec: RunSpec) -> PlannedRun:
        base = next(run for run in self.template.runs if (run.arm, run.rung) == (study.arm, study.rung))
        return msgspec.structs.replace(
            base,
            campaign=self.campaign.name,
            cell=f"{study.rung}/{spec.seed}",
            id=spec.id,
            spec=spec,
            placement=msgspec.structs.replace(
                base.placement,
                micro_batch=micro_batch(spec, self.template.placements[study.rung].micro_batch),
                keep_tokens=(),
            ),
        )

    def _tuned_rungs(self) -> list[Rung]:
        known = [rung.name for rung in self.rungs]
        for name in (*self.table.rungs, *self.table.held_out):
            if name not in known:
                raise UserError(f"{self.campaign.file}, [tune]: {unknown_name('rung', name, known)}")
        named = [*self.table.rungs, *self.table.held_out] if self.table.rungs else known
        return [rung for rung in self.rungs if rung.name in named]

    def _study(self, arm: ArmConfig, rung: Rung) -> TuningStudy:
        table = self.table
        dimensions = dimensions_of(self.campaign, arm, rung)
        template = next(r.spec for r in self.template.runs if (r.arm, r.rung) == (arm.name, rung.name))
        sampling = Sampling(sampler=table.sampler, startup=table.startup, seed=table.seed)
        return TuningStudy(
            name=f"{arm.name}/{rung.name}",
            arm=arm.name,
            rung=rung.name,
            # A trial is no branch: its trunk would have other settings.
            template=msgspec.structs.replace(template, branch_of=None),
            dimensions=dimensions,
            sampling=sampling,
            trials=len(grid(dimensions)) if table.sampler == "grid" else table.trials,
            in_flight=table.in_flight,
            widen=table.widen,
            halving=table.halving,
            held_out=rung.name in table.held_out,
            records=self.records,
        )


def tune(
    campaign: Campaign,
    root: Path | str,
    *,
    executor: Literal["local", "slurm"] = "local",
    workers: int | None = None,
    wait: bool = True,
    progress: bool | None = None,
    execute: Execute | None = None,
) -> Tuning:
    """Tune to the end, or as far as it goes now; the same call continues.

    Args:
        campaign: With a ``[tune]`` table.
        root: Folder for data, runs and results.
        executor: Where trials train; SLURM gets each generation as arrays.
        workers: local: runs at the same time.
        wait: slurm: stay until the end; else hand over what is to be trained now and return.
        progress: Bars (True), a line a minute (False), or what the output is fit for (None).
        execute: In place of both executors.

    Returns:
        What was found, as written to ``results/<campaign>/tuning.json``. With `complete`, the campaign's plan takes its
        settings from there.

    Raises:
        UserError: The campaign cannot be tuned, or too many trials failed.
    """
    tuner = Tuner(campaign, root, progress=progress)
    run = execute or (_local(workers, progress) if executor == "local" else _slurm())
    failed: dict[str, str] = {}
    while wanted := tuner.step(failed):
        done = run(tuner.runs(wanted))
        failed = done.failed
        if done.waiting:
            if executor == "local" or not wait:
                break
            time.sleep(POLL_SECONDS)
        tuner.write()
    return tuner.write()


def _csv(rows: list[dict[str, object]]) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _local(workers: int | None, progress: bool | None) -> Execute:
    from sweeps.local import run_local

    def execute(trials: CampaignPlan) -> ExecutionResult:
        # A run that failed under a tuner that was then killed is tried again before its trial is given up.
        outcome = run_local(trials, workers=workers, retry="failed", progress=progress)
        return ExecutionResult(failed=dict(outcome.failed), waiting=bool(outcome.stopped))

    return execute


def _slurm() -> Execute:
    from sweeps.slurm import SlurmExecutor

    def execute(trials: CampaignPlan) -> ExecutionResult:
        failed = {}
        for run in trials.distinct():
            attempts = [a for a in trials.directory(run).attempts() if a.outcome == "failed"]
            if trials.state(run) == "failed" and len(attempts) >= TRIES:
                failed[run.id] = attempts[-1].reason or "no reason given"
        left = tuple(run for run in trials.runs if run.id not in failed)
        SlurmExecutor(msgspec.structs.replace(trials, runs=left)).submit(retry="failed")
        done = [trials.state(run) in ("finished", "diverged") for run in left]
        return ExecutionResult(failed=failed, waiting=not all(done))

    return execute


def tuning_status(campaign: Campaign, root: Path | str) -> Tuning:
    """How far the studies are, from the journal and the records; nothing is written and no data are prepared."""
    return Tuner(campaign, root, prepare=False).gather()


def read_tuning(root: Path | str, campaign: str) -> Tuning:
    """tuning.json of a campaign.

    Raises:
        UserError: It is not there, or cannot be read.
    """
    return read_json(facts_file(Path(root), campaign), Tuning, remedy=f"Run: scaling tune {campaign}")


def budget_table(tuning: Tuning) -> list[dict[str, str | int | float]]:
    """The match ratio against the tuning budget as rows: arm, against, trials, ratio, low, high."""
    return [{name: getattr(row, name) for name in row.__struct_fields__} for row in tuning.budget]
