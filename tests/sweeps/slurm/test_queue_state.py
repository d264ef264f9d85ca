"""Matching of arrays with the queue."""

from __future__ import annotations

from sweeps.slurm import array_records
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.client import JobStates, SlurmTask
from sweeps.slurm.queue_state import QueueSnapshot


def test_a_task_without_a_trace_was_cancelled() -> None:
    array = ArrayRecord(token="t", name="n", runs=("a", "b"), code="c", host="h", pid=1, time=0.0, job="5")
    seen = QueueSnapshot(
        arrays=[array],
        locations=array_records.locations([array]),
        states=JobStates(tasks={"5_0": SlurmTask("5_0", "COMPLETED", "ended")}),
    )
    task = seen.task("b")
    assert task is not None
    assert task.verdict == "cancelled"
