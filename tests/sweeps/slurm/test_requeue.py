"""Decisions after a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.io import append_line
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt, MetricsRow
from sweeps.slurm import array_records, exit_codes, requeue
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.requeue import _reason_to_abandon, exits_without_progress


def exits(*pairs: tuple[int, int]) -> list[Attempt]:
    """Exits of a job with these statuses at these steps."""
    return [
        Attempt(event="exit", time=0.0, host="h", pid=1, job="1", exit_status=status, step=step)
        for status, step in pairs
    ]


def test_progress_resets_the_count_of_kills() -> None:
    assert exits_without_progress(exits((137, 0), (137, 0))) == (2, 2)
    assert exits_without_progress(exits((137, 0), (137, 0), (137, 40))) == (1, 1)
    assert exits_without_progress(exits((137, 0), (75, 0), (0, 0))) == (1, 3)


@pytest.mark.parametrize(
    ("processes", "step", "reason_abandoned"),
    [(1, 3, True), (2, 3, False), (1, 0, False)],
    ids=["it failed by itself", "a peer of it may be gone", "it may be the node"],
)
def test_an_error_is_final_if_only_the_program_is_at_fault(
    processes: int, step: int, reason_abandoned: bool, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path)
    directory.note("start", step=0)
    if step:
        append_line(
            directory.metrics_file,
            MetricsRow(
                step=step, tokens=1, flops=1, train_loss=1.0, learning_rate=0.1, grad_norm=None,
                tokens_per_second=1.0, mfu=None,
            ),
        )  # fmt: skip
    (error,) = exits((1, 0))
    assert (_reason_to_abandon(directory, [], error, 3, processes=processes) is not None) == reason_abandoned
    assert _reason_to_abandon(directory, [error, error], error, 3, processes=processes) is not None


def test_a_retry_clears_the_exits(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.note("exit", step=0, job="5_0", exit_status=137)
    directory.note("exit", step=0, job="5_0", exit_status=137, outcome="failed", reason="killed")  # concluded
    assert len(requeue.exits(directory)) == 1
    assert requeue.reason_abandoned(directory) == "killed"
    assert directory.attempts() == []
    directory.note("retry", step=0)
    assert requeue.exits(directory) == []
    assert requeue.reason_abandoned(directory) is None


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Any) -> Callable[..., int]:
    """The hook after a job of one run, which SLURM has restarted so many times."""
    array = ArrayRecord(token="t", name="n", runs=("r",), code="c", job="5")
    array_records.save(tmp_path, array)
    (tmp_path / "runs" / "r").mkdir(parents=True)
    commands(scontrol='echo "$@" >> $(dirname $0)/calls; echo JobState=RUNNING', sinfo="echo n1 n2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")

    def run(status: int, *, restart: int) -> int:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return requeue.main(str(array_records.path_of(tmp_path, "t")), status, 2)

    return run


def test_the_hook_requeues_until_kills_without_progress_are_too_many(
    hook: Callable[..., int], tmp_path: Path, commands: Any
) -> None:
    directory = RunDirectory(tmp_path / "runs" / "r")
    directory.note("start", step=0)
    assert hook(exit_codes.KILLED, restart=0) == exit_codes.DONE
    assert "requeue 5_0" in (commands.folder / "calls").read_text()
    assert directory.state() == "preempted"
    assert hook(exit_codes.KILLED, restart=1) == exit_codes.KILLED
    assert directory.state() == "failed"
    assert "2 attempts were killed without a step of progress" in (directory.failure() or "")
    assert [(line.exit_status, line.restart, line.outcome) for line in requeue.exits(directory)] == [
        (exit_codes.KILLED, 0, None),
        (exit_codes.KILLED, 1, "failed"),
    ]
