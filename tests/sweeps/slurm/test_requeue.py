"""Decisions after a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaling.io import append_line
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt, MetricsRow
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
