"""``scaling status``: state and progress of a campaign's runs, from their own files and from SLURM's queue."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.errors import UserError
from scaling.run.record import RunState
from scaling.spec import as_dict
from scaling.units import human
from sweeps.planning.cost import Measurements, hours_text, predict
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.planning.run_state import RunStatus, run_status, stalled
from sweeps.planning.tuned_settings import untuned_note
from sweeps.reporting.console import wide_enough
from sweeps.reporting.plan_table import MAX_ROWS, arm_labels, code_notes, remaining_cost
from sweeps.slurm.bad_nodes import describe_bad_nodes
from sweeps.slurm.client import LOST, SlurmTask
from sweeps.slurm.queue_state import QueueSnapshot, queue_snapshot
from sweeps.slurm.requeue import reason_abandoned

STYLES = {
    "finished": "green", "running": "cyan", "diverged": "yellow", "failed": "red", "preempted": "magenta", "queued": "blue",
}  # fmt: skip

MIN_FREE_BYTES = 50_000_000
"""Free space below which `status` warns: runs can no longer save their state."""


def with_queue(plan: CampaignPlan, run: PlannedRun, found: RunStatus, queue: QueueSnapshot) -> RunStatus:
    """The status of a run with what SLURM reports about its jobs; `found`, from the run's own files, takes precedence."""
    task = queue.task(run.id)
    found = msgspec.structs.replace(found, job=task.job if task else None, gpu_hours=queue.gpu_hours(run.id))
    if found.state in ("finished", "diverged"):
        return found
    directory, state, reason = plan.directory(run), found.state, found.reason
    try:
        abandoned = reason_abandoned(directory)
    except UserError as error:
        return msgspec.structs.replace(found, state="failed", reason=reason or str(error), seconds_left=None)
    # A job with several runs goes on after one of them failed for good: its state then says nothing about that run.
    if not (queue.shares_its_job(run.id) and state == "failed" and abandoned is not None):
        state, reason = _state_with_task(state, reason, task)
    if queue.predecessor_failed(run.id) and state == "preempted":
        reason = "SLURM dropped its job because a run that it starts from ended badly; submit again to continue both"
    if state == "running" and reason is None:
        reason = stalled(directory)
    left = None
    if state == "running" and found.tokens_per_second:
        left = (1.0 - found.share) * run.spec.steps * run.spec.batch_tokens / found.tokens_per_second
    return msgspec.structs.replace(found, state=state, reason=reason, seconds_left=left)


def _state_with_task(state: RunState, reason: str | None, task: SlurmTask | None) -> tuple[RunState, str | None]:
    """State and reason of a run that is not done, given its last SLURM task."""
    if task is None or state == "running":
        return state, reason
    if task.verdict == "pending":
        return "queued", task.advice
    if task.verdict == "running":
        return "running", None
    if state == "failed":
        return state, reason
    if task.verdict == "cancelled":
        return "preempted", "its job was cancelled; continue it with submit --retry cancelled"
    if task.verdict == "unknown":
        return state, f"SLURM reports the unknown state {task.state} for its job; the job is left alone"
    if task.state == LOST:
        return "preempted", "SLURM lost its job without a cancellation; submit again to continue it"
    return "preempted", f"its job ended as {task.state} before the run was done; submit again to continue it"


def planned_gpu_hours(plan: CampaignPlan) -> float:
    """GPU-hours of all runs at the speed that the campaign assumes."""
    placements, assumed = plan.placements, Measurements({})
    return sum(predict(run, placements[run.rung], assumed).hours * placements[run.rung].gpus for run in plan.distinct())


def _free_bytes(root: Path) -> float:
    try:
        return shutil.disk_usage(root).free
    except OSError:
        return math.inf


def status(plan: CampaignPlan, queue: QueueSnapshot | None = None) -> list[RunStatus]:
    """Status of every run in the plan's order; queries SLURM if runs were submitted to it."""
    queue = queue_snapshot(plan.root) if queue is None else queue
    return [with_queue(plan, run, run_status(plan, run), queue) for run in plan.runs]


def rows(plan: CampaignPlan) -> list[dict[str, Any]]:
    """`status` as plain values, the output of ``--json``."""
    return [as_dict(row) for row in status(plan)]


def show(plan: CampaignPlan) -> None:
    """Print `status_table`."""
    wide_enough(console()).print(status_table(plan))


def watch(plan: CampaignPlan, *, seconds: float) -> None:
    """Show the status again and again until Ctrl-C; on a terminal the totals stay visible."""
    console = Console()
    with Live(_watched(plan, console), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(_watched(plan, console), refresh=True)


def _watched(plan: CampaignPlan, console: Console) -> RenderableType:
    return status_table(plan, totals_first=True, height=console.height)


STATE_ORDER: tuple[RunState, ...] = ("running", "failed", "preempted", "queued", "diverged", "planned", "finished")
"""States by priority: runs of the first ones are shown where a table has no room for all."""


def status_table(plan: CampaignPlan, *, totals_first: bool = False, height: int | None = None) -> RenderableType:
    """`status` as a table, with totals and problems below it.

    With `totals_first` the totals are above the table, where a low terminal does not cut them off. `height` is that of the
    terminal in lines; without it `MAX_ROWS` rows are shown.
    """
    queue = queue_snapshot(plan.root)
    found = status(plan, queue)
    runs = {row.run: row for row in found}
    counts = Counter(row.state for row in runs.values())
    totals = [f"{len(runs):,} runs: {', '.join(f'{count:,} {state}' for state, count in counts.items())}."]
    totals += remaining_cost(
        plan,
        {row.run: row.state for row in runs.values()},
        shares={row.run: row.share for row in runs.values()},
        speeds={row.run: row.tokens_per_second for row in runs.values() if row.tokens_per_second},
    )
    notes, labels = untuned_note(plan.campaign), arm_labels(plan.campaign)
    notes += reasons((f"{labels[row.arm]} {row.cell}", row.state, row.reason) for row in found if row.reason)
    if counts["failed"]:
        notes.append(f"To train failed runs again: {RETRY_FAILED}")
    if spent := sum(row.gpu_hours for row in runs.values()):
        notes.append(f"{spent:,.2f} of {planned_gpu_hours(plan):,.2f} planned GPU-hours used, over all attempts.")
    if redone := sum(row.redone for row in runs.values()):
        notes.append(f"{redone:,} steps were trained twice, because attempts ended after their last checkpoints.")
    notes += code_notes((r.commit, r.changed_files) for r in runs.values() if r.state in ("finished", "diverged"))
    notes += [*queue.states.notes, *describe_bad_nodes(plan.root)]
    if (free := _free_bytes(plan.root)) < MIN_FREE_BYTES:
        notes.append(f"{plan.root} has {free / 1e6:,.0f} MB left. Free some space: runs end if they cannot save.")
    notes = list(dict.fromkeys(notes))
    room = MAX_ROWS if height is None else max(3, height - len(totals) - len(notes) - 5)
    order = sorted(found, key=lambda row: STATE_ORDER.index(row.state)) if len(found) > room else found
    kept = {id(row) for row in order[:room]}
    table = [_rows(plan, [row for row in found if id(row) in kept])]
    if left := Counter(row.state for row in order[room:]):
        not_shown = ", ".join(f"{count:,} {state}" for state, count in left.items())
        table.append(Text(f"Not shown: {not_shown}; --json prints every run."))
    above, below = [Text(line) for line in totals], [Text(note) for note in notes]
    parts = [*above, Text(), *table, Text(), *below] if totals_first else [*table, Text(), *above, *below]
    return Group(*parts)


def _rows(plan: CampaignPlan, found: list[RunStatus]) -> RenderableType:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("arm", "rung", "run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("done", "loss", "tokens/s", "left", "tries"):
        table.add_column(name, justify="right", overflow="fold")
    labels, seeds = arm_labels(plan.campaign), len({run.seed for run in plan.runs}) > 1
    for row in found:
        table.add_row(
            labels[row.arm],
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


RETRY_FAILED = "submit --retry failed; after a change of [placement], submit alone is enough."


def reasons(found: Iterable[tuple[str, str, str | None]]) -> list[str]:
    """Sentences on runs that make no progress, from the name, state and reason of each; equal reasons together."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, state, reason in found:
        groups.setdefault((state, reason), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{len(names):,} runs'} {state}: {reason}"
        for (state, reason), names in groups.items()
    ]
