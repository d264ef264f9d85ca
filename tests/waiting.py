"""Waits in tests that last as long as there is progress, on a machine under any load.

A deadline in seconds measures the machine and not the program. `until` looks for signs of progress instead: the CPU time
of processes that the tests started, and the signs that `WATCHED` adds, such as the sizes of a cluster's logs.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

QUIET_SAMPLES = 60
"""Samples in a row, a second apart or more, without a sign of progress, after which a wait fails. SLURM's own timers,
such as the delay of a requeue and the time until a silent node counts as down, are shorter."""

MAX_SAMPLES = 900
"""Samples after which a wait fails even with signs of progress: a job that restarts without end has them too."""

WATCHED: list[Callable[[], object]] = []
"""Further signs of progress: functions whose values change when there is some."""

BUSY_SERVERS = ("mariadbd",)
"""Children that use CPU time although nothing happens."""


def until(
    true: Callable[[], object], otherwise: str, *, every: float = 0.1, quiet_samples: int = QUIET_SAMPLES
) -> None:
    """Wait until something holds.

    Args:
        true: Called again and again.
        otherwise: Error message if it never holds.
        every: Seconds between calls.
        quiet_samples: See `QUIET_SAMPLES`.

    Raises:
        TimeoutError: There is no progress any more, or `MAX_SAMPLES` were taken.
    """
    seen: list[object] = []
    quiet = 0
    for _ in range(MAX_SAMPLES):
        sampled = time.monotonic()  # paces the samples: a call of `true` may take milliseconds, or seconds
        while time.monotonic() < sampled + 1.0:
            if true():
                return
            time.sleep(every)
        signs = [cpu_ticks(descendants()), *(watched() for watched in WATCHED)]
        quiet = quiet + 1 if signs == seen else 0
        seen = signs
        if quiet >= quiet_samples:
            raise TimeoutError(f"{otherwise}, and there was no progress for {quiet} samples")
    raise TimeoutError(f"{otherwise} in {MAX_SAMPLES} samples with progress")


def status_of(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a process, waited for."""
    until(lambda: process.poll() is not None, f"{process.args!r} did not end")
    return process.returncode


def cpu_ticks(pids: Iterable[int]) -> dict[int, int]:
    """Clock ticks of CPU time that each process has used, those that are gone left out."""
    return {pid: int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))}


def descendants() -> list[int]:
    """Processes that this one started, and those that they started, without `BUSY_SERVERS`."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and (fields := _stat(int(process.name))):
            children.setdefault(int(fields[1]), []).append(int(process.name))
    found, frontier = list[int](), [os.getpid()]
    while frontier:
        frontier = [child for pid in frontier for child in children.get(pid, []) if _name(child) not in BUSY_SERVERS]
        found += frontier
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
