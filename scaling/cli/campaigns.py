"""Verbs from a campaign to its table of runs: plan, tune, submit, status, collect, and all of them for the demo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scaling.cli.common import OnCampaign, default_root, next_step, print_json, program, under
from scaling.cli.tables import Report
from scaling.errors import plain

if TYPE_CHECKING:
    from sweeps.local import LocalOutcome
    from sweeps.planning.plan import CampaignPlan
    from sweeps.slurm.select_runs import Submission

WATCH_SECONDS = 5.0


@dataclass(frozen=True)
class Campaigns:
    """List the built-in campaigns."""

    def run(self) -> None:
        """Print name and title of each, and where their files are."""
        from importlib import resources

        from sweeps.config.campaign import built_in, load_campaign

        for name in built_in():
            print(f"{name:16} {load_campaign(name).title}")
        print(f"Files: {resources.files('sweeps') / 'campaigns'}; copy one to begin your own.")
        next_step("scaling plan quick")


@dataclass(frozen=True)
class Plan(OnCampaign):
    """Show a campaign's runs and what they will cost; train nothing."""

    hyperparameters: Literal["listed", "rule"] | None = None
    """Take tokens, batch and learning rate as the file lists them, or from the rule that it names."""
    groups: bool = False
    """Show which parameters each arm's optimizer gets, and by which rule."""
    json: bool = False
    """Print rows for machines instead of the table."""

    def run(self) -> None:
        """Print the plan and write plan.jsonl, which `submit` executes."""
        from sweeps.planning.branches import saved_flops
        from sweeps.planning.cost import outlook
        from sweeps.reporting import plan_table

        plan = self.planned(hyperparameters=self.hyperparameters)
        plan.write()
        if self.json:
            seen = outlook(plan)
            print_json({"runs": plan_table.plan_rows(plan, seen), "totals": plan_table.plan_totals(plan, seen)})
        elif self.groups:
            plan_table.groups(plan)
        else:
            plan_table.plan(plan)
            if saved := saved_flops(plan):
                print(f"Branches start from their trunks' checkpoints and save {saved:.3g} FLOPs.")
            self.next_step("tune" if plan.campaign.untuned else "submit")


@dataclass(frozen=True)
class Tune(OnCampaign):
    """Search hyper-parameters as the campaign's [tune] says; each trial is an ordinary run, and nothing runs twice."""

    executor: Literal["local", "slurm"] = "local"
    """Where trials train."""
    workers: int | None = None
    """local: trials at once on this machine; by default as many as the processors allow."""
    no_wait: bool = False
    """slurm: hand over what is to be trained now and return; the same command goes on later."""
    status: bool = False
    """Show how far the studies are and train nothing."""
    export_optuna: Path | None = None
    """Write the studies to this file for "optuna-dashboard FILE" and train nothing."""
    json: bool = False
    """Print the studies for machines."""

    def run(self) -> None:
        """Tune to the end, or as far as it goes now."""
        from sweeps.reporting.tuning_table import show, study_rows
        from sweeps.tuning.tuner import Tuner, tune

        if self.export_optuna is not None:
            Tuner(self.loaded(), self.root, prepare=False).export(self.export_optuna)
            print(f"Wrote {self.export_optuna}")
            next_step(f"optuna-dashboard {self.export_optuna}")
            return
        if self.status:
            tuning = Tuner(self.loaded(), self.root, prepare=False).gather()
        else:
            tuning = tune(self.loaded(), self.root, executor=self.executor, workers=self.workers, wait=not self.no_wait)
        if self.json:
            print_json(study_rows(tuning))
        else:
            show(tuning)
            self.next_step("submit" if tuning.complete else "tune")
        if not (tuning.complete or self.status or self.no_wait):
            sys.exit(1)


@dataclass(frozen=True)
class Submit(OnCampaign):
    """Train what is missing of a campaign; finished runs stay as they are."""

    executor: Literal["local", "slurm"] = "local"
    """This machine, or the cluster that [placement.slurm] describes."""
    workers: int | None = None
    """local: runs at once; by default as many as the processors allow at each run's threads."""
    retry: Literal["none", "failed", "diverged", "cancelled", "all"] = "none"
    """Which runs that ended badly, or that a person cancelled, are tried again."""
    rerun: Literal["none", "changed-code"] = "none"
    """Which finished runs are trained again: those that other code trained. Their old directories move to replaced/."""
    order: Literal["cheap", "expensive"] = "cheap"
    """Which rungs go first."""
    dry_run: bool = False
    """slurm: show the table, the batch scripts and the cost, and submit nothing; works without SLURM."""
    max_gpu_hours: float | None = None
    """slurm: refuse to submit more than this, as predicted."""
    working_tree: bool = False
    """slurm: jobs run the working tree, and not a copy of the code as it is now."""

    def run(self) -> None:
        """Prepare the data if need be, then train here or hand over."""
        if self.rerun == "changed-code":
            self._set_aside()
        if self.executor == "slurm":
            self._slurm()
            return
        from sweeps.local import run_local

        outcome = run_local(self.recorded(), workers=self.workers, retry=self.retry, order=self.order)
        report_outcome(outcome)
        self.next_step("collect" if outcome.complete else "status")
        if not outcome.complete:
            sys.exit(1)

    def _set_aside(self) -> None:
        from sweeps.planning.plan import with_data
        from sweeps.planning.retry import changed_code, set_aside

        plan = self.planned() if self.dry_run else with_data(self.planned())
        runs = changed_code(plan)
        if self.dry_run:
            print(f"{len(runs)} runs of other code would be trained again; they count as done below.")
        else:
            moved = set_aside(plan, runs)
            print(f"{len(moved)} runs of other code are trained again; the old ones are in {plan.root / 'replaced'}.")

    def _slurm(self) -> None:
        from sweeps.reporting import plan_table
        from sweeps.slurm import SlurmExecutor

        submission = SlurmExecutor(self.recorded()).submit(
            retry=self.retry,
            order=self.order,
            dry_run=self.dry_run,
            max_gpu_hours=self.max_gpu_hours,
            snapshot=not self.working_tree,
        )
        if self.dry_run:
            plan_table.plan(submission.plan)
            for script in submission.scripts():
                print(f"\n{script}")
        report_submission(submission, dry_run=self.dry_run)
        self.next_step("submit --executor slurm" if self.dry_run else "status")


@dataclass(frozen=True)
class Status(OnCampaign):
    """Show how far a campaign is, from the files of its runs and, where it was submitted, from SLURM."""

    watch: bool = False
    """Show it again every few seconds until Ctrl-C."""
    json: bool = False
    """Print rows for machines instead of the table."""

    def run(self) -> None:
        """Print the table, once or again and again."""
        from sweeps.reporting import status

        plan = self.planned()
        if self.json:
            print_json(status.rows(plan))
        elif self.watch:
            status.watch(plan, seconds=WATCH_SECONDS)
        else:
            status.show(plan)


@dataclass(frozen=True)
class Collect(OnCampaign):
    """Gather the records of a campaign into runs.csv and curves.parquet."""

    overwrite: bool = False
    """Replace the tables of another campaign of the same name; its runs stay under runs/."""

    def run(self) -> None:
        """Write both files."""
        from sweeps.reporting.collect import collect

        plan = self.planned()
        table = collect(plan, overwrite=self.overwrite)
        finished = int((table["status"] == "finished").sum())
        print(f"{plan.results / 'runs.csv'}: {finished} of {len(table)} runs finished.")
        for run, status, reason in zip(table["run"], table["status"], table["reason"], strict=True):
            if status == "failed":
                print(plain(f"  {run} failed: {reason or 'no reason was recorded'}"))
        if finished and self.set:
            next_step(shlex.join(["scaling", "fit", str(plan.results)]))  # the file alone is another campaign
        else:
            self.next_step("fit" if finished else "submit")


@dataclass(frozen=True)
class Demo:
    """Run the built-in campaign quick from plan to report; minutes on two cores, and nothing twice."""

    root: Path = field(default_factory=default_root)
    """Folder that holds data/, runs/ and results/."""
    workers: int | None = None
    """Runs at once; by default as many as the processors allow."""

    def run(self) -> None:
        """Plan, train what is missing, collect, fit, report."""
        from analysis.reporting import terminal
        from sweeps.local import run_local
        from sweeps.reporting import plan_table
        from sweeps.reporting.collect import collect

        planned = OnCampaign("quick", self.root).planned()
        plan_table.plan(planned)
        # A demo that was killed is started again to be finished, so what failed is tried again too.
        outcome = run_local(planned, workers=self.workers, retry="failed")
        report_outcome(outcome)
        if outcome.stopped:
            next_step("scaling demo")
            sys.exit(1)
        collect(outcome.plan)
        page, study = Report("quick", root=self.root).write()
        terminal.show(study)
        print(f"Report: {page}")
        if program() != "scaling":
            activate = Path(sys.executable).with_name("activate")
            print(f'"source {activate}" puts the command scaling on the PATH of this shell.')
        next_step(shlex.join(["scaling", "status", "quick", *under(self.root)]))


def report_outcome(outcome: LocalOutcome) -> None:
    """Say what one call on this machine did."""
    from sweeps.reporting.status import RETRY_FAILED, reasons

    parts = [f"{len(outcome.trained)} trained", f"{len(outcome.present)} were there"]
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    parts += [f"{len(outcome.stopped)} interrupted"] if outcome.stopped else []
    print(f"{outcome.plan.campaign.name}: {', '.join(parts)}.")
    for line in reasons((run, "failed", reason) for run, reason in outcome.failed.items()):
        print(plain(f"  {line}"))
    if outcome.failed:
        print(f"  To train failed runs again: {RETRY_FAILED}")
    for line in _other_code(outcome.plan, outcome.present):
        print(plain(f"  {line}"))


def _other_code(plan: CampaignPlan, done: Iterable[str]) -> list[str]:
    """Sentences on runs that are done and that other code trained."""
    from scaling.run.directory import RunDirectory
    from scaling.run.provenance import changed_files
    from sweeps.reporting.plan_table import code_notes

    records = [RunDirectory(plan.root / "runs" / run).record() for run in done]
    return code_notes((record.code.commit, changed_files(record.code)) for record in records if record is not None)


def report_submission(submission: Submission, *, dry_run: bool) -> None:
    """Say what one submission did, or would do."""
    queued = len(submission.missing) if dry_run else len(submission.queued)
    counts = {
        "would be submitted" if dry_run else "submitted": queued,
        "done": len(submission.done),
        "waiting or running": len(submission.already_active),
        "failed (--retry failed)": len(submission.failed),
        "cancelled (--retry cancelled)": len(submission.cancelled),
        "not looked up": len(submission.unknown),
        "not accepted now": len(submission.rejected),
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{submission.plan.campaign.name}: {named or 'nothing to do'}.")
    for request in submission.requests():
        print(f"  {plain(request)}")
    if hours := submission.gpu_hours:
        print(f"Predicted: {hours:,.1f} GPU-hours.")
    if submission.jobs:
        print(f"Jobs: {', '.join(submission.jobs)}.")
    for note in [*submission.notes, *_other_code(submission.plan, submission.done)]:
        print(plain(f"  {note}"))
