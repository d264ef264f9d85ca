"""The SLURM executor: what is missing of a plan, handed to SLURM as a few arrays, each run at most once.

Before `sbatch` is called, the array is on disk with its runs and each run is claimed; afterwards the array has its job
id. Whatever interrupts this, the next call repairs it from the queue: it adopts what SLURM took and frees what it did
not. Nothing is submitted for a run that is done, waiting, running, or whose job cannot be looked up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun, with_data
from sweeps.planning.retry import Retry, forget_divergence, retries
from sweeps.slurm import array_records, bad_nodes, job_exits
from sweeps.slurm.client import largest_array
from sweeps.slurm.queue_state import QueueSnapshot, survey
from sweeps.slurm.reconcile import adopted_after_error, repair
from sweeps.slurm.requeue import settle_unnoted
from sweeps.slurm.sbatch import QUEUE_IS_FULL, SubmissionError, batch_script, job_placement, launch
from sweeps.slurm.select_runs import prerequisites, sort
from sweeps.slurm.snapshot import code_digest, code_root, exposed, take_snapshot
from sweeps.slurm.submission import JobGroup, Submission


def submit_slurm(
    plan: CampaignPlan,
    *,
    retry: Retry = "none",
    order: Literal["cheap", "expensive"] = "cheap",
    dry_run: bool = False,
    max_gpu_hours: float | None = None,
    snapshot: bool = True,
) -> Submission:
    """Hand to SLURM what is missing of a plan.

    Args:
        plan: Its data are prepared first if need be, here and not in a job.
        retry: Which runs that ended badly or were cancelled are submitted again.
        order: Whether the cheapest runs go first.
        dry_run: Change nothing; the result says what would be done. Works without SLURM.
        max_gpu_hours: Refuse to submit more than this, predicted.
        snapshot: Whether jobs run a copy of the code as it is now; else the working tree, as long as it stays the same.

    Raises:
        UserError: SLURM is not reachable, the prediction is above `max_gpu_hours`, or something in the way cannot be used.
    """
    if dry_run:
        submission = sort(plan, survey(plan.root), retry=retry, order=order)
        _refuse_cost(submission, max_gpu_hours)
        return submission
    limit = largest_array()
    plan = with_data(plan)
    with _room(plan.root), _private(plan.root), _one_submitter(plan.root):
        plan.write()
        repair(plan.root)
        seen = survey(plan.root)
        bad_nodes.note_failures(plan.root, seen.jobs_that_never_began())
        _settle_ended(plan, seen)
        submission = sort(plan, seen, retry=retry, order=order)
        for run in submission.cancelled:  # SLURM forgets after some minutes
            (plan.root / "runs" / run / array_records.CANCELLED).touch()
        _refuse_cost(submission, max_gpu_hours)
        if submission.missing:
            code = take_snapshot(plan.root / "code") if snapshot else code_root()
            owners = {run: place.array.token for run, place in seen.places.items()}
            array = _Arrays(submission, code=code, owners=owners, retry=retry, exclude=bad_nodes.left_out(plan.root))
            for group in submission.classes:
                after = _jobs_before(submission, group)
                if after is None:
                    continue
                for start in range(0, len(group.runs), limit * group.per_task):
                    array.submit(group, list(group.runs[start : start + limit * group.per_task]), after=after)
    return submission


def _settle_ended(plan: CampaignPlan, seen: QueueSnapshot) -> None:
    """Note how jobs ended that SLURM killed before they could: they count as attempts all the same."""
    for run in plan.distinct():
        task, place = seen.task(run.id), seen.places.get(run.id)
        if task is None or place is None or task.verdict != "over" or task.state not in job_exits.ENDED_BY_SLURM:
            continue
        if array_records.began(plan.root, run.id, place.array):
            settle_unnoted(plan.directory(run), task.job, task.state, plan.placements[run.rung].slurm.max_kills)


def _jobs_before(submission: Submission, group: JobGroup) -> list[str] | None:
    """Jobs that SLURM shall wait for before it starts this group; None where one of them will never come."""
    root = submission.plan.root
    needed = {run for planned in group.runs for run in prerequisites(planned)}
    needed = {run for run in needed if not RunDirectory(root / "runs" / run).record_file.exists()}
    alive = set(submission.queued) | set(submission.joined)
    if needed - alive:
        submission.left += [run.id for run in group.runs]
        submission.notes.append(
            f"{len(group.runs)} runs start from {', '.join(sorted(needed - alive))}, which is neither done nor on its "
            "way. Submit again when it is."
        )
        return None
    places = array_records.locations(array_records.all_arrays(root)) if needed else {}
    return sorted(job for run in needed if run in places and (job := places[run].job) is not None)


def _refuse_cost(submission: Submission, limit: float | None) -> None:
    if limit is not None and not (hours := submission.gpu_hours) <= limit:  # a limit of nan allows nothing
        raise UserError(
            f"{submission.plan.campaign.file}: the {len(submission.missing)} missing runs are predicted to take "
            f"{hours:,.1f} GPU-hours, and --max-gpu-hours allows {limit:,.1f}. Nothing was submitted. "
            "Raise the limit, or shorten the campaign."
        )


@contextlib.contextmanager
def _room(root: Path) -> Iterator[None]:
    """A full disk as a error: what SLURM has taken by then is on record, and the rest goes in later."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{root}: {error.strerror}. Make room and submit again; what was handed over is not submitted twice."
        ) from None


@contextlib.contextmanager
def _private(root: Path) -> Iterator[None]:
    """What is made here is the user's alone, for jobs execute it; a root that others can replace is refused."""
    if (folder := exposed(root)) is not None:
        raise UserError(
            f"{folder}: others may write this folder, and could replace what your jobs execute under {root}. "
            f"Run: chmod go-w {shlex.quote(str(folder))}; where it belongs to somebody else, choose another --root."
        )
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _one_submitter(root: Path) -> Iterator[None]:
    folder = root / array_records.FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (root / "runs").mkdir(exist_ok=True, mode=0o700)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # Some shared file systems have no locks. Claims alone then keep two submitters apart.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Arrays:
    """Hands arrays of one submission to SLURM, and writes into it what became of them."""

    def __init__(
        self, submission: Submission, *, code: Path, owners: dict[str, str], retry: Retry, exclude: list[str]
    ) -> None:
        self.submission = submission
        self.plan = submission.plan
        self.code = code
        self.digest = code_digest(code)
        self.owners = owners
        self.retry = retry
        self.exclude = exclude

    def submit(self, group: JobGroup, runs: list[PlannedRun], *, after: list[str]) -> None:
        """One array; halves of it where SLURM has no room for the whole."""
        plan, submission = self.plan, self.submission
        ids = [run.id for run in runs]
        seed = f"{os.uname().nodename} {os.getpid()} {time.time_ns()} {' '.join(ids)}"
        token = hashlib.sha256(seed.encode()).hexdigest()[:12]
        name = f"{plan.campaign.name}-{token}"
        array = array_records.new_array(
            plan.root, token=token, name=name, runs=ids, code=self.digest, per_task=group.per_task, after=after
        )
        present = {path.name for path in (plan.root / "runs").iterdir()}
        mine = [run for run in runs if self._own(run, group.slurm, token=token, present=present)]
        if len(mine) != len(runs):
            kept = {run.id for run in mine}
            submission.joined += [run for run in ids if run not in kept]
            array = msgspec.structs.replace(array, runs=tuple(run.id for run in mine))
            array_records.save(plan.root, array)
        if not mine:
            array_records.drop(plan.root, array)
            return
        script = batch_script(
            plan,
            group.slurm,
            name=name,
            token=token,
            tasks=array.tasks,
            code=self.code,
            after=after,
            exclude=self.exclude,
        )
        try:
            job = launch(plan.root / array_records.FOLDER / "slurm" / f"{token}.sh", script)
        except SubmissionError as error:
            said = str(error)
            adopted = adopted_after_error(name)
            if adopted is None:
                array_records.drop(plan.root, array)
                if _no_room(said) and array.tasks > 1:
                    half = array.tasks // 2 * group.per_task
                    for part in (mine[:half], mine[half:]):
                        self.submit(group, part, after=after)
                    return
                submission.left += [run.id for run in mine]
                if (why := _why_refused(said)) not in submission.notes:
                    submission.notes.append(why)
                return
            job = adopted
        array_records.with_job(plan.root, array, job)
        submission.jobs.append(job)
        submission.queued += [run.id for run in mine]

    def _own(self, run: PlannedRun, slurm: SlurmConfig, *, token: str, present: set[str]) -> bool:
        """Whether the array now owns the run, whose directory is made or made ready."""
        plan = self.plan
        placement = job_placement(plan, run, slurm)
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
            (directory.path / job_exits.FILE).unlink(
                missing_ok=True
            )  # what failed before does not count against this try
        return True


def _no_room(said: str) -> bool:
    return any(
        word in said
        for word in ("SubmitLimit", "MaxSubmit", "job limit", "max jobs", "MaxJobCount", "array index", *QUEUE_IS_FULL)
    )


def _why_refused(said: str) -> str:
    if _no_room(said):
        return f"SLURM takes no more jobs now ({said}); the same command submits the rest later."
    return f"SLURM refused: {said}. See scaling doctor; the same command tries again."
