"""The post-job hook of the batch script: ``python -m sweeps.slurm.requeue RECORD STATUS MAX_KILLS``.

It runs when all processes of a job have ended, and is the only place that requeues a job. It records the exit of each run
in attempts.jsonl. A run that was killed several times without a step of progress, or whose program failed, is abandoned:
its exit has the outcome ``failed`` and the end of its log, and it waits for ``--retry failed``. A failure before the
first step is tolerated once, because the node may be at fault.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from scaling.errors import UserError
from scaling.io import append_line, read_json
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt
from scaling.training.pool import log_tail
from sweeps.slurm import array_records, bad_nodes, exit_codes
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.bad_nodes import NodeFailure
from sweeps.slurm.client import CommandError, run_slurm

EXITS_PER_KILL = 5
"""Exits without progress, of any kind, that are tolerated for each tolerated kill (`max_kills`)."""


def main(record_file: str, status: int, max_kills: int) -> int:
    """Record the exits of the job's runs and requeue the job if one of them can continue; the job's exit status."""
    file = Path(record_file)
    array, root = read_json(file, ArrayRecord), file.parent.parent
    job = _job_of_environment()["job"]
    requeue, recorded, reasons, avoided = False, True, [], set[str]()
    bad_before = bad_nodes.excluded_nodes(root)
    for run in array.runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"])):
        directory = RunDirectory(root / "runs" / run)
        try:
            found = _record_exit_of(directory, status, max_kills)
        except (OSError, UserError) as error:  # a run whose exit cannot be recorded must not restart again and again
            recorded = False
            text = f"{directory.path}: {error.strerror}" if isinstance(error, OSError) else str(error)
            reasons.append(f"{text}; the run's exit could not be recorded. Make room, and submit again.")
            continue
        if found is None:
            continue
        if found.outcome == "failed":
            reasons.append(str(found.reason))
        requeue |= found.outcome != "failed"
        if found.node is not None and failed_at_start(directory, found):
            avoided.add(found.node)
            failure = NodeFailure(node=found.node, run=run, job=job, restart=found.restart, time=found.time)
            bad_nodes.note_failures(root, [failure])
    bad = bad_nodes.excluded_nodes(root)
    for reason in reasons:
        with contextlib.suppress(OSError):  # the job's log may be on the same full disk, and a buffer would fail again
            os.write(2, f"{reason}\n".encode())
    requeue_status = _requeue(job) if requeue else exit_codes.DONE
    # The job itself is pending from here on, like the others that must avoid the node.
    if requeue and avoided:
        bad_nodes.exclude_from_pending([job], sorted(avoided | set(bad)))
    if set(bad) - set(bad_before):
        others = [other.job for other in array_records.all_arrays(root) if other.job is not None]
        bad_nodes.exclude_from_pending(others, bad)
    if not recorded:
        return exit_codes.NOT_RECORDED
    return (status or exit_codes.ERROR) if reasons else requeue_status


def exits(directory: RunDirectory) -> list[Attempt]:
    """Exits of the run's jobs since it was last retried; of two lines about one attempt of a job the later one counts."""
    found: dict[tuple[str | None, int], Attempt] = {}
    for line in directory.history():
        if line.event == "retry":
            found = {}
        elif line.event == "exit":
            found[line.job, line.restart] = line
    return list(found.values())


def reason_abandoned(directory: RunDirectory) -> str | None:
    """Why the run is not started again until a person retries it; None if it may be."""
    return next((line.reason for line in exits(directory)[-1:] if line.outcome == "failed"), None)


def exit_of(directory: RunDirectory, status: int, **fields: Any) -> Attempt:
    """The exit of a run's processes from this process's job, or from the one that the fields name; not recorded yet."""
    return Attempt(
        event="exit", time=time.time(), host=os.uname().nodename, pid=os.getpid(), step=checkpoint_step(directory),
        exit_status=status, **(fields or _job_of_environment()),
    )  # fmt: skip


def _job_of_environment() -> dict[str, Any]:
    """Fields of an exit from this process's job; no node if it has several, of which any may be bad."""
    return {
        "job": f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}",
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "node": os.environ.get("SLURMD_NODENAME") if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1" else None,
    }


def is_over(directory: RunDirectory) -> bool:
    """True if the run is done, or a person cancelled it."""
    return directory.record_file.exists() or (directory.path / array_records.CANCELLED).exists()


def needs_no_job(directory: RunDirectory) -> bool:
    """True if the run is over, or was abandoned."""
    return is_over(directory) or reason_abandoned(directory) is not None


def _record_exit_of(directory: RunDirectory, status: int, max_kills: int) -> Attempt | None:
    """The run's exit from the job, recorded; None if the run had no part in this attempt of it, or needs no other."""
    if is_over(directory):
        return None
    before, found = exits(directory), exit_of(directory, status)
    if before and (before[-1].job, before[-1].restart) == (found.job, found.restart):
        *before, found = before  # a job of several runs has recorded each exit itself
    elif before and before[-1].outcome == "failed":
        return None
    if found.exit_status == exit_codes.LEASE_LOST:
        return None
    return _conclude(directory, before, found, max_kills, processes=int(os.environ.get("SLURM_NTASKS", "1")))


def record_slurm_exit(directory: RunDirectory, job: str, state: str, max_kills: int) -> None:
    """Record a run's exit from a job that SLURM killed with its batch script; `state` is in `exit_codes.OF_SLURM_STATE`."""
    if is_over(directory) or directory.is_locked():
        return
    before = exits(directory)
    if before and before[-1].job == job and _starts_until(directory, before[-1]) == _starts_until(directory, None):
        return  # recorded already
    restart = sum(line.job == job for line in before)
    found = exit_of(directory, exit_codes.OF_SLURM_STATE[state], job=job, restart=restart, slurm_state=state)
    _conclude(directory, before, found, max_kills)


def _conclude(
    directory: RunDirectory, before: list[Attempt], found: Attempt, max_kills: int, *, processes: int = 1
) -> Attempt:
    """Decide after an exit, which followed others, whether the run is abandoned, and record it."""
    reason = _reason_to_abandon(directory, before, found, max_kills, processes=processes)
    if reason is not None:
        found = msgspec.structs.replace(found, outcome="failed", reason=reason)
    if found not in directory.history():
        append_line(directory.attempts_file, found)
    row, attempts = directory.last_row(), directory.attempts()
    step = row.step if row else found.step
    if reason is not None and directory.state() != "failed":
        directory.note("end", step=step, outcome="failed", reason=reason, job=found.job)
    elif reason is None and attempts and attempts[-1].event == "start":  # the process had no time to record its end
        by_itself = f"its processes ended with status {found.exit_status}"
        cause = by_itself if found.slurm_state is None else f"SLURM ended its job as {found.slurm_state}"
        directory.note("end", step=step, outcome="preempted", reason=cause, job=found.job)
    return found


def _reason_to_abandon(
    directory: RunDirectory, before: list[Attempt], found: Attempt, max_kills: int, *, processes: int
) -> str | None:
    """Why starting the run again would not help, or None."""
    failed = f"its program ended with an error; {log_tail(directory)}"
    if found.exit_status == exit_codes.INVALID_RUN:
        return failed
    # One of several processes also fails when a peer is gone, with its node perhaps: not an error of the program.
    if found.exit_status == exit_codes.ERROR and processes == 1:
        first = not before or before[-1].exit_status != exit_codes.ERROR
        return None if first and failed_at_start(directory, found) else failed
    killed, without_progress = exits_without_progress([*before, found])
    if killed >= max_kills:
        reason = f"{'1 attempt was' if killed == 1 else f'{killed} attempts were'} killed without a step of progress"
        if found.slurm_state == "TIMEOUT":
            reason += ", by the time limit; raise time_minutes, because the first checkpoint comes after a step at the earliest"
    elif without_progress >= max_kills * EXITS_PER_KILL:
        reason = f"{without_progress} attempts had to stop before a step of progress; raise time_minutes, or use another partition"
    else:
        return None
    return f"{reason}; {log_tail(directory)}"


def exits_without_progress(found: list[Attempt]) -> tuple[int, int]:
    """The number of kills, and of all exits, in a row up to the last exit without a newer checkpoint."""
    counted = [line for line in found if line.exit_status != exit_codes.LEASE_LOST]
    same = list(itertools.takewhile(lambda line: line.step == counted[-1].step, reversed(counted)))
    return sum(line.exit_status not in (exit_codes.DONE, exit_codes.LEFT_EARLY) for line in same), len(same)


def failed_at_start(directory: RunDirectory, found: Attempt) -> bool:
    """True if the job of that exit failed before it logged a step."""
    if found.exit_status in (exit_codes.DONE, exit_codes.LEFT_EARLY, exit_codes.LEASE_LOST, exit_codes.INVALID_RUN):
        return False
    before = [line for line in exits(directory) if (line.job, line.restart) != (found.job, found.restart)]
    starts = _starts_until(directory, found)
    if len(starts) == len(_starts_until(directory, before[-1]) if before else []):
        return True  # it did not start to train
    row = directory.last_row()
    return row is None or row.step <= starts[-1].step


def _starts_until(directory: RunDirectory, found: Attempt | None) -> list[Attempt]:
    """Starts of training up to an exit in the run's history, or all of them."""
    lines = itertools.takewhile(lambda line: line != found, directory.history())
    return [line for line in lines if line.event == "start"]


def checkpoint_step(directory: RunDirectory) -> int:
    """Step of the newest checkpoint, by its name; 0 without one."""
    steps = [re.match(r"step-(\d+)\.", file.name) for file in directory.checkpoints.glob("step-*.ckpt")]
    return max((int(step[1]) for step in steps if step), default=0)


def _requeue(job: str) -> int:
    try:
        # A job that is being ended stays so: it was cancelled.
        if re.search(r"JobState=RUNNING\b", run_slurm("scontrol", "show", "job", job)):
            run_slurm("scontrol", "requeue", job)
    except CommandError as error:
        print(f"cannot requeue: {error}. Submit the campaign again to continue this run.", file=sys.stderr)
        return exit_codes.LEFT_EARLY
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
