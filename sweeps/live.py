"""Progress of runs that train on this machine: bars on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.reporting.status import run_status

LINE_SECONDS = 60.0


class Live:
    """Follows the runs' metrics files; used as a context."""

    def __init__(self, plan: CampaignPlan, *, progress: bool | None = None) -> None:
        self.plan = plan
        self.console = Console(stderr=True)
        bars = sys.stderr.isatty() if progress is None else progress
        self.bars = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            if bars
            else None
        )
        self.tasks: dict[str, TaskID] = {}
        self.runs = {run.id: run for run in plan.distinct()}
        self.names = {run.id: f"{run.arm} {run.cell}" for run in plan.runs}
        self.whole: TaskID | None = None
        self.said_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.bars is not None:
            # Before anything trains, for the training code takes a while to load.
            total = sum(run.spec.budget.flops for run in self.runs.values())
            name = f"{self.plan.campaign.name}: loading the training code"
            self.whole = self.bars.add_task(name, total=float(total), loss="")
            self.bars.start()
        else:
            self._line(f"{self.plan.campaign.name}: {len(self.runs)} runs under {self.plan.root / 'runs'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def update(self, active: list[PlannedRun], *, waiting: Sequence[PlannedRun]) -> None:
        """Show how far the active runs are, and how far all runs are together, by their FLOPs."""
        if self.bars is None and time.monotonic() - self.said_at < LINE_SECONDS:
            return
        now = {run.id: run_status(self.plan, run) for run in active}
        left = {run.id: 1.0 for run in waiting} | {run: 1.0 - status.share for run, status in now.items()}
        done = sum(run.spec.budget.flops * (1.0 - left.get(run.id, 0.0)) for run in self.runs.values())
        ended = len(self.runs) - len(left)
        if self.bars is None:
            self.said_at = time.monotonic()
            parts = []
            for run in active:
                loss = now[run.id].loss
                said = "" if loss is None else f", loss {loss:.3f}"
                parts.append(f"{self.names[run.id]} {now[run.id].share:.0%}{said}")
            share = done / max(sum(run.spec.budget.flops for run in self.runs.values()), 1)
            self._line(
                f"{self.plan.campaign.name}: {'; '.join(parts) or 'waiting for another submitter'}; {len(waiting)} to "
                f"go, {share:.0%} of all FLOPs done"
            )
            return
        assert self.whole is not None
        name = f"{self.plan.campaign.name}: {ended} of {len(self.runs)} runs ended"
        self.bars.update(self.whole, description=name, completed=done)
        for run in active:
            if run.id not in self.tasks:
                self.tasks[run.id] = self.bars.add_task(self.names[run.id], total=1.0, loss="")
            loss = now[run.id].loss
            said = "" if loss is None else f"loss {loss:.3f}"
            self.bars.update(self.tasks[run.id], completed=now[run.id].share, loss=said)
        for run_id in set(self.tasks) - now.keys():
            last = run_status(self.plan, self.runs[run_id])
            self.bars.remove_task(self.tasks.pop(run_id))  # a hundred bars would push the active ones off the screen
            said = "" if last.loss is None else f", loss {last.loss:.3f}"
            self.say(f"{self.names[run_id]} {last.state} at {last.share:.0%}{said}")

    def say(self, sentence: str) -> None:
        """A line above the bars."""
        self.console.print(sentence, markup=False)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
