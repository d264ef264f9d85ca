"""Where a campaign stands, read from the runs' own files."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from scaling.errors import UserError
from scaling.io import Strict
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt, RunState
from scaling.spec import as_dict
from scaling.training.pool import LOG
from scaling.units import human
from sweeps.config.placement import slurm_tables
from sweeps.planning.cost import predict
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.reporting.plan_table import hours_text, to_go
from sweeps.slurm.bad_nodes import sentences
from sweeps.slurm.client import SlurmTask
from sweeps.slurm.job_exits import abandoned
from sweeps.slurm.queue_state import QueueSnapshot, survey

STYLES: dict[str, str] = {
    "finished": "green",
    "running": "cyan",
    "diverged": "yellow",
    "failed": "red",
    "preempted": "magenta",
    "queued": "blue",
}

STALLED_SECONDS = 900.0
"""Without a logged step, after which a run that is said to run may hang."""


FULL_BYTES = 50_000_000
"""Below which a disk is as good as full."""


class RunStatus(Strict, frozen=True):
    """One run as `status` shows it."""

    arm: str
    rung: str
    cell: str
    run: str
    state: RunState
    share: float
    """Of the budget's tokens, in [0, 1]."""
    step: int
    steps: int
    loss: float | None
    """Held-out loss of a finished run; the last training loss of one that is under way, nats per token."""
    tokens_per_second: float | None
    seconds_left: float | None
    """Of a run that is training now, at its present speed."""
    attempts: int
    reason: str | None
    """Why it failed or diverged, or why it does not move, in a sentence."""
    job: str | None = None
    """SLURM's id of its last job."""
    gpu_hours: float = 0.0
    """Spent in SLURM over all attempts."""
    redone: int = 0
    """Steps taken again, since an attempt ended after its last checkpoint."""


def run_status(plan: CampaignPlan, run: PlannedRun, seen: QueueSnapshot | None = None) -> RunStatus:
    """Where one run stands; a directory that cannot be read is a failed run with the reason.

    Args:
        plan: The run's plan.
        run: One of its runs.
        seen: What SLURM says, if it was asked.
    """
    directory = plan.directory(run)
    budget = run.spec.steps * run.spec.batch_tokens
    state: RunState
    reason: str | None = None
    try:
        state, record = directory.state(), directory.record()
    except UserError as error:
        state, record, reason = "failed", None, str(error)
    attempts = directory.attempts()
    row = directory.last_row()
    tokens = record.tokens if record else row.tokens if row else 0
    speed = record.tokens_per_second if record else row.tokens_per_second if row else None
    task = seen.task(run.id) if seen is not None else None
    if record is not None:
        loss, reason = record.validation_loss, record.reason
    else:
        loss = row.train_loss if row else None
        if reason is None and state == "failed" and attempts:
            reason = attempts[-1].reason
        alone = seen is None or not seen.shares_its_job(run.id)
        if alone or state != "failed" or abandoned(directory) is None:  # else its neighbours' job goes on without it
            state, reason = _with_scheduler(state, reason, task)
        if seen is not None and seen.ended_with_its_predecessor(run.id) and state == "preempted":
            reason = "SLURM dropped it, for a run that it starts from did not end well; submitting again continues both"
        if state == "running" and reason is None:
            reason = _stalled(directory)
    return RunStatus(
        arm=run.arm,
        rung=run.rung,
        cell=run.cell,
        run=run.id,
        state=state,
        share=min(tokens / budget, 1.0),
        step=tokens // run.spec.batch_tokens,
        steps=run.spec.steps,
        loss=loss,
        tokens_per_second=speed,
        seconds_left=(budget - tokens) / speed if state == "running" and speed else None,
        attempts=sum(attempt.event == "start" for attempt in attempts),
        reason=reason,
        job=task.job if task else None,
        gpu_hours=seen.gpu_hours(run.id) if seen is not None else 0.0,
        redone=redone_steps(attempts),
    )


def redone_steps(attempts: Iterable[Attempt]) -> int:
    """Steps that attempts took again which ones before them had taken."""
    redone = reached = 0
    for attempt in attempts:
        if attempt.event == "start":
            redone += max(0, reached - attempt.step)
        reached = attempt.step
    return redone


def _with_scheduler(state: RunState, reason: str | None, task: SlurmTask | None) -> tuple[RunState, str | None]:
    """The state of a run that is not done, with what SLURM says about its job; its own files come first."""
    if task is None or state == "running":
        return state, reason
    if task.verdict == "pending":
        return "queued", task.advice
    if task.verdict == "running":
        return "running", None
    if state == "failed":
        return state, reason
    if task.verdict == "cancelled":
        return "preempted", "its job was cancelled; it stays so until it is submitted with --retry cancelled"
    if task.verdict == "unknown":
        return state, f"SLURM says {task.state} of its job, which this program does not know; it is left alone"
    return "preempted", f"its job ended as {task.state} before the run was done; submitting again continues it"


def _stalled(directory: RunDirectory) -> str | None:
    written = [directory.metrics_file, directory.path / LOG, directory.checkpoints]
    times = [file.stat().st_mtime for file in written if file.exists()]
    quiet = time.time() - max(times, default=time.time())
    if quiet < STALLED_SECONDS:
        return None
    return f"it has left no trace of a step for {hours_text(quiet / 3600)} and may hang"


def planned_gpu_hours(plan: CampaignPlan) -> float:
    """Of all runs, as the campaign assumes the speed: measured ones are not asked, there may be thousands."""
    tables = slurm_tables(plan.placements, plan.campaign.placement, where=plan.campaign.file)
    return sum(
        predict(run, plan.placements[run.rung], []).hours
        * tables[run.rung].devices
        / plan.placements[run.rung].runs_per_gpu
        for run in plan.distinct()
    )


def _free_bytes(root: Path) -> float:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.inf


def status(plan: CampaignPlan, seen: QueueSnapshot | None = None) -> list[RunStatus]:
    """Where every run of the plan stands, in the plan's order; SLURM is asked where runs were submitted to it."""
    seen = survey(plan.root) if seen is None else seen
    return [run_status(plan, run, seen) for run in plan.runs]


def rows(plan: CampaignPlan) -> list[dict[str, Any]]:
    """`status` as plain values; what ``--json`` prints."""
    return [as_dict(row) for row in status(plan)]


def show(plan: CampaignPlan) -> None:
    """Print `status_table`."""
    Console().print(status_table(plan))


def status_table(plan: CampaignPlan) -> RenderableType:
    """`status` as a table, with what went wrong below it."""
    seen = survey(plan.root)
    found = status(plan, seen)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("arm", "rung", "run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("done", "loss", "tokens/s", "left", "tries"):
        table.add_column(name, justify="right", overflow="fold")
    seeds = len({run.seed for run in plan.runs}) > 1
    for row in found:
        table.add_row(
            row.arm,
            row.cell if seeds else row.rung,
            row.run,
            Text(row.state, style=STYLES.get(row.state, "")),
            f"{row.share:.0%}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_second is None else human(row.tokens_per_second),
            "" if row.seconds_left is None else hours_text(row.seconds_left / 3600),
            str(row.attempts or ""),
        )
    notes = [f"{row.arm} {row.cell} {row.state}: {row.reason}" for row in found if row.reason]
    if spent := sum({row.run: row.gpu_hours for row in found}.values()):
        notes.append(f"{spent:,.2f} of {planned_gpu_hours(plan):,.2f} planned GPU-hours spent, all attempts counted.")
    if redone := sum({row.run: row.redone for row in found}.values()):
        notes.append(f"{redone:,} steps were taken again, for attempts ended after their last checkpoints.")
    notes += to_go(plan)
    notes += [*seen.answer.notes, *sentences(plan.root)]
    if (free := _free_bytes(plan.root)) < FULL_BYTES:
        notes.append(f"{plan.root} has {free / 1e6:,.0f} MB left. Make room: runs that cannot save their state end.")
    states = {row.run: row.state for row in found}
    counts = ", ".join(f"{list(states.values()).count(state)} {state}" for state in dict.fromkeys(states.values()))
    return Group(table, Text(), Text(f"{len(states)} runs: {counts}."), *(Text(note) for note in dict.fromkeys(notes)))
