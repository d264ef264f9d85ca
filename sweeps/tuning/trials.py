"""The store of trials: ``results/<campaign>/tuning/trials.jsonl``, under a lock that ends with its process.

A line proposes a trial, and a second line of the same trial says that its run cannot be trained. Everything else about
a trial follows from the records of runs. A torn last line is a proposal whose run was never started, and the next step
makes the same proposal again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from scaling.io import Strict, append_line, read_lines
from scaling.run.directory import RunDirectory
from scaling.run.record import RunRecord
from sweeps.config.search_space import Values

TrialState = Literal["running", "complete", "pruned", "failed"]


class TrialLine(Strict, frozen=True, omit_defaults=True):
    """One line of trials.jsonl; the last line of a trial counts."""

    study: str
    number: int
    values: Values
    run: str
    failed: str | None = None
    """Reason why the run cannot be trained; None in a proposal."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial with its state, as its lines and the records of its runs determine it."""

    number: int
    values: Values
    run: str
    state: TrialState
    loss: float | None
    """Loss for the sampler: a diverged run has that of a uniform guess, a pruned trial that of its short run."""


class TrialStore:
    """The trials of all studies of a campaign in one file; its folder need not exist."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "trials.jsonl"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store, so that one process at a time proposes trials. The kernel drops the lock with the process."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, list[TrialLine]]:
        """Lines by study in the order of writing, torn ones left out."""
        by_study: dict[str, list[TrialLine]] = {}
        for line in read_lines(self.file, TrialLine):
            by_study.setdefault(line.study, []).append(line)
        return by_study

    def append(self, lines: Iterable[TrialLine]) -> None:
        """Write lines at the end; call it while the store is `locked`."""
        for line in lines:
            append_line(self.file, line)


class RecordCache:
    """Records of the runs in a folder by id, each read once."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._known: dict[str, RunRecord] = {}

    def get(self, run: str) -> RunRecord | None:
        """The record of a run; None while the run is not done."""
        if run not in self._known and (record := RunDirectory(self.runs / run).record()) is not None:
            self._known[run] = record
        return self._known.get(run)
