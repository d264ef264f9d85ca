"""State and progress of a campaign's runs, read from the runs' own files and, where they were submitted, from SLURM."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from scaling.run.provenance import changed_files
from scaling.run.record import Attempt, RunRecord, RunState
from scaling.spec import Strict, as_dict
from scaling.training.pool import LOG
from scaling.units import human
from sweeps.planning.cost import Measurements, hours_text, predict
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.tuned_settings import untuned_note
from sweeps.reporting.plan_table import MAX_ROWS, code_notes, to_go
from sweeps.slurm.bad_nodes import describe_bad_nodes
from sweeps.slurm.client import LOST, SlurmTask
from sweeps.slurm.queue_state import QueueSnapshot, queue_snapshot
from sweeps.slurm.requeue import reason_abandoned

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
    commit: str | None = None
    """Of the code that trained it, once it is done."""
    changed_files: tuple[str, ...] | None = ()
    """Files in which that code differs from the code that runs now; None where its record does not say."""


def run_status(plan: CampaignPlan, run: PlannedRun, seen: QueueSnapshot | None = None) -> RunStatus:
    """State and progress of one run; see `status_and_record`."""
    return status_and_record(plan, run, seen)[0]


def status_and_record(
    plan: CampaignPlan, run: PlannedRun, seen: QueueSnapshot | None = None
) -> tuple[RunStatus, RunRecord | None]:
    """State and progress of one run, and its record where it is done; a run whose files cannot be read has failed.

    Args:
        plan: The run's plan.
        run: One of its runs.
        seen: What SLURM says, if it was asked.
    """
    directory = plan.directory(run)
    budget = run.spec.steps * run.spec.batch_tokens
    state, reason = directory.state(), None
    record, attempts, row, abandoned = None, list[Attempt](), None, None
    try:
        record = directory.record()
        attempts, row, abandoned = (
            directory.attempts(),
            directory.last_row() if record is None else None,
            reason_abandoned(directory),
        )
    except UserError as error:  # a finished run stays finished where only its logs are damaged
        reason = str(error)
        state = state if record is not None else "failed"
    tokens = record.tokens if record else row.tokens if row else 0
    speed = record.tokens_per_second if record else row.tokens_per_second if row else None
    task = seen.task(run.id) if seen is not None else None
    if record is not None:
        loss, reason = record.validation_loss, reason or record.reason
    else:
        loss = row.train_loss if row else None
        if reason is None and state == "failed":
            reason = directory.failure()
        alone = seen is None or not seen.shares_its_job(run.id)
        if alone or state != "failed" or abandoned is None:  # else its neighbours' job goes on without it
            state, reason = _with_scheduler(state, reason, task)
        if seen is not None and seen.predecessor_failed(run.id) and state == "preempted":
            reason = "SLURM dropped it, for a run that it starts from did not end well; submitting again continues both"
        if state == "running" and reason is None:
            reason = _stalled(directory)
    found = RunStatus(
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
        commit=record.code.commit if record else None,
        changed_files=changed_files(record.code) if record else (),
    )
    return found, record


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
    if task.state == LOST:
        return "preempted", "SLURM has lost its job, which nobody cancelled; submitting again continues it"
    return "preempted", f"its job ended as {task.state} before the run was done; submitting again continues it"


def _stalled(directory: RunDirectory) -> str | None:
    written = [directory.metrics_file, directory.path / LOG, directory.checkpoints]
    times = [file.stat().st_mtime for file in written if file.exists()]
    quiet = time.time() - max(times, default=time.time())
    if quiet < STALLED_SECONDS:
        return None
    return f"it has left no trace of a step for {hours_text(quiet / 3600)} and may hang"


def planned_gpu_hours(plan: CampaignPlan) -> float:
    """GPU-hours of all runs at the speed that the campaign assumes."""
    tables, assumed = plan.placements, Measurements({})
    return sum(predict(run, tables[run.rung], assumed).hours * tables[run.rung].gpus for run in plan.distinct())


def _free_bytes(root: Path) -> float:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.inf


def status(plan: CampaignPlan, seen: QueueSnapshot | None = None) -> list[RunStatus]:
    """Where every run of the plan stands, in the plan's order; SLURM is asked where runs were submitted to it."""
    seen = queue_snapshot(plan.root) if seen is None else seen
    return [run_status(plan, run, seen) for run in plan.runs]


def rows(plan: CampaignPlan) -> list[dict[str, Any]]:
    """`status` as plain values; what ``--json`` prints."""
    return [as_dict(row) for row in status(plan)]


def show(plan: CampaignPlan) -> None:
    """Print `status_table`."""
    console().print(status_table(plan))


def watch(plan: CampaignPlan, *, seconds: float) -> None:
    """Show the status again and again, until Ctrl-C; on a terminal the totals stay in sight."""
    console = Console()
    with Live(_watched(plan, console), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(_watched(plan, console), refresh=True)


def _watched(plan: CampaignPlan, console: Console) -> RenderableType:
    return status_table(plan, totals_first=True, height=console.height)


STATE_ORDER: tuple[RunState, ...] = ("running", "failed", "preempted", "queued", "diverged", "planned", "finished")
"""States in the order in which their runs are kept where a table has no room for all."""


def status_table(plan: CampaignPlan, *, totals_first: bool = False, height: int | None = None) -> RenderableType:
    """`status` as a table, with totals and what went wrong below it.

    Args:
        plan: The plan.
        totals_first: Put the totals above the table, where a terminal that is too low does not cut them off.
        height: Lines that there is room for; without it `MAX_ROWS` rows.
    """
    seen = queue_snapshot(plan.root)
    found = status(plan, seen)
    runs = {row.run: row for row in found}
    counts = Counter(row.state for row in runs.values())
    totals = [f"{len(runs):,} runs: {', '.join(f'{count:,} {state}' for state, count in counts.items())}."]
    totals += to_go(
        plan,
        {row.run: row.state for row in runs.values()},
        shares={row.run: row.share for row in runs.values()},
        speeds={row.run: row.tokens_per_second for row in runs.values() if row.tokens_per_second},
    )
    notes = untuned_note(plan.campaign)
    notes += reasons((f"{row.arm} {row.cell}", row.state, row.reason) for row in found if row.reason)
    if counts["failed"]:
        notes.append(f"Failed runs are tried again by {RETRY_FAILED}")
    if spent := sum(row.gpu_hours for row in runs.values()):
        notes.append(f"{spent:,.2f} of {planned_gpu_hours(plan):,.2f} planned GPU-hours spent, all attempts counted.")
    if redone := sum(row.redone for row in runs.values()):
        notes.append(f"{redone:,} steps were taken again, for attempts ended after their last checkpoints.")
    notes += code_notes((r.commit, r.changed_files) for r in runs.values() if r.state in ("finished", "diverged"))
    notes += [*seen.states.notes, *describe_bad_nodes(plan.root)]
    if (free := _free_bytes(plan.root)) < FULL_BYTES:
        notes.append(f"{plan.root} has {free / 1e6:,.0f} MB left. Make room: runs that cannot save their state end.")
    notes = list(dict.fromkeys(notes))
    room = MAX_ROWS if height is None else max(3, height - len(totals) - len(notes) - 5)
    rows = sorted(found, key=lambda row: STATE_ORDER.index(row.state))[:room] if len(found) > room else found
    kept = {id(row) for row in rows}
    table = [_rows(plan, [row for row in found if id(row) in kept])]
    if len(found) > room:
        left = Counter(row.state for row in found if id(row) not in kept)
        not_shown = ", ".join(f"{count:,} {state}" for state, count in left.items())
        table.append(Text(f"Not shown: {not_shown}; --json prints every run."))
    said, rest = [Text(line) for line in totals], [Text(note) for note in notes]
    parts = [*said, Text(), *table, Text(), *rest] if totals_first else [*table, Text(), *said, *rest]
    return Group(*parts)


def _rows(plan: CampaignPlan, found: list[RunStatus]) -> RenderableType:
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
    return table


RETRY_FAILED = "submit --retry failed, or by submit itself once their [placement] has changed."


def reasons(found: Iterable[tuple[str, str, str | None]]) -> list[str]:
    """Why runs do not go on, as name, state and reason of each; equal reasons in one sentence."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, state, reason in found:
        groups.setdefault((state, reason), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{len(names):,} runs'} {state}: {reason}"
        for (state, reason), names in groups.items()
    ]
