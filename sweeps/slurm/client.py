"""Calls of SLURM's commands with argument lists and time limits, and tolerant parsing of their output.

A job's state is a hint about one attempt, never about a run: SLURM calls a run COMPLETED that a signal stopped half-way.
The run's own record decides (`scaling.run.directory`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Verdict = Literal["pending", "running", "ended", "cancelled", "unknown"]

STATES: dict[Verdict, str] = {
    "pending": "PENDING CONFIGURING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT RESV_DEL_HOLD",
    "running": "RUNNING COMPLETING SUSPENDED STOPPED RESIZING SIGNALING STAGE_OUT",
    # The accounting reports PREEMPTED for seconds while the queue has the requeued job; the queue takes precedence.
    "ended": "PREEMPTED NODE_FAIL TIMEOUT DEADLINE FAILED OUT_OF_MEMORY BOOT_FAIL COMPLETED REVOKED",
    "cancelled": "CANCELLED",
}
VERDICTS: dict[str, Verdict] = {state: verdict for verdict, states in STATES.items() for state in states.split()}
"""Verdict on an attempt by SLURM's state. A state that is missing here is unknown, which differs from ended."""

LIMIT = (
    "it starts when others of your {} end, or never if it requests more than the limit by itself; compare its request"
)
ACCOUNT_LIMIT = f"{LIMIT.format('account')} with: sacctmgr show assoc where user=$USER"
QOS_LIMIT = f"{LIMIT.format('QOS')} with: sacctmgr show qos"

PENDING_REMEDIES: dict[str, str] = {
    "launch failed requeued held": "SLURM holds it after a failed launch; release it with: scontrol release {job}",
    "JobHeldUser": "you hold it; release it with: scontrol release {job}",
    "JobHeldAdmin": "an administrator holds it; ask them, or cancel it",
    "DependencyNeverSatisfied": "it waits for a job that failed; cancel it and submit again",
    "PartitionTimeLimit": "its time limit is above the partition's; cancel it, lower time_minutes, and submit again",
    "PartitionNodeLimit": "it asks for more nodes than the partition has; cancel it, lower nodes, and submit again",
    "BadConstraints": "no node has what it asks for; cancel it, change constraint, and submit again",
    "Jobs": "your account or QOS has as many running jobs as it may; it starts when one of them ends",
    "Minutes": "the budget of your account or QOS does not cover it; ask your administrators, or lower time_minutes",
    "PerJob": "it asks for more than one job may have; cancel it, ask for less in [placement.slurm], and submit again",
    "AssocGrp": ACCOUNT_LIMIT,
    "AssocMax": ACCOUNT_LIMIT,
    "QOSGrp": QOS_LIMIT,
    "QOSMax": QOS_LIMIT,
}
"""Remedies for a pending job by a part of SLURM's reason, first match wins. Other reasons, such as Priority and
Resources, only need waiting."""

LOST = "lost"
"""State of a task that the controller has forgotten without a cancellation: it crashed before it saved the job."""

DROPPED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "PMIX_", "PMI_", "SUBMITIT_")


class CommandError(Exception):
    """A command is missing, failed, or did not answer; the message is a clause with its name and output."""


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables of a surrounding job, which would bind a new job to it."""
    kept = os.environ.items()
    return {name: value for name, value in kept if name == "SLURM_CONF" or not name.startswith(DROPPED_PREFIXES)}


def run_slurm(*command: str, timeout: float = 30.0) -> str:
    """Standard output of a SLURM command.

    Raises:
        CommandError: It is missing, exits with an error, or takes longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=clean_environment()
        )
    except FileNotFoundError:
        raise CommandError(f"there is no command {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} did not answer within {timeout:g} s") from None
    if done.returncode:
        output = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise CommandError(f"{command[0]} failed: {output[:300]}")
    return done.stdout


@dataclass(frozen=True)
class SlurmTask:
    """One task of an array as SLURM sees it."""

    job: str
    """``<array job>_<index>``."""
    state: str
    verdict: Verdict
    reason: str = ""
    """SLURM's reason for a pending job."""
    gpu_seconds: float = 0.0
    """GPUs times seconds of all its attempts; 0 without accounting."""
    node: str | None = None
    """Node of its last attempt, if that was a single one."""
    exit_status: int | None = None
    """Exit status of its batch script, if the accounting has it."""

    @property
    def is_active(self) -> bool:
        """True if it waits or runs."""
        return self.verdict in ("pending", "running")

    @property
    def advice(self) -> str | None:
        """SLURM's reason why the job waits, with a remedy; None while there is no reason yet."""
        if self.verdict != "pending" or self.reason in ("", "None"):
            return None
        for part, remedy in PENDING_REMEDIES.items():
            if part.lower() in self.reason.lower():
                return f"SLURM's reason is {self.reason}: {remedy.format(job=self.job)}"
        return f"SLURM's reason is {self.reason}"


@dataclass(frozen=True)
class JobStates:
    """Tasks of some arrays by ``<array job>_<index>``, and failed queries as sentences."""

    tasks: dict[str, SlurmTask] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    queue_reached: bool = True
    accounting_reached: bool = True


def array_of(task: str) -> str:
    """The array's job id in ``<array job>_<index>``."""
    return task.partition("_")[0]


def job_states(jobs: Mapping[str, str], *, task_counts: Mapping[str, int] | None = None) -> JobStates:
    """States of all tasks of some array jobs: one `squeue`, and one `sacct` for attempts and their cost.

    SLURM reuses ids, so `jobs` holds the names of the jobs by id. An array of which both answers have fewer tasks than
    its count in `task_counts` is queried by itself.
    """
    if not jobs:
        return JobStates()
    notes, accounted, queued = [], dict[str, SlurmTask](), dict[str, SlurmTask]()
    accounting_reached = queue_reached = True
    try:
        columns = "JobID,JobName,State,ElapsedRaw,AllocTRES,NodeList,ExitCode"
        text = run_slurm("sacct", "-n", "-X", "-P", "-D", "-j", ",".join(sorted(jobs)), "-o", columns)
        accounted = parse_accounting(text, jobs)
    except CommandError as error:
        accounting_reached = False
        notes.append(f"SLURM's accounting was not reached ({error}): hours spent and cancelled jobs are not known.")
    try:
        # All jobs of the user: a query for an id that SLURM has forgotten is an error in some versions.
        for line in run_slurm("squeue", "-h", "-r", "--me", "-o", "%i|%j|%T|%r").splitlines():
            job, name, state, reason = [*line.split("|", 3), "", "", ""][:4]
            if jobs.get(array_of(job)) == name:
                queued[job] = SlurmTask(job=job, state=state, verdict=verdict(state), reason=reason)
    except CommandError as error:
        queue_reached = False
        notes.append(f"SLURM's queue was not reached ({error}): states are from the runs' own files.")
    spent = {job: task.gpu_seconds for job, task in accounted.items()}
    tasks = accounted | {job: replace(task, gpu_seconds=spent.get(job, 0.0)) for job, task in queued.items()}
    if queue_reached:
        _resolve_missing(jobs, tasks, queued, task_counts or {})
    return JobStates(tasks, tuple(notes), queue_reached, accounting_reached)


def _resolve_missing(
    jobs: Mapping[str, str], tasks: dict[str, SlurmTask], queued: dict[str, SlurmTask], task_counts: Mapping[str, int]
) -> None:
    """Update tasks that have left the queue while the accounting has no answer about them, or an old one.

    The controller remembers jobs for some minutes. A task that it has forgotten and that was running has ended. One that
    the accounting still calls pending was cancelled before it started, which leaves no trace in the accounting, if the
    controller knows other tasks of its array; else the controller lost the array.
    """
    outdated = {array_of(job) for job, task in tasks.items() if job not in queued and task.is_active}
    counts = Counter(array_of(task) for task in tasks)
    incomplete = {job for job in jobs if counts[job] < task_counts.get(job, 1)}
    for array in sorted(outdated | incomplete):
        answered, remembered = True, dict[str, str]()
        try:
            for fields in parse_rows(run_slurm("scontrol", "-o", "show", "job", array)):
                number, index, state = fields.get("ArrayJobId"), fields.get("ArrayTaskId"), fields.get("JobState")
                if number and index and state and jobs.get(number) == fields.get("JobName"):
                    remembered |= dict.fromkeys(expand_array_ids(f"{number}_[{index}]"), state)
        except CommandError as error:
            answered = "Invalid job id" in str(error)
        known_to_controller = bool(remembered) or any(array_of(job) == array for job in queued)
        for job, state in remembered.items():
            if job not in queued and (job not in tasks or tasks[job].is_active):
                before = tasks.get(job, SlurmTask(job, state, "unknown"))
                tasks[job] = replace(before, state=state, verdict=verdict(state))
        for job, task in tasks.items():
            if array_of(job) != array or job in queued or job in remembered or not task.is_active:
                continue
            if task.verdict == "running":
                tasks[job] = replace(task, state=LOST, verdict="ended")
            elif known_to_controller:
                tasks[job] = replace(task, state="CANCELLED", verdict="cancelled")
            else:
                tasks[job] = replace(task, state=LOST, verdict="ended" if answered else "unknown")


def parse_rows(text: str) -> list[dict[str, str]]:
    """Fields of each line that ``scontrol -o show`` prints, by name."""
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]


def find_job(name: str) -> str | None:
    """Id of the job with that name in the queue or in the accounting of the last days; None if SLURM knows none.

    Raises:
        CommandError: The queue was not reached.
    """
    for line in run_slurm("squeue", "-h", "--me", "-n", name, "-o", "%F").splitlines():
        return line.strip()
    try:
        text = run_slurm("sacct", "-n", "-X", "-P", "-S", "now-7days", "--name", name, "-o", "JobID")
    except CommandError:
        return None
    return next((array_of(line.strip()) for line in text.splitlines() if line.strip()), None)


def verdict(state: str) -> Verdict:
    """Verdict on an attempt by its state, with or without text after it (``CANCELLED by 0``)."""
    return VERDICTS.get(re.split(r"[^A-Z_]", state.strip())[0], "unknown")


def parse_accounting(text: str, jobs: Mapping[str, str]) -> dict[str, SlurmTask]:
    """Tasks from ``sacct -X -P -D``: the last attempt's state, the sum of all attempts' time; `jobs` as in `job_states`."""
    tasks: dict[str, SlurmTask] = {}
    for line in text.splitlines():
        columns = line.split("|")
        # A job may be called "allocation" until the record of its start arrives.
        if len(columns) < 5 or columns[1] not in (jobs.get(array_of(columns[0])), "allocation"):
            continue
        node, exit_code = [*columns[5:7], "", ""][:2]
        state, seconds = columns[2], float(columns[3]) if columns[3].isdigit() else 0.0
        # A person's cancellation reads "CANCELLED by <uid>". Without a uid the accounting closed the job itself, because
        # the controller came back without it, or because it waited for a job that failed.
        lost = state.strip() == "CANCELLED"
        gpus = re.search(r"gres/gpu=(\d+)", columns[4])
        for job in expand_array_ids(columns[0]):
            before = tasks.get(job)
            tasks[job] = SlurmTask(
                job=job,
                state=LOST if lost else state,
                verdict="ended" if lost else verdict(state),
                gpu_seconds=seconds * int(gpus[1] if gpus else 0) + (before.gpu_seconds if before else 0.0),
                exit_status=int(code[1]) if (code := re.match(r"(\d+):", exit_code)) else None,
                node=node if re.fullmatch(r"[A-Za-z0-9_.-]+", node) else None,
            )
    return tasks


def expand_array_ids(job: str) -> list[str]:
    """Tasks of a job id as the accounting writes it: ``12_[1-3,7%2]`` is 12_1, 12_2, 12_3 and 12_7."""
    found = re.fullmatch(r"(\d+)_\[([\d,\-]+)(?:%\d+)?\]?", job)
    if not found:
        return [job]
    ranges = re.findall(r"(\d+)(?:-(\d+))?", found[2])
    return [f"{found[1]}_{index}" for first, last in ranges for index in range(int(first), int(last or first) + 1)]


def configuration() -> dict[str, str]:
    """SLURM's configuration, values by name."""
    return dict(re.findall(r"^(\w+)\s*=\s*(.*)$", run_slurm("scontrol", "show", "config"), re.MULTILINE))


def max_array_size(config: Mapping[str, str]) -> int:
    """Tasks that one array may have."""
    return int(config.get("MaxArraySize", "1001"))
