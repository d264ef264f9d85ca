"""Submission of a plan's missing runs as a few arrays, each run at most once; cancellation of runs.

Before `sbatch` is called, the array is on disk with its runs and each run is claimed; afterwards the array has its job
id. After an interruption the next call adopts the jobs that SLURM took and frees the runs of those that it did not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun, with_data
from sweeps.planning.retry import Retry, forget_divergence, retries
from sweeps.slurm import array_records, bad_nodes, exit_codes, requeue, sbatch
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.client import CommandError, configuration, max_array_size, run_slurm
from sweeps.slurm.queue_state import QueueSnapshot, queue_snapshot
from sweeps.slurm.select_runs import JobGroup, Submission, classify_runs

MAX_SCANCEL_IDS = 200


def submit_slurm(
    plan: CampaignPlan,
    *,
    retry: Retry = "none",
    order: Literal["cheap", "expensive"] = "cheap",
    dry_run: bool = False,
    max_gpu_hours: float | None = None,
    snapshot: bool = True,
) -> Submission:
    """Submit the runs of a plan that need a job.

    Args:
        plan: Its data are prepared first if need be, here and not in a job.
        retry: Which runs that ended badly or were cancelled are submitted again.
        order: Whether the cheapest runs go first.
        dry_run: Change nothing; the result describes what would be done. Works without SLURM.
        max_gpu_hours: Submit nothing if more than this is predicted.
        snapshot: Whether jobs run a copy of the present code; else the working tree, as long as it stays the same.

    Raises:
        UserError: SLURM was not reached, the prediction is above `max_gpu_hours`, or a file or a folder cannot be used.
    """
    if dry_run:
        submission = classify_runs(plan, queue_snapshot(plan.root), retry=retry, order=order)
        _check_cost(submission, max_gpu_hours)
        return submission
    try:
        limit = max_array_size(configuration())
    except CommandError as error:
        raise UserError(f"SLURM was not reached: {error}. Submit from a login node, or use --executor local.") from None
    plan = with_data(plan)
    with _exclusive(plan.root):
        plan.write()
        array_records.reconcile(plan.root)
        queue = queue_snapshot(plan.root)
        bad_nodes.note_failures(plan.root, queue.failed_starts())
        _record_slurm_exits(plan, queue)
        submission = classify_runs(plan, queue, retry=retry, order=order)
        for run in submission.cancelled:  # SLURM forgets after some minutes
            (plan.root / "runs" / run / array_records.CANCELLED).touch()
        _check_cost(submission, max_gpu_hours)
        if submission.missing:
            code = sbatch.take_snapshot(plan.root / "code") if snapshot else sbatch.code_root()
            owners = {run: location.array.token for run, location in queue.locations.items()}
            arrays = _Arrays(submission, code, owners, retry, exclude=bad_nodes.excluded_nodes(plan.root))
            for group in submission.groups:
                if (after := _jobs_before(submission, group)) is None:
                    continue
                for start in range(0, len(group.runs), limit * group.per_task):
                    arrays.submit(group, list(group.runs[start : start + limit * group.per_task]), after=after)
    return submission


def _record_slurm_exits(plan: CampaignPlan, queue: QueueSnapshot) -> None:
    """Record the exits of jobs that SLURM killed with their batch scripts: they count as attempts all the same."""
    for run in plan.distinct():
        task = queue.task(run.id)
        if task is None or task.verdict != "ended" or task.state not in exit_codes.OF_SLURM_STATE:
            continue
        if array_records.began(plan.root, run.id, queue.locations[run.id].array):
            max_kills = plan.placements[run.rung].slurm.max_kills
            requeue.record_slurm_exit(plan.directory(run), task.job, task.state, max_kills)


def _jobs_before(submission: Submission, group: JobGroup) -> list[str] | None:
    """Jobs that have to succeed before this group starts; None if a run that it starts from has no job."""
    plan = submission.plan
    before = {other for run in group.runs for other in run.starts_from}
    needed = {run for run in before if not (plan.root / "runs" / run / "record.json").exists()}
    if without_job := sorted(needed - {*submission.queued, *submission.already_active}):
        submission.rejected += [run.id for run in group.runs]
        submission.notes.append(
            f"{len(group.runs)} runs start from {', '.join(without_job)}, which is not done and has no job. Submit again later."
        )
        return None
    locations = array_records.locations(array_records.all_arrays(plan.root)) if needed else {}
    return sorted(job for run in needed if run in locations and (job := locations[run].job) is not None)


def _check_cost(submission: Submission, limit: float | None) -> None:
    if limit is not None and not (hours := submission.gpu_hours) <= limit:  # a limit of nan allows nothing
        raise UserError(
            f"{submission.plan.campaign.file}: the {len(submission.missing)} missing runs are predicted to take "
            f"{hours:,.1f} GPU-hours, and --max-gpu-hours allows {limit:,.1f}. Nothing was submitted. "
            "Raise the limit, or shorten the campaign."
        )


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """One submitter at a time, whose files are private because jobs execute them; a full disk is a `UserError`."""
    if (exposed := sbatch.exposed(root)) is not None:
        raise UserError(
            f"{exposed}: other users may write this folder, and could replace the code that your jobs execute under {root}. "
            f"Run: chmod go-w {shlex.quote(str(exposed))}; if it belongs to another user, choose another --root."
        )
    before = os.umask(0o077)
    try:
        for folder in ("runs", array_records.FOLDER):
            (root / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        with (root / array_records.FOLDER / ".lock").open("a") as lock:
            # Some shared file systems have no locks. Claims alone then separate two submitters.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{root}: {error.strerror}. Make room and submit again; nothing is submitted twice.") from None
    finally:
        os.umask(before)


@dataclass
class _Arrays:
    submission: Submission
    code: Path
    owners: dict[str, str]
    """Tokens of the arrays whose jobs for a run have ended, by run id."""
    retry: Retry
    exclude: list[str]

    def __post_init__(self) -> None:
        self.plan = self.submission.plan
        self.digest = sbatch.code_digest(self.code)

    def submit(self, group: JobGroup, runs: list[PlannedRun], *, after: list[str]) -> None:
        """Submit one array, or halves of it if SLURM has no room for the whole."""
        plan, submission = self.plan, self.submission
        ids = [run.id for run in runs]
        token = secrets.token_hex(6)
        name = array_records.job_name(plan.campaign.name, token)
        array = ArrayRecord(
            token=token, name=name, runs=tuple(ids), code=self.digest, per_task=group.per_task, after=tuple(after)
        )
        array_records.save(plan.root, array)
        present = {path.name for path in (plan.root / "runs").iterdir()}
        mine = [run for run in runs if self._own(run, group.slurm, token=token, present=present)]
        owned = [run.id for run in mine]
        if owned != ids:
            submission.already_active += [run for run in ids if run not in owned]
            array = array_records.save(plan.root, msgspec.structs.replace(array, runs=tuple(owned)))
        if not mine:
            array_records.drop(plan.root, array)
            return
        script = sbatch.batch_script(
            plan, group.slurm, token=token, tasks=array.tasks, code=self.code, after=after, exclude=self.exclude
        )
        try:
            job = sbatch.launch(plan.root / array_records.FOLDER / "slurm" / f"{token}.sh", script)
            array_records.save(plan.root, msgspec.structs.replace(array, job=job))
        except CommandError as error:
            adopted = array_records.adopt(plan.root, array)  # a lost answer is not an error
            if adopted is None:
                array_records.drop(plan.root, array)
                has_no_room = any(part in str(error) for part in sbatch.LIMIT_MESSAGES)
                if has_no_room and array.tasks > 1:
                    half = array.tasks // 2 * group.per_task
                    for part in (mine[:half], mine[half:]):
                        self.submit(group, part, after=after)
                    return
                note = f"SLURM refused: {error}. See scaling doctor; the same command tries again."
                if has_no_room:
                    note = f"SLURM takes no more jobs now ({error}); the same command submits the rest later."
                submission.rejected += owned
                submission.notes += [] if note in submission.notes else [note]
                return
            job = adopted
        submission.jobs.append(job)
        submission.queued += owned

    def _own(self, run: PlannedRun, slurm: SlurmConfig, *, token: str, present: set[str]) -> bool:
        """Claim a run for the array and make its directory ready; whether the array now owns it."""
        plan = self.plan
        placement = sbatch.job_placement(plan, run, slurm)
        if run.id not in present and array_records.create_and_claim(plan.root, run.id, token, run.spec, placement):
            return True
        if not array_records.claim(plan.root, run.id, token, instead_of=self.owners.get(run.id)):
            return False
        directory = plan.directory(run)
        state = directory.state()
        if state == "diverged" and retries(self.retry, "diverged"):
            forget_divergence(directory)
        directory.create(run.spec, placement, durable=False)
        (directory.path / array_records.CANCELLED).unlink(missing_ok=True)
        if state == "failed":
            with contextlib.suppress(UserError):  # raised for a history that cannot be read, and so counts for nothing
                if requeue.exits(directory):
                    directory.note("retry", step=requeue.checkpoint_step(directory))
        return True


def cancel_slurm(plan: CampaignPlan, runs: list[PlannedRun]) -> list[str]:
    """Cancel the jobs of some runs; their ids. Each run saves a checkpoint first and stays cancelled until it is retried.

    Raises:
        UserError: SLURM was not reached; then nothing was cancelled.
    """
    snapshot = queue_snapshot(plan.root)
    if not snapshot.states.queue_reached:
        raise UserError(f"{' '.join(snapshot.states.notes)} Nothing was cancelled; try again.")
    active = {run.id: task.job for run in runs if (task := snapshot.task(run.id)) is not None and task.is_active}
    for run in active:
        (plan.root / "runs" / run / array_records.CANCELLED).touch()
    # A run that shares its job with others leaves by its mark; the job ends when all of them are cancelled.
    jobs = sorted(set(active.values()))
    directories = {job: [RunDirectory(plan.root / "runs" / run) for run in snapshot.runs_of(job)] for job in jobs}
    whole = [job for job in jobs if all(requeue.needs_no_job(run) for run in directories[job])]
    try:
        for start in range(0, len(whole), MAX_SCANCEL_IDS):
            run_slurm("scancel", *whole[start : start + MAX_SCANCEL_IDS])
    except CommandError as error:
        raise UserError(f"{error}. Some jobs may go on; look with scaling status, and try again.") from None
    return jobs
