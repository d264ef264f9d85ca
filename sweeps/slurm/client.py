"""What SLURM says, asked carefully: argument lists, time limits, tolerant parsing, and a name for not being reached.

SLURM's word is a hint about an attempt, never about a run: it calls a run COMPLETED that a signal stopped half-way. The
run's own record decides (`scaling.run.directory`); here is only who is waiting, who is running and how attempts ended.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from scaling.errors import UserError

Verdict = Literal["pending", "running", "over", "cancelled", "unknown"]

VERDICTS: dict[str, Verdict] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending",
    "SPECIAL_EXIT": "pending",
    "RESV_DEL_HOLD": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    # Accounting says so for seconds while the queue has the requeued job; the queue is asked first.
    "PREEMPTED": "over",
    "NODE_FAIL": "over",
    "TIMEOUT": "over",
    "DEADLINE": "over",
    "FAILED": "over",
    "OUT_OF_MEMORY": "over",
    "BOOT_FAIL": "over",
    "COMPLETED": "over",
    "REVOKED": "over",
    "CANCELLED": "cancelled",
}
"""What a state says about an attempt. A state that is not here is unknown, which is not the same as over."""

GROUP_LIMIT = (
    "it starts when others of your {owner} end, or never if it asks for more than the limit by itself; compare its "
    "request with: sacctmgr show {show}"
)

STUCK: dict[str, str] = {
    "launch failed requeued held": "SLURM holds it after a failed launch; release it with: scontrol release {job}",
    "JobHeldUser": "you hold it; release it with: scontrol release {job}",
    "JobHeldAdmin": "an administrator holds it; ask them, or cancel it",
    "DependencyNeverSatisfied": "it waits for a job that failed; cancel it and submit again",
    "PartitionTimeLimit": "its time limit is above the partition's; cancel it, lower minutes, and submit again",
    "PartitionNodeLimit": "it asks for more nodes than the partition has; cancel it, lower nodes, and submit again",
    "BadConstraints": "no node has what it asks for; cancel it, change constraint, and submit again",
    "Jobs": "your account or QOS has as many running jobs as it may; it starts when one of them ends",
    "Minutes": "the budget of your account or QOS does not cover it; ask your administrators, or lower minutes",
    "PerJob": "it asks for more than one job may have; cancel it, ask for less in [placement.slurm], and submit again",
    "AssocGrp": GROUP_LIMIT.format(owner="account", show="assoc where user=$USER"),
    "AssocMax": GROUP_LIMIT.format(owner="account", show="assoc where user=$USER"),
    "QOSGrp": GROUP_LIMIT.format(owner="QOS", show="qos"),
    "QOSMax": GROUP_LIMIT.format(owner="QOS", show="qos"),
}
"""What to do about a pending job, by a part of SLURM's reason; the first that fits counts. For other reasons, such as
Priority and Resources, it is enough to wait."""

LOST = "lost"
"""State of a task that the controller has forgotten although nobody cancelled it: it crashed before it saved the job."""

KEPT_VARIABLES = ("SLURM_CONF",)
DROPPED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "PMIX_", "PMI_", "SUBMITIT_")

TIMEOUT_SECONDS = 30.0


class Unreachable(Exception):
    """A SLURM command is missing, failed, or did not answer; the message is a clause for the user."""


def clean_environment() -> dict[str, str]:
    """This process's environment without what a surrounding job left in it: it would bind the new job to the old."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT_VARIABLES or not name.startswith(DROPPED_PREFIXES)
    }


def ask(*command: str, timeout: float = TIMEOUT_SECONDS) -> str:
    """What a SLURM command prints.

    Raises:
        Unreachable: It is missing, exits with an error, or takes longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=clean_environment()
        )
    except FileNotFoundError:
        raise Unreachable(f"there is no command {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {timeout:g} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise Unreachable(f"{command[0]} failed: {said[:300]}")
    return done.stdout


@dataclass(frozen=True)
class SlurmTask:
    """One task of an array as SLURM sees it."""

    job: str
    """``<array job>_<index>``."""
    state: str
    verdict: Verdict
    reason: str = ""
    """Why it is pending, as SLURM says it."""
    seconds: float = 0.0
    """Elapsed in all its attempts; 0 where there is no accounting."""
    gpu_seconds: float = 0.0
    node: str | None = None
    """Where it last ran, if that was one node."""
    status: int | None = None
    """Exit status of its script, where the accounting has it."""

    @property
    def advice(self) -> str | None:
        """SLURM's reason why the job waits, with what to do about it; None where there is no reason yet."""
        if self.verdict != "pending" or self.reason in ("", "None"):
            return None
        remedy = next((remedy for known, remedy in STUCK.items() if known.lower() in self.reason.lower()), None)
        return f"SLURM's reason is {self.reason}" + (f": {remedy.format(job=self.job)}" if remedy else "")


@dataclass(frozen=True)
class JobStates:
    """What the queue and the accounting said about some arrays, and what could not be asked."""

    tasks: dict[str, SlurmTask] = field(default_factory=dict)
    """By ``<array job>_<index>``."""
    notes: tuple[str, ...] = ()
    """What could not be reached, as sentences."""
    queue_reached: bool = True
    accounting_reached: bool = True

    def knows(self, array: str) -> bool:
        """Whether the queue, the controller or the accounting has a task of the array that is not lost."""
        return any(job.startswith(f"{array}_") and task.state != LOST for job, task in self.tasks.items())


def look_up(jobs: Mapping[str, str], *, tasks_of: Mapping[str, int] | None = None) -> JobStates:
    """States of all tasks of some array jobs: one `squeue`, and one `sacct` for attempts and their cost.

    Args:
        jobs: Job names by array job id. SLURM's ids come round again, so a job of another name is another job.
        tasks_of: How many tasks each array has, by its id; one that is in neither answer is asked about by itself.
    """
    if not jobs:
        return JobStates()
    notes = []
    tasks: dict[str, SlurmTask] = {}
    accounting_reached = True
    try:
        fields = "JobID,JobName,State,ElapsedRaw,AllocTRES,NodeList,ExitCode"
        tasks = accounted(ask("sacct", "-n", "-X", "-P", "-D", "-j", ",".join(sorted(jobs)), "-o", fields), jobs)
    except Unreachable as error:
        accounting_reached = False
        notes.append(f"SLURM's accounting could not be asked ({error}): hours spent and cancelled jobs are not known.")
    reached = True
    try:
        queued = queue(jobs)
    except Unreachable as error:
        reached = False
        notes.append(f"SLURM's queue could not be asked ({error}): states are from the runs' own files.")
        queued = {}
    for job, task in queued.items():
        spent = tasks.get(job)
        tasks[job] = replace(task, seconds=spent.seconds, gpu_seconds=spent.gpu_seconds) if spent else task
    if reached:
        _settle(jobs, tasks, queued, tasks_of or {})
    return JobStates(tasks=tasks, notes=tuple(notes), queue_reached=reached, accounting_reached=accounting_reached)


def _settle(
    jobs: Mapping[str, str], tasks: dict[str, SlurmTask], queued: dict[str, SlurmTask], tasks_of: Mapping[str, int]
) -> None:
    """Find out how tasks ended that have left the queue, where the accounting is silent or behind.

    The controller remembers jobs for some minutes. A task that it has forgotten and that was running is over. One that
    the accounting still calls pending was cancelled before it began if the controller knows other tasks of its array,
    for a single waiting task leaves no trace in the accounting when it is cancelled; else the controller lost the array.
    """
    open_ended = {
        job.split("_")[0] for job, task in tasks.items() if job not in queued and task.verdict in ("pending", "running")
    }
    known = Counter(task.split("_")[0] for task in tasks)
    silent = {job for job in jobs if known[job] < tasks_of.get(job, 1)}
    for array in sorted(open_ended | silent):
        answered, remembered = True, {}
        try:
            remembered = controlled(ask("scontrol", "-o", "show", "job", array), jobs)
        except Unreachable as error:
            answered = "Invalid job id" in str(error)
        known_to_controller = bool(remembered) or any(job.split("_")[0] == array for job in queued)
        for job, state in remembered.items():
            if job not in queued and (job not in tasks or tasks[job].verdict in ("pending", "running")):
                before = tasks.get(job, SlurmTask(job, state, "unknown"))
                tasks[job] = replace(before, state=state, verdict=verdict(state))
        for job, task in tasks.items():
            if job.split("_")[0] == array and job not in queued and job not in remembered:
                if task.verdict == "pending" and known_to_controller:
                    tasks[job] = replace(task, state="CANCELLED", verdict="cancelled")
                elif task.verdict == "pending":
                    tasks[job] = replace(task, state=LOST, verdict="over" if answered else "unknown")
                elif task.verdict == "running":
                    tasks[job] = replace(task, state=LOST, verdict="over")


def controlled(text: str, jobs: Mapping[str, str]) -> dict[str, str]:
    """States by task from ``scontrol -o show job``; `jobs` as for `look_up`."""
    states: dict[str, str] = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        array, index, state = fields.get("ArrayJobId"), fields.get("ArrayTaskId"), fields.get("JobState")
        if array and index and state and jobs.get(array) == fields.get("JobName"):
            states.update((task, state) for task in expand(f"{array}_[{index}]"))
    return states


def queue(jobs: Mapping[str, str]) -> dict[str, SlurmTask]:
    """Tasks that are waiting or running, by job.

    Raises:
        Unreachable: The queue could not be asked.
    """
    # All of the user's jobs: asking for an id that SLURM has forgotten is an error in some versions.
    text = ask("squeue", "-h", "-r", "--me", "-o", "%i|%j|%T|%r")
    found = {}
    for line in text.splitlines():
        job, name, state, reason = [*line.split("|", 3), "", "", ""][:4]
        if jobs.get(job.split("_")[0]) == name:
            found[job] = SlurmTask(job=job, state=state, verdict=verdict(state), reason=reason)
    return found


def named(name: str) -> str | None:
    """The job of that name in the queue or the accounting of the last days, or None if SLURM knows none.

    Raises:
        Unreachable: The queue could not be asked.
    """
    for line in ask("squeue", "-h", "--me", "-n", name, "-o", "%F").splitlines():
        return line.strip()
    try:
        text = ask("sacct", "-n", "-X", "-P", "-S", "now-7days", "--name", name, "-o", "JobID")
    except Unreachable:
        return None
    return next((line.split("_")[0].strip() for line in text.splitlines() if line.strip()), None)


def verdict(state: str) -> Verdict:
    """What a state says, whatever SLURM writes after it (``CANCELLED by 0``)."""
    word = re.match(r"[A-Z_]*", state.strip())
    return VERDICTS.get(word[0] if word else "", "unknown")


def accounted(text: str, jobs: Mapping[str, str]) -> dict[str, SlurmTask]:
    """Tasks from ``sacct -X -P -D``: the last attempt's state, the sum of all attempts' time.

    Args:
        text: Lines of JobID, JobName, State, ElapsedRaw, AllocTRES, NodeList and ExitCode.
        jobs: As for `look_up`.
    """
    tasks: dict[str, SlurmTask] = {}
    for line in text.splitlines():
        fields = line.split("|")
        # Until the record of its start arrives, a job may be called "allocation".
        if len(fields) < 5 or fields[1] not in (jobs.get(fields[0].split("_")[0]), "allocation"):
            continue
        state, seconds = fields[2], float(fields[3]) if fields[3].isdigit() else 0.0
        # A person's cancellation reads "CANCELLED by <uid>". Without a uid the accounting closed the job itself, since
        # the controller came back without it, or since it waited for a job that failed.
        lost = state.strip() == "CANCELLED"
        gpus = re.search(r"gres/gpu=(\d+)", fields[4])
        for job in expand(fields[0]):
            before = tasks.get(job)
            tasks[job] = SlurmTask(
                job=job,
                state=LOST if lost else state,
                verdict="over" if lost else verdict(state),
                seconds=seconds + (before.seconds if before else 0.0),
                gpu_seconds=seconds * int(gpus[1] if gpus else 0) + (before.gpu_seconds if before else 0.0),
                status=int(code[1]) if len(fields) > 6 and (code := re.match(r"(\d+):", fields[6])) else None,
                node=fields[5] if len(fields) > 5 and re.fullmatch(r"[A-Za-z0-9_.-]+", fields[5]) else None,
            )
    return tasks


def expand(job: str) -> list[str]:
    """Tasks of a job id as the accounting writes it: ``12_[1-3,7%2]`` is 12_1, 12_2, 12_3 and 12_7."""
    whole = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]?", job)
    if not whole:
        return [job]
    tasks = []
    for part in whole[2].strip(",").split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            stop = int(last) if last.isdigit() else int(first)
            tasks += [f"{whole[1]}_{index}" for index in range(int(first), stop + 1)]
    return tasks


def largest_array() -> int:
    """Tasks that one array may have.

    Raises:
        UserError: SLURM cannot be asked.
    """
    try:
        text = ask("scontrol", "show", "config")
    except Unreachable as error:
        raise UserError(f"SLURM cannot be asked: {error}. Submit from a login node, or use --executor local.") from None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 1001
