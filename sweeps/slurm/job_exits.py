"""How the jobs of a run ended before it was done: endings.jsonl in its directory, and what follows from it.

A kill says nothing about a run, and several in a row without a step between them say that another attempt would be
wasted. A run is given up in the last of its lines; asking for it again (``--retry failed``) takes the file away.
"""

from __future__ import annotations

import itertools
import re
import time

from scaling.io import Strict, append_line, read_lines
from scaling.run.directory import RunDirectory
from sweeps.slurm.lease import LOST_LEASE

FILE = "endings.jsonl"

LEFT_EARLY = 75
"""Exit status: asked to leave before training began; nothing is lost, and it may be started again."""

UNNOTED = 74
"""Exit status of a job whose end could not be written down: the disk is at fault, and no node."""

REFUSED = 2
"""Exit status: the run cannot be trained as it is; starting it again would not help."""

MAX_EXITS_WITHOUT_PROGRESS = 5
"""Endings without progress, of any kind, that are tolerated for each of the `tries` that kills are: a run that is asked
to leave before it can take a step wastes an allocation as surely as one that is killed."""

KILLED = 137
"""Exit status of a process that SIGKILL ended, as a shell counts."""

ENDED_BY_SLURM = {
    "TIMEOUT": KILLED,
    "DEADLINE": KILLED,
    "OUT_OF_MEMORY": KILLED,
    "NODE_FAIL": LEFT_EARLY,
    "PREEMPTED": LEFT_EARLY,
}
"""Exit status to note for a run whose job SLURM ended in that state, batch script and all; in the last two the run had
no part in it. A job in another state has ended its script, and noted what there was to note."""


class JobExit(Strict, frozen=True):
    """One line of endings.jsonl."""

    job: str
    status: int
    """As a shell counts: 0 and `LEFT_EARLY` where the run was asked to stop, 128 + n where signal n killed it."""
    step: int
    """That the next attempt will start from."""
    time: float
    restart: int = 0
    """How often SLURM had requeued the job."""
    node: str | None = None
    starts: int = 0
    """Attempts that had begun to train by then."""
    state: str | None = None
    """SLURM's state of the job, where the job was ended before it could note anything itself."""
    reason_abandoned: str | None = None
    """Why it is not started again, where it is not."""


def read_exits(directory: RunDirectory) -> list[JobExit]:
    """All endings of a run in order; of two lines about one attempt of a job the later one counts."""
    lines = read_lines(directory.path / FILE, JobExit)
    return list({(line.job, line.restart): line for line in lines}.values())


def reason_abandoned(directory: RunDirectory) -> str | None:
    """Why the run is not started again until somebody asks; None if it may be."""
    endings = read_exits(directory)
    return endings[-1].reason_abandoned if endings else None


def record_exit(directory: RunDirectory, ending: JobExit) -> None:
    """Append a line."""
    append_line(directory.path / FILE, ending)


def exit_of(directory: RunDirectory, *, job: str, restart: int, node: str | None, status: int) -> JobExit:
    """What is to be noted of a job's processes that have just ended."""
    starts = sum(attempt.event == "start" for attempt in directory.attempts())
    step = resume_step(directory)
    return JobExit(job=job, restart=restart, node=node, status=status, step=step, starts=starts, time=time.time())


def exits_without_progress(endings: list[JobExit]) -> tuple[int, int]:
    """How many endings in a row, up to the last, were kills, and how many there were at all, without progress."""
    counted = [ending for ending in endings if ending.status != LOST_LEASE]
    same = list(itertools.takewhile(lambda ending: ending.step == counted[-1].step, reversed(counted)))
    return sum(ending.status not in (0, LEFT_EARLY) for ending in same), len(same)


def reason_to_abandon(endings: list[JobExit], tries: int) -> str | None:
    """Why a run that keeps ending without a step of progress would do so again, or None."""
    killed, barren = exits_without_progress(endings)
    if killed >= tries:
        said = f"{killed} attempts were" if killed > 1 else "1 attempt was"
        said += " killed without a step of progress"
        if endings[-1].state == "TIMEOUT":
            return (
                f"{said}, by the time limit; raise minutes, for the first checkpoint comes after a step at the earliest"
            )
        return said
    if barren >= tries * MAX_EXITS_WITHOUT_PROGRESS:
        return f"{barren} attempts had to leave before a step of progress; ask for more minutes, or another partition"
    return None


def resume_step(directory: RunDirectory) -> int:
    """The step of the newest checkpoint, by its name; 0 where there is none."""
    steps = [re.match(r"step-(\d+)\.", point.name) for point in directory.checkpoints.glob("step-*.ckpt")]
    return max((int(step[1]) for step in steps if step), default=0)
