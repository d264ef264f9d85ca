"""Verbs from a campaign to its table of runs: plan, tune, submit, status, collect; and the demo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scaling.cli.common import OnCampaign, default_root, next_step, print_json, program, root_option
from scaling.cli.tables import Report
from scaling.errors import ExitCode, plain

if TYPE_CHECKING:
    from sweeps.local import LocalOutcome
    from sweeps.planning.plan import CampaignPlan
    from sweeps.slurm.select_runs import Submission

WATCH_SECONDS = 5.0


@dataclass(frozen=True)
class Campaigns:
    """List the built-in campaigns."""

    def run(self) -> None:
        """Print name and title of each, and their folder."""
        from importlib import resources

        from sweeps.config.campaign import built_in, load_campaign

        for name in built_in():
            print(f"{name:16} {load_campaign(name).title}")
        print(f"Files: {resources.files('sweeps') / 'campaigns'}; copy one to start your own.")
        next_step("scaling plan quick")


@dataclass(frozen=True)
class Plan(OnCampaign):
    """Show the runs of a campaign and their cost; train nothing."""

    hyperparameters: Literal["listed", "rule"] | None = None
    """Take tokens, batch and learning rate from the file's rungs, or from the hyper-parameter rule that it names."""
    resolved: bool = False
    """Print the campaign file as it is read, with the files that it extends and --set, and plan nothing."""
    groups: bool = False
    """Show which algorithm updates each parameter of an arm, and by which rule."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Print the plan and write plan.jsonl, which `submit` executes."""
        from sweeps.config.campaign import campaign_path, campaign_tables
        from sweeps.config.toml_text import toml_text
        from sweeps.planning.branches import saved_flops
        from sweeps.planning.cost import outlook
        from sweeps.reporting import plan_table

        if self.resolved:
            self.loaded()
            print(toml_text(campaign_tables(campaign_path(self.campaign), settings=self.set)), end="")
            return
        plan = self.planned(hyperparameters=self.hyperparameters)
        plan.write()
        if self.json:
            costs = outlook(plan)
            print_json({"runs": plan_table.plan_rows(plan, costs), "totals": plan_table.plan_totals(plan, costs)})
        elif self.groups:
            plan_table.groups(plan)
        else:
            plan_table.plan(plan)
            if saved := saved_flops(plan):
                print(f"Branches start from checkpoints of their trunks, which saves {saved:.3g} FLOPs.")
            self.next_step("tune" if plan.campaign.untuned else "submit")


@dataclass(frozen=True)
class Tune(OnCampaign):
    """Search hyper-parameters by the campaign's [tune]; each trial is an ordinary run, and no run is trained twice."""

    executor: Literal["local", "slurm"] = "local"
    """Train on this machine (local) or on the cluster (slurm)."""
    workers: int | None = None
    """local: concurrent trials; default: as many as the processors allow."""
    no_wait: bool = False
    """slurm: submit the next trials and return; the same command continues later."""
    status: bool = False
    """Show the progress of the studies and train nothing."""
    export_optuna: Path | None = None
    """Write the studies to this file for "optuna-dashboard FILE" and train nothing."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Tune and show the studies; exit status 1 if they are not complete."""
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
            sys.exit(ExitCode.FAILURE)


@dataclass(frozen=True)
class Submit(OnCampaign):
    """Train the runs of a campaign that are not done."""

    executor: Literal["local", "slurm"] = "local"
    """Train on this machine (local) or on the cluster of [placement.slurm] (slurm)."""
    workers: int | None = None
    """local: concurrent runs; default: as many as the processors allow with each run's threads."""
    retry: Literal["none", "failed", "diverged", "cancelled", "all"] = "none"
    """Also train runs that failed, diverged or were cancelled."""
    rerun: Literal["none", "changed-code"] = "none"
    """Also train finished runs again whose code has changed since; their old directories move to replaced/."""
    order: Literal["cheap", "expensive"] = "cheap"
    """Rungs that are trained first."""
    dry_run: bool = False
    """slurm: show the runs, the batch scripts and the cost, and submit nothing; works without SLURM."""
    max_gpu_hours: float | None = None
    """slurm: submit nothing if the predicted cost is higher."""
    working_tree: bool = False
    """slurm: run the code of the working tree, instead of a snapshot taken now."""

    def run(self) -> None:
        """Prepare the data if needed, then train or submit; exit status 1 if runs are not complete."""
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
            sys.exit(ExitCode.FAILURE)

    def _set_aside(self) -> None:
        from sweeps.planning.plan import with_data
        from sweeps.planning.retry import changed_code, set_aside

        plan = self.planned() if self.dry_run else with_data(self.planned())
        runs = changed_code(plan)
        if self.dry_run:
            print(f"{len(runs)} runs of changed code would be trained again; they count as done below.")
        else:
            moved = set_aside(plan, runs)
            print(f"{len(moved)} runs of changed code are trained again; the old ones are in {plan.root / 'replaced'}.")

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
    """Show the progress of a campaign, from the files of its runs and, if it was submitted, from SLURM."""

    watch: bool = False
    """Update the table every few seconds until Ctrl-C."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Print the table, once or repeatedly."""
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
    """Replace the tables of another campaign of the same name; its runs are kept."""

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
        if finished and self.set:  # without the settings, the file is another campaign
            next_step(shlex.join(["scaling", "fit", str(plan.results)]))
        else:
            self.next_step("fit" if finished else "submit")


@dataclass(frozen=True)
class Demo:
    """Run the built-in campaign quick from plan to report, which takes minutes on two cores."""

    root: Path = field(default_factory=default_root)
    """Folder of data/, runs/ and results/."""
    workers: int | None = None
    """Concurrent runs; default: as many as the processors allow."""

    def run(self) -> None:
        """Plan, train the runs that are not done, collect, fit, report."""
        from analysis.reporting import terminal
        from sweeps.local import run_local
        from sweeps.reporting import plan_table
        from sweeps.reporting.collect import collect

        planned = OnCampaign("quick", self.root).planned()
        plan_table.plan(planned)
        # Failed runs too: a demo is started again in order to finish it.
        outcome = run_local(planned, workers=self.workers, retry="failed")
        report_outcome(outcome)
        if outcome.stopped:
            next_step("scaling demo")
            sys.exit(ExitCode.FAILURE)
        collect(outcome.plan)
        page, study = Report("quick", root=self.root).write()
        terminal.show(study)
        print(f"Report: {page}")
        if program() != "scaling":
            activate = Path(sys.executable).with_name("activate")
            print(f"To put the command scaling on the PATH of this shell: source {activate}")
        next_step(shlex.join(["scaling", "status", "quick", *root_option(self.root)]))


def report_outcome(outcome: LocalOutcome) -> None:
    """Print what one call of the local executor did."""
    from sweeps.reporting.status import RETRY_FAILED, reasons

    parts = [f"{len(outcome.trained)} trained", f"{len(outcome.present)} were done before"]
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    parts += [f"{len(outcome.stopped)} interrupted"] if outcome.stopped else []
    print(f"{outcome.plan.campaign.name}: {', '.join(parts)}.")
    for line in reasons((run, "failed", reason) for run, reason in outcome.failed.items()):
        print(plain(f"  {line}"))
    if outcome.failed:
        print(f"  To train failed runs again: {RETRY_FAILED}")
    for line in _changed_code_notes(outcome.plan, outcome.present):
        print(plain(f"  {line}"))


def _changed_code_notes(plan: CampaignPlan, done: Iterable[str]) -> list[str]:
    """Sentences on done runs whose code has changed since."""
    from scaling.run.directory import RunDirectory
    from scaling.run.provenance import changed_files
    from sweeps.reporting.plan_table import code_notes

    records = [RunDirectory(plan.root / "runs" / run).record() for run in done]
    return code_notes((record.code.commit, changed_files(record.code)) for record in records if record is not None)


def report_submission(submission: Submission, *, dry_run: bool) -> None:
    """Print what one submission did or, with `dry_run`, would do."""
    queued = len(submission.missing) if dry_run else len(submission.queued)
    counts = {
        "would be submitted" if dry_run else "submitted": queued,
        "done": len(submission.done),
        "queued or running": len(submission.already_active),
        "failed (--retry failed)": len(submission.failed),
        "cancelled (--retry cancelled)": len(submission.cancelled),
        "not checked": len(submission.unknown),
        "not accepted by SLURM": len(submission.rejected),
    }
    named = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{submission.plan.campaign.name}: {named or 'nothing to do'}.")
    for request in submission.requests():
        print(f"  {plain(request)}")
    if hours := submission.gpu_hours:
        print(f"Predicted: {hours:,.1f} GPU-hours.")
    if submission.jobs:
        print(f"Jobs: {', '.join(submission.jobs)}.")
    for note in [*submission.notes, *_changed_code_notes(submission.plan, submission.done)]:
        print(plain(f"  {note}"))
