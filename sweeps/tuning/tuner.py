"""``scaling tune``: run the studies of a campaign to their end, then write tuning.json, trials.csv and rule files.

The loop alternates between a step, which proposes the next generation, and training by either executor. A killed tuner
leaves nothing to repair, and two tuners at once share the work.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from scaling.errors import UserError
from scaling.io import write_atomic, write_json
from scaling.spec import RunSpec
from sweeps.config.campaign import ArmConfig, Campaign
from sweeps.config.hyperparameter_rules import write_rule_file
from sweeps.config.tuning_results import Tuning, tuning_file
from sweeps.planning.ladder import Rung, rungs_of
from sweeps.planning.plan import CampaignPlan, PlannedRun, micro_batch, plan, with_data
from sweeps.planning.tuned_settings import dimensions_of, middles, tuned_rungs
from sweeps.tuning.results import StudyTrials, fit_rules, gather, transfer_specs, trial_rows
from sweeps.tuning.samplers import export_optuna
from sweeps.tuning.study import TuningStudy
from sweeps.tuning.trials import RecordCache, TrialStore

MAX_FAILED_ATTEMPTS = 3
"""Failed attempts of a run under SLURM after which its trial counts as failed."""

POLL_SECONDS = 20.0


class ExecutionResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one call of an executor."""

    failed: dict[str, str]
    """Reasons by id of runs that cannot be trained."""
    waiting: bool
    """True if some runs are not done: interrupted, or in a queue."""


Execute = Callable[[CampaignPlan], ExecutionResult]


class Tuner:
    """The studies of a campaign under a root; unless its data are prepared, the ids of runs are provisional.

    Raises:
        UserError: There is no ``[tune]``, it names an unknown rung, or the data cannot be prepared.
    """

    def __init__(
        self, campaign: Campaign, root: Path | str, *, progress: bool | None = None, prepare: bool = True
    ) -> None:
        if campaign.tune is None:
            raise UserError(f"{campaign.file}: there is no [tune] table to tune by. See the campaign quick-tuned.")
        self.table = campaign.tune
        self.rungs = rungs_of(campaign)
        self.campaign = msgspec.structs.replace(campaign, settings={}, untuned=False)
        # The plan needs some setting for each tuned arm; trials replace it by their own.
        template = plan(msgspec.structs.replace(campaign, settings=middles(campaign, self.rungs), untuned=False), root)
        self.template = with_data(template, progress=progress) if prepare else template
        self.records = RecordCache(self.template.root / "runs")
        self.store = TrialStore(self.template.results / "tuning")
        self.studies = [
            self._study(arm, rung) for rung in tuned_rungs(campaign, self.rungs) for arm in campaign.arms if arm.tuned
        ]

    def step(self, failed: Mapping[str, str] | None = None) -> list[PlannedRun]:
        """Propose trials under the lock of the store; return the runs to train next, none if tuning is complete.

        `failed` holds reasons by id of runs that an executor could not train.

        Raises:
            UserError: Trials in the store belong to another campaign, or too many runs failed.
        """
        with self.store.locked():
            by_study = self.store.read()
            for study in self.studies:
                self.store.append(study.step(by_study.get(study.name, []), failed=failed or {}))
            studies = self.trials()
        runs = [self._planned(study, spec) for study, trials in studies for spec in study.runs_to_train(trials)]
        if runs:
            return runs
        for study, _, spec in transfer_specs(studies, fit_rules(studies, self.table)):
            if failed and spec.id in failed:
                raise UserError(
                    f"{study.name}: run {spec.id}, at the setting that the rules predict, failed: {failed[spec.id]}. "
                    f"Fix the cause that its log gives, remove runs/{spec.id}, and run the same command again."
                )
            if self.records.get(spec.id) is None:
                runs.append(self._planned(study, spec))
        return runs

    def runs(self, planned: list[PlannedRun]) -> CampaignPlan:
        """The runs as a plan for an executor, after the runs that they start from; its files lie beside the campaign's."""
        campaign = msgspec.structs.replace(self.template.campaign, name=f"{self.campaign.name}-trials")
        starts = {run.spec.warm_start.run for run in planned if run.spec.warm_start is not None}
        before = [run for run in self.template.distinct() if run.id in starts]
        return msgspec.structs.replace(self.template, campaign=campaign, runs=(*before, *planned))

    def trials(self) -> StudyTrials:
        """Every study with its trials so far; writes nothing."""
        by_study = self.store.read()
        return [(study, study.read(by_study.get(study.name, []))) for study in self.studies]

    def gather(self) -> Tuning:
        """The content of tuning.json so far; writes nothing."""
        studies = self.trials()
        found = gather(self.campaign, self.rungs, studies, self.records, final=None)
        if not found.settings:
            return found
        final = plan(msgspec.structs.replace(self.campaign, settings=found.settings), self.template.root)
        return gather(self.campaign, self.rungs, studies, self.records, final=final)

    def write(self) -> Tuning:
        """Write tuning.json and trials.csv from trials and records; if tuning is complete, also ``rules/<arm>.toml``."""
        found = self.gather()
        rows, text = trial_rows(found, self.records), io.StringIO()
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.template.results / "trials.csv", text.getvalue().encode())
        write_json(tuning_file(self.template.root, self.campaign.name), found)
        if found.complete:
            for arm in found.rules:
                write_rule_file(found, arm, self.template.results / "rules" / f"{arm}.toml")
        return found

    def export(self, path: Path) -> None:
        """Write the studies to an Optuna journal file, for ``optuna-dashboard``."""
        export_optuna({study.name: (study.ranges(trials)[0], trials) for study, trials in self.trials()}, path)

    def _base(self, arm: str, rung: str) -> PlannedRun:
        return next(run for run in self.template.runs if (run.arm, run.rung) == (arm, rung))

    def _planned(self, study: TuningStudy, spec: RunSpec) -> PlannedRun:
        base = self._base(study.arm, study.rung)
        micro = micro_batch(spec, self.template.placements[study.rung].micro_batch)
        placement = msgspec.structs.replace(base.placement, micro_batch=micro, keep_tokens=())
        cell = f"{study.rung}/{spec.seed}"
        return msgspec.structs.replace(
            base, campaign=self.campaign.name, cell=cell, id=spec.id, spec=spec, placement=placement
        )

    def _study(self, arm: ArmConfig, rung: Rung) -> TuningStudy:
        return TuningStudy(
            arm=arm.name,
            rung=rung.name,
            # A trial does not branch off another run: the trunk would have other settings.
            template=msgspec.structs.replace(self._base(arm.name, rung.name).spec, branch_of=None),
            dimensions=dimensions_of(self.campaign, arm, rung),
            config=self.table,
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
    """Tune to the end, or as far as possible now; the same call continues.

    Args:
        campaign: A campaign with a ``[tune]`` table.
        root: Folder for data, runs and results.
        executor: Where trials train; SLURM gets each generation as arrays.
        workers: local: runs at the same time.
        wait: slurm: wait until tuning is complete; otherwise submit the next runs and return.
        progress: Bars (True), a line a minute (False), or by the kind of output (None).
        execute: Used in place of both executors.

    Returns:
        The content of ``results/<campaign>/tuning.json``; once it is `complete`, plans take their settings from there.

    Raises:
        UserError: The campaign cannot be tuned, or too many trials failed.
    """
    tuner = Tuner(campaign, root, progress=progress)
    run = execute or (partial(_local, workers=workers, progress=progress) if executor == "local" else _slurm)
    failed: dict[str, str] = {}
    while planned := tuner.step(failed):
        result = run(tuner.runs(planned))
        failed = result.failed
        if result.waiting:
            if executor == "local" or not wait:
                break
            time.sleep(POLL_SECONDS)
        tuner.write()
    return tuner.write()


def _local(trials: CampaignPlan, *, workers: int | None, progress: bool | None) -> ExecutionResult:
    from sweeps.local import run_local

    # A run that failed just before its tuner was killed gets another attempt before its trial counts as failed.
    outcome = run_local(trials, workers=workers, retry="failed", progress=progress)
    return ExecutionResult(failed=dict(outcome.failed), waiting=bool(outcome.stopped))


def _slurm(trials: CampaignPlan) -> ExecutionResult:
    from sweeps.slurm import SlurmExecutor

    failed = {}
    for run in trials.distinct():
        attempts = [a for a in trials.directory(run).attempts() if a.outcome == "failed"]
        if trials.state(run) == "failed" and len(attempts) >= MAX_FAILED_ATTEMPTS:
            failed[run.id] = attempts[-1].reason or "no reason given"
    remaining = tuple(run for run in trials.runs if run.id not in failed)
    SlurmExecutor(msgspec.structs.replace(trials, runs=remaining)).submit(retry="failed")
    done = [trials.state(run) in ("finished", "diverged") for run in remaining]
    return ExecutionResult(failed=failed, waiting=not all(done))
