"""The SLURM executor: what is missing of a plan, handed to SLURM as a few arrays, each run at most once.

Before `sbatch` is called, the array is on disk with its runs and each run is claimed; afterwards the array has its job
id. Whatever interrupts this, the next call repairs it from the queue: it adopts what SLURM took and frees what it did
not. Nothing is submitted for a run that is done, waiting, running, or whose job cannot be looked up.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from submitit.core.utils import FailedJobError

from scaling.errors import Refusal
from scaling.records import RunDirectory
from sweeps import arrays
from sweeps.aftermath import ENDINGS
from sweeps.arrays import ArrayRecord
from sweeps.batch import Launcher, batch_script, job_placement
from sweeps.dispatch import Retry, forget_divergence, retries
from sweeps.lease import is_alive
from sweeps.placement import SlurmTable, slurm_tables
from sweeps.plan import Plan, PlannedRun, with_data
from sweeps.show import plan_costs
from sweeps.slurm import Task, Unreachable, largest_array, named
from sweeps.snapshot import code_digest, code_root, take_snapshot
from sweeps.survey import Survey, survey

IN_FLIGHT_SECONDS = 15.0
"""How long a call of sbatch whose caller was killed may still reach SLURM."""


OTHER_HOST_SECONDS = 600.0
"""How long a submitter on another host, whom nobody here can see, is taken to be at work."""


class Class(msgspec.Struct, frozen=True, kw_only=True):
    """Runs that ask SLURM for the same thing, and so can share arrays."""

    slurm: SlurmTable
    runs: tuple[PlannedRun, ...]


class Submission(msgspec.Struct, kw_only=True):
    """What one call of `submit_slurm` did or would do, run ids by what became of them."""

    plan: Plan
    classes: list[Class]
    """What is missing, by placement, in the order of submission."""
    done: list[str] = msgspec.field(default_factory=list)
    joined: list[str] = msgspec.field(default_factory=list)
    """Waiting or running already."""
    queued: list[str] = msgspec.field(default_factory=list)
    """Handed to SLURM by this call."""
    failed: list[str] = msgspec.field(default_factory=list)
    """Wait for ``--retry failed``."""
    cancelled: list[str] = msgspec.field(default_factory=list)
    """Cancelled by a person; wait for ``--retry cancelled``."""
    unknown: list[str] = msgspec.field(default_factory=list)
    """Their jobs could not be looked up, so they are left alone."""
    left: list[str] = msgspec.field(default_factory=list)
    """Not accepted by SLURM now; the same command submits them later."""
    jobs: list[str] = msgspec.field(default_factory=list)
    """Array job ids of this call."""
    notes: list[str] = msgspec.field(default_factory=list)

    @property
    def missing(self) -> list[PlannedRun]:
        """What would be submitted."""
        return [run for group in self.classes for run in group.runs]

    @property
    def gpu_hours(self) -> float:
        """Predicted for what is missing; 0 where no GPUs are asked for."""
        costs = plan_costs(self.plan)
        return sum(costs[run.id].hours * group.slurm.devices for group in self.classes for run in group.runs)

    def summary(self) -> list[str]:
        """What was done, or would be, in sentences; what waits for a person comes with the option that moves it."""
        missing = len(self.missing)
        arrays_text = f" in {len(self.jobs)} arrays (jobs {', '.join(self.jobs)})" if self.jobs else ""
        lines = [
            f"{self.plan.campaign.name}: {missing} runs missing, {len(self.queued)} queued{arrays_text}, "
            f"{len(self.joined)} waiting or running already, {len(self.done)} done."
        ]
        if missing and self.gpu_hours:
            lines.append(f"What is missing is predicted to take {self.gpu_hours:,.1f} GPU-hours.")
        for runs, text in (
            (self.failed, "failed; try them again with --retry failed"),
            (self.cancelled, "were cancelled; submit them again with --retry cancelled"),
            (self.unknown, "have jobs that SLURM could not be asked about, and were left alone"),
            (self.left, "were not taken by SLURM now; the same command submits them later"),
        ):
            if runs:
                shown = ", ".join(runs[:5]) + (", ..." if len(runs) > 5 else "")
                lines.append(f"{len(runs)} {text}: {shown}.")
        return lines + list(dict.fromkeys(self.notes))

    def scripts(self) -> list[str]:
        """The batch scripts, one for each placement."""
        return [
            batch_script(
                self.plan, group.slurm, name=f"{self.plan.campaign.name}-TOKEN", token="TOKEN", tasks=len(group.runs)
            )
            for group in self.classes
        ]


def submit_slurm(
    plan: Plan,
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
        Refusal: SLURM is not reachable, the prediction is above `max_gpu_hours`, or something in the way cannot be used.
    """
    if dry_run:
        submission = _sort(plan, _tables(plan), survey(plan.root), retry=retry, order=order)
        _refuse_cost(submission, max_gpu_hours)
        return submission
    limit = largest_array()
    plan = with_data(plan)
    plan.write()
    with _one_submitter(plan.root):
        _repair(plan.root)
        seen = survey(plan.root)
        submission = _sort(plan, _tables(plan), seen, retry=retry, order=order)
        _refuse_cost(submission, max_gpu_hours)
        if submission.missing:
            code = take_snapshot(plan.root / "code") if snapshot else code_root()
            owners = {run: place.array.token for run, place in seen.places.items()}
            for group in submission.classes:
                after = _jobs_before(submission, group)
                if after is None:
                    continue
                for start in range(0, len(group.runs), limit):
                    runs = list(group.runs[start : start + limit])
                    _submit(submission, group.slurm, runs, code=code, owners=owners, retry=retry, after=after)
    return submission


def prerequisites(run: PlannedRun) -> set[str]:
    """Runs that this one starts from, by their weights or as a branch of their course."""
    initial = run.spec.initial.run if run.spec.initial else None
    return {other for other in (initial, run.spec.branch_of) if other is not None}


def _jobs_before(submission: Submission, group: Class) -> list[str] | None:
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
    places = arrays.locations(arrays.all_arrays(root)) if needed else {}
    return sorted(job for run in needed if run in places and (job := places[run].job) is not None)


def _tables(plan: Plan) -> dict[str, SlurmTable]:
    return slurm_tables(plan.placements, plan.campaign.placement, where=plan.campaign.file)


def _sort(plan: Plan, tables: dict[str, SlurmTable], seen: Survey, *, retry: Retry, order: str) -> Submission:
    """The runs by what is to be done with them; looks and changes nothing."""
    found = Submission(plan=plan, classes=[], notes=list(seen.answer.notes))
    missing: list[PlannedRun] = []
    folder = plan.root / "runs"
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    for run in sorted(plan.distinct(), key=lambda run: run.spec.budget.flops, reverse=order == "expensive"):
        if run.id not in present:
            missing.append(run)
            continue
        state = plan.state(run)
        place, task = seen.places.get(run.id), seen.task(run.id)
        if state in ("finished", "diverged") and not (state == "diverged" and retries(retry, "diverged")):
            found.done.append(run.id)
        elif state == "running" or (task is not None and task.verdict in ("pending", "running")):
            found.joined.append(run.id)
            if task is not None and task.advice is not None:
                found.notes.append(task.advice)
        elif (place is not None and not seen.answer.queue_reached) or (task is not None and task.verdict == "unknown"):
            found.unknown.append(run.id)
        elif place is not None and place.job is None:
            found.joined.append(run.id)  # another submitter is at it; `_repair` has left it alone
        elif state == "failed" and not retries(retry, "failed"):
            found.failed.append(run.id)
        elif _was_cancelled(plan, run, task) and not retries(retry, "cancelled"):
            found.cancelled.append(run.id)
        else:
            missing.append(run)
    found.classes = _classes(plan, missing, tables)
    return found


def _classes(plan: Plan, missing: list[PlannedRun], tables: dict[str, SlurmTable]) -> list[Class]:
    """Runs that can share an array; those that start from other runs come after all that do not."""
    groups: dict[tuple[int, bytes], tuple[SlurmTable, list[PlannedRun]]] = {}
    depth: dict[str, int] = {}
    by_id = {run.id: run for run in missing}

    def level(run: PlannedRun) -> int:
        if run.id not in depth:
            before = [level(by_id[other]) for other in prerequisites(run) if other in by_id]
            depth[run.id] = 1 + max(before, default=0) if prerequisites(run) else 0
        return depth[run.id]

    for run in missing:
        table = tables[run.rung]
        job_placement(plan, run, table)  # refuses before anything is submitted
        groups.setdefault((level(run), msgspec.json.encode(table)), (table, []))[1].append(run)
    return [Class(slurm=groups[key][0], runs=tuple(groups[key][1])) for key in sorted(groups, key=lambda key: key[0])]


def _was_cancelled(plan: Plan, run: PlannedRun, task: Task | None) -> bool:
    marked = (plan.directory(run).path / arrays.CANCELLED).exists()
    return marked or (task is not None and task.verdict == "cancelled")


def _refuse_cost(submission: Submission, limit: float | None) -> None:
    if limit is not None and (hours := submission.gpu_hours) > limit:
        raise Refusal(
            f"{submission.plan.campaign.file}: the {len(submission.missing)} missing runs are predicted to take "
            f"{hours:,.1f} GPU-hours, and --max-gpu-hours allows {limit:,.1f}. Nothing was submitted. "
            "Raise the limit, or shorten the campaign."
        )


@contextlib.contextmanager
def _one_submitter(root: Path) -> Iterator[None]:
    folder = root / arrays.FOLDER
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


def _repair(root: Path) -> None:
    """Finish what a killed submitter began: adopt its job, or free its runs when SLURM never got it."""
    for array in arrays.all_arrays(root):
        if array.job is not None or _at_work(array):
            continue
        while True:
            try:
                job = named(array.name)
            except Unreachable as error:
                raise Refusal(
                    f"an earlier submission was interrupted, and SLURM cannot say whether it got it: {error}. "
                    "Submit again when it can."
                ) from None
            if job is not None:
                arrays.with_job(root, array, job)
                break
            if time.time() - array.time > IN_FLIGHT_SECONDS or array.time > time.time():
                arrays.drop(root, array)
                break
            time.sleep(0.5)


def _submit(
    submission: Submission,
    slurm: SlurmTable,
    runs: list[PlannedRun],
    *,
    code: Path,
    owners: dict[str, str],
    retry: Retry,
    after: list[str],
) -> None:
    """One array; halves of it where SLURM has no room for the whole."""
    plan = submission.plan
    ids = [run.id for run in runs]
    seed = f"{os.uname().nodename} {os.getpid()} {time.time_ns()} {' '.join(ids)}"
    token = hashlib.sha256(seed.encode()).hexdigest()[:12]
    name = f"{plan.campaign.name}-{token}"
    array = arrays.new_array(plan.root, token=token, name=name, runs=ids, code=code_digest(code))
    present = {path.name for path in (plan.root / "runs").iterdir()}
    mine = [
        run.id
        for run in runs
        if _own(plan, run, slurm, token=token, present=present, owner=owners.get(run.id), retry=retry)
    ]
    if mine != ids:
        submission.joined += [run for run in ids if run not in mine]
        array = msgspec.structs.replace(array, runs=tuple(mine))
        arrays.save(plan.root, array)
    if not mine:
        arrays.drop(plan.root, array)
        return
    script = batch_script(plan, slurm, name=name, token=token, tasks=len(mine), code=code, after=after)
    try:
        job = Launcher(plan.root / arrays.FOLDER / "slurm", script).launch()
    except FailedJobError as error:
        said = " ".join(str(error).split()).removeprefix("sbatch: error: ") or "sbatch failed"
        adopted = _adopt_after_error(name)
        if adopted is not None:
            job = adopted
        else:
            arrays.drop(plan.root, array)
            if _no_room(said) and len(mine) > 1:
                half = len(mine) // 2
                kept = [run for run in runs if run.id in mine]
                for part in (kept[:half], kept[half:]):
                    _submit(submission, slurm, part, code=code, owners=owners, retry=retry, after=after)
                return
            submission.left += mine
            submission.notes.append(_why_refused(said))
            return
    arrays.with_job(plan.root, array, job)
    submission.jobs.append(job)
    submission.queued += mine


def _at_work(array: ArrayRecord) -> bool:
    """Whether the submitter of an array without a job may still be about to get one."""
    if array.host == os.uname().nodename:
        return array.pid != os.getpid() and is_alive(array.pid)
    return time.time() - array.time < OTHER_HOST_SECONDS


def _own(
    plan: Plan, run: PlannedRun, slurm: SlurmTable, *, token: str, present: set[str], owner: str | None, retry: Retry
) -> bool:
    """Whether the array now owns the run, whose directory is made or made ready."""
    placement = job_placement(plan, run, slurm)
    if run.id not in present and arrays.create_and_claim(plan.root, run.id, token, run.spec, placement):
        return True
    if not arrays.claim(plan.root, run.id, token, instead_of=owner):
        return False
    directory = plan.directory(run)
    state = directory.state()
    if state == "diverged" and retries(retry, "diverged"):
        forget_divergence(directory)
    directory.create(run.spec, placement, durable=False)
    (directory.path / arrays.CANCELLED).unlink(missing_ok=True)
    if state == "failed":
        (directory.path / ENDINGS).unlink(missing_ok=True)  # what failed before does not count against this try
    return True


def _no_room(said: str) -> bool:
    return any(
        word in said for word in ("SubmitLimit", "MaxSubmit", "job limit", "max jobs", "MaxJobCount", "array index")
    )


def _why_refused(said: str) -> str:
    if _no_room(said):
        return f"SLURM takes no more of your jobs now ({said}); the same command submits the rest later."
    return f"SLURM refused: {said}. See scaling doctor; the same command tries again."


def _adopt_after_error(name: str) -> str | None:
    """Sbatch can fail after SLURM took the job: a lost answer is not a refusal."""
    try:
        return named(name)
    except Unreachable as error:
        raise Refusal(
            f"sbatch failed and SLURM cannot say whether it took the job {name}: {error}. "
            "Submit again when it can; nothing will be submitted twice."
        ) from None
