"""State and progress of a run, read from the run's own files. Asks no scheduler."""

from __future__ import annotations

import time
from collections.abc import Iterable

from scaling.errors import UserError
from scaling.io import Strict
from scaling.run.directory import LOG, RunDirectory
from scaling.run.provenance import changed_files
from scaling.run.record import Attempt, RunRecord, RunState
from sweeps.planning.cost import hours_text
from sweeps.planning.plan import CampaignPlan, PlannedRun

STALLED_SECONDS = 900.0
"""Time without a logged step after which a running run is reported as possibly stalled."""


class RunStatus(Strict, frozen=True):
    """One row of ``scaling status``."""

    arm: str
    rung: str
    cell: str
    run: str
    state: RunState
    share: float
    """Share of the run's tokens that is done, in [0, 1]."""
    step: int
    steps: int
    loss: float | None
    """Held-out loss of a finished run; last training loss of a run under way, nats per token."""
    tokens_per_second: float | None
    seconds_left: float | None
    """Time to the end of a run that trains now, at its present speed."""
    attempts: int
    reason: str | None
    """Why the run failed, diverged or makes no progress, as a sentence."""
    job: str | None = None
    """SLURM id of the run's last job."""
    gpu_hours: float = 0.0
    """GPU-hours of all its attempts under SLURM."""
    redone: int = 0
    """Steps trained twice, because an attempt ended after its last checkpoint."""
    commit: str | None = None
    """Commit of the code that trained a finished or diverged run."""
    changed_files: tuple[str, ...] | None = ()
    """Files in which that code differs from the code that runs now; None where its record has no hashes."""


def run_status(plan: CampaignPlan, run: PlannedRun) -> RunStatus:
    """State and progress of one run; see `status_and_record`."""
    return status_and_record(plan, run)[0]


def status_and_record(plan: CampaignPlan, run: PlannedRun) -> tuple[RunStatus, RunRecord | None]:
    """State and progress of one run, and its record if it is done; a run whose files cannot be read has failed."""
    directory = plan.directory(run)
    state, reason = directory.state(), None
    record, attempts, row = None, list[Attempt](), None
    try:
        record = directory.record()
        attempts, row = directory.attempts(), directory.last_row() if record is None else None
    except UserError as error:  # a finished run stays finished where only its logs are damaged
        reason = str(error)
        state = state if record is not None else "failed"
    done = record or row
    tokens, speed = (done.tokens, done.tokens_per_second) if done else (0, None)
    if record is not None:
        loss, reason = record.validation_loss, reason or record.reason
    else:
        loss = row.train_loss if row else None
        if reason is None and state == "failed":
            reason = directory.failure()
        if reason is None and state == "running":
            reason = stalled(directory)
    budget = run.spec.steps * run.spec.batch_tokens
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
        redone=redone_steps(attempts),
        commit=record.code.commit if record else None,
        changed_files=changed_files(record.code) if record else (),
    )
    return found, record


def redone_steps(attempts: Iterable[Attempt]) -> int:
    """Steps that an attempt trained again although an earlier attempt had reached them."""
    redone = reached = 0
    for attempt in attempts:
        if attempt.event == "start":
            redone += max(0, reached - attempt.step)
        reached = attempt.step
    return redone


def stalled(directory: RunDirectory) -> str | None:
    """A sentence if none of the run's files changed within `STALLED_SECONDS`; else None."""
    files = [directory.metrics_file, directory.path / LOG, directory.checkpoints]
    times = [file.stat().st_mtime for file in files if file.exists()]
    quiet = time.time() - max(times, default=time.time())
    if quiet < STALLED_SECONDS:
        return None
    return f"no step, checkpoint or line of its log for {hours_text(quiet / 3600)}: it may be stalled"
