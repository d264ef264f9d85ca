"""What trains now, for the person who waits: bars on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
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
        self.names = {run.id: f"{run.arm} {run.cell}" for run in plan.runs}
        self.said_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.bars is not None:
            self.bars.start()
        else:
            self._line(f"{self.plan.campaign.name}: {len(self.plan.distinct())} runs under {self.plan.root / 'runs'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def update(self, active: list[PlannedRun], *, waiting: int) -> None:
        """Show how far the active runs are."""
        if self.bars is None:
            if time.monotonic() - self.said_at < LINE_SECONDS:
                return
            self.said_at = time.monotonic()
            parts = []
            for run in active:
                now = run_status(self.plan, run)
                loss = "" if now.loss is None else f", loss {now.loss:.3f}"
                parts.append(f"{self.names[run.id]} {now.share:.0%}{loss}")
            self._line(
                f"{self.plan.campaign.name}: {'; '.join(parts) or 'waiting for another submitter'}; {waiting} to go"
            )
            return
        for run in active:
            now = run_status(self.plan, run)
            if run.id not in self.tasks:
                self.tasks[run.id] = self.bars.add_task(self.names[run.id], total=1.0, loss="")
            loss = "" if now.loss is None else f"loss {now.loss:.3f}"
            self.bars.update(self.tasks[run.id], completed=now.share, loss=loss)
        for run_id in set(self.tasks) - {run.id for run in active}:
            ended = next(run for run in self.plan.runs if run.id == run_id)
            now = run_status(self.plan, ended)
            self.bars.update(self.tasks.pop(run_id), completed=now.share, loss=now.state)

    def say(self, sentence: str) -> None:
        """A line above the bars."""
        self.console.print(sentence)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
