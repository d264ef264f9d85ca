"""A run's lease: the proof, renewed every few seconds, that somebody trains it.

The run's lock (`RunDirectory.claim`) vanishes with its process, but a lock does not reach every node of every shared
file system. The lease is a file with its owner and a counter. A reader decides by watching the counter with its own
clock, so clocks that disagree do no harm; an owner that finds another name in the file stops at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from scaling.io import Strict, write_atomic

FILE = "lease.json"
BEAT_SECONDS = 5.0
MISSED_BEATS = 4
"""Beats that an owner may miss before it counts as gone."""

LOST_LEASE = 76
"""Exit status of a process that found another owner in its lease."""


class Lease(Strict, frozen=True):
    """Who trains, and how often they have said so."""

    owner: str
    host: str
    pid: int
    beat: int = 0
    job: str | None = None


def read_lease(folder: Path) -> Lease | None:
    """The lease of a run directory, or None where nobody has ever held it or it was given back."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Lease)
    return None


def is_held(folder: Path, *, beat_seconds: float = BEAT_SECONDS) -> bool:
    """Whether somebody alive holds the lease: at once if they are on this host, else by watching the counter."""
    first = read_lease(folder)
    if first is None:
        return False
    if first.host == os.uname().nodename and not is_alive(first.pid):
        return False
    deadline = time.monotonic() + MISSED_BEATS * beat_seconds
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 4)
        now = read_lease(folder)
        if now is None:
            return False
        if now != first:
            return True
    return False


@contextlib.contextmanager
def hold(folder: Path, *, job: str | None = None, beat_seconds: float = BEAT_SECONDS) -> Iterator[bool]:
    """Hold a run's lease while training.

    Yields:
        Whether it was got; False if somebody alive has it.
    """
    if is_held(folder, beat_seconds=beat_seconds):
        yield False
        return
    mine = Lease(owner=uuid.uuid4().hex, host=os.uname().nodename, pid=os.getpid(), job=job)
    _write(folder, mine)
    stop = threading.Event()

    def renew() -> None:
        lease = mine
        while not stop.wait(beat_seconds):
            found = read_lease(folder)
            if found is not None and found.owner != mine.owner:
                # Somebody concluded that this process was gone. Two writers would be worse than a lost interval.
                print(f"{folder}: {found.host} has taken this run over; leaving it to them.", flush=True)
                os._exit(LOST_LEASE)
            lease = msgspec.structs.replace(lease, beat=lease.beat + 1)
            with contextlib.suppress(OSError):  # a full disk must not look like a death; the next beat tries again
                _write(folder, lease)

    beating = threading.Thread(target=renew, daemon=True, name="lease")
    beating.start()
    try:
        yield True
    finally:
        stop.set()
        beating.join()
        found = read_lease(folder)
        if found is not None and found.owner == mine.owner:
            (folder / FILE).unlink(missing_ok=True)


def _write(folder: Path, lease: Lease) -> None:
    write_atomic(folder / FILE, msgspec.json.encode(lease))


def is_alive(pid: int) -> bool:
    """Whether a process of that number is on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
