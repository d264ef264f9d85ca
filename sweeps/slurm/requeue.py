"""What the batch script does when all processes of a job have ended: ``python -m sweeps.slurm.requeue RECORD STATUS TRIES``.

The one place where a job is requeued. A run that can continue goes back into the queue; one that was killed several
times without a step of progress is given up, with the end of its log; one that failed by itself waits for a person.
One that failed before its first step gets a second chance, for that may be the node's fault.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from scaling.errors import UserError
from scaling.io import read_json
from scaling.run.directory import RunDirectory
from scaling.training.pool import log_tail
from sweeps.slurm import array_records, bad_nodes
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.bad_nodes import NodeFailure
from sweeps.slurm.client import Unreachable, ask
from sweeps.slurm.job_exits import (
    ENDED_BY_SLURM,
    LEFT_EARLY,
    REFUSED,
    UNNOTED,
    JobExit,
    exit_of,
    read_exits,
    reason_to_abandon,
    record_exit,
)
from sweeps.slurm.lease import LOST_LEASE


class Job(NamedTuple):
    """The job that has just ended its work, as its environment tells."""

    id: str
    """``<array job>_<index>``."""
    restart: int
    node: str | None
    """None where it had several: nobody can say which of them failed."""
    processes: int = 1
    """Of its run."""


def main(record_file: str, status: int, tries: int) -> int:
    """Requeue the job, or leave it ended; returns the job's exit status."""
    file = Path(record_file)
    array, root = read_json(file, ArrayRecord), file.parent.parent
    job = Job(
        id=f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}",
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        node=os.environ.get("SLURMD_NODENAME") if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1" else None,
        processes=int(os.environ.get("SLURM_NTASKS", "1")),
    )
    again, noted, reasons, avoid = False, True, [], set[str]()
    before = bad_nodes.left_out(root)
    for run in array.runs_of(int(os.environ["SLURM_ARRAY_TASK_ID"])):
        directory = RunDirectory(root / "runs" / run)
        try:
            ending = _settle(directory, job, status, tries)
        except (OSError, UserError) as error:  # a run that cannot even note its end must not be started again and again
            noted = False
            said = f"{directory.path}: {error.strerror}" if isinstance(error, OSError) else str(error)
            reasons.append(f"{said}; the run's end could not be noted. Make room, and submit again.")
            continue
        if ending is None:
            continue
        if ending.reason_abandoned is None:
            again = True
        else:
            reasons.append(ending.reason_abandoned)
        if job.node is not None and failed_at_start(directory, ending):
            avoid.add(job.node)
            failure = NodeFailure(node=job.node, run=run, job=job.id, restart=job.restart, time=ending.time)
            bad_nodes.note_failures(root, [failure])
    bad = bad_nodes.left_out(root)
    for reason in reasons:
        with contextlib.suppress(OSError):  # the job's log may be on the same full disk, and a buffer would fail again
            os.write(2, f"{reason}\n".encode())
    left = _requeue(job.id) if again else 0
    # The job itself waits from here on, like the others that shall not come to that node.
    if again and avoid:
        bad_nodes.keep_away([job.id], sorted(avoid | set(bad)))
    if set(bad) - set(before):
        bad_nodes.keep_away([other.job for other in array_records.all_arrays(root) if other.job is not None], bad)
    if not noted:
        return UNNOTED
    return (status or 1) if reasons else left


def _settle(directory: RunDirectory, job: Job, status: int, tries: int) -> JobExit | None:
    """How the run's part in the job ended, noted; None where nothing is left to do for it."""
    if directory.record_file.exists() or (directory.path / array_records.CANCELLED).exists():
        return None
    endings = read_exits(directory)
    if endings and (endings[-1].job, endings[-1].restart) == (job.id, job.restart):
        *endings, ending = endings  # the job itself has noted how each of its runs ended
    else:
        if endings and endings[-1].reason_abandoned is not None:
            return None  # it had no part in this attempt
        ending = exit_of(directory, job=job.id, restart=job.restart, node=job.node, status=status)
    return None if ending.status == LOST_LEASE else _conclude(directory, endings, ending, job, tries)


def settle_unnoted(directory: RunDirectory, job: str, state: str, tries: int) -> None:
    """Note how a job ended that could not do so itself, for SLURM killed its batch script with the rest.

    Args:
        directory: Of a run that the job had begun.
        job: ``<array job>_<index>``.
        state: SLURM's state of the job, one of `ENDED_BY_SLURM`.
        tries: As the run's placement has it.
    """
    if directory.record_file.exists() or (directory.path / array_records.CANCELLED).exists() or directory.is_locked():
        return
    endings = read_exits(directory)
    restart = sum(ending.job == job for ending in endings)
    ending = exit_of(directory, job=job, restart=restart, node=None, status=ENDED_BY_SLURM[state])
    if endings and endings[-1].job == job and endings[-1].starts == ending.starts:
        return  # it has noted this end
    ending = msgspec.structs.replace(ending, state=state)
    _conclude(directory, endings, ending, Job(id=job, restart=restart, node=None), tries)


def _conclude(directory: RunDirectory, endings: list[JobExit], ending: JobExit, job: Job, tries: int) -> JobExit:
    """Note an ending that followed others, with what follows from it."""
    reason = _why_give_up(directory, endings, ending, tries, processes=job.processes)
    ending = msgspec.structs.replace(ending, reason_abandoned=reason)
    record_exit(directory, ending)
    row, attempts = directory.last_row(), directory.attempts()
    reached = row.step if row else ending.step
    if reason is not None and directory.state() != "failed":
        directory.note("end", step=reached, outcome="failed", reason=reason, job=job.id)
    elif reason is None and attempts and attempts[-1].event == "start":  # it had no time to say so itself
        said = f"its processes ended with status {ending.status}"
        if ending.state is not None:
            said = f"SLURM ended its job as {ending.state}"
        directory.note("end", step=reached, outcome="preempted", reason=said, job=job.id)
    return ending


def _why_give_up(
    directory: RunDirectory, before: list[JobExit], ending: JobExit, tries: int, *, processes: int
) -> str | None:
    """Why starting the run again would not help, or None."""
    if ending.status == REFUSED:
        return f"its program ended with an error; {log_tail(directory)}"
    # Of several processes one whose peer is gone, with its node perhaps, fails too: that is no failure of the program.
    if ending.status == 1 and processes == 1:
        first = not before or before[-1].status != 1
        if first and failed_at_start(directory, ending):
            return None
        return f"its program ended with an error; {log_tail(directory)}"
    reason = reason_to_abandon([*before, ending], tries)
    return None if reason is None else f"{reason}; {log_tail(directory)}"


def failed_at_start(directory: RunDirectory, ending: JobExit) -> bool:
    """Whether the job that ended so had failed before it logged a step."""
    if ending.status in (0, LEFT_EARLY, LOST_LEASE, REFUSED):
        return False
    before = [old.starts for old in read_exits(directory) if (old.job, old.restart) != (ending.job, ending.restart)]
    if ending.starts == (before[-1] if before else 0):
        return True  # it did not come to train
    row = directory.last_row()
    begun = [attempt.step for attempt in directory.attempts() if attempt.event == "start"][ending.starts - 1]
    return row is None or row.step <= begun


def _requeue(job: str) -> int:
    """Back into the queue, unless somebody is ending this job: a cancelled one stays cancelled."""
    try:
        state = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", job))
        if state is None or state[1] != "RUNNING":
            return 0
        ask("scontrol", "requeue", job)
    except Unreachable as error:
        print(f"cannot requeue: {error}. Submit the campaign again to continue this run.", file=sys.stderr)
        return LEFT_EARLY
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
