"""The lease of a run: a file that its training process renews every few seconds.

The run's lock (`RunDirectory.claim`) does not reach every node of every shared file system. A reader watches the lease's
counter with its own clock, so clocks that disagree do no harm; an owner that finds another name in the file stops at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from scaling.io import Strict, write_atomic
from sweeps.slurm.exit_codes import LEASE_LOST

FILE = "lease.json"
BEAT_SECONDS = 5.0
MAX_MISSED_BEATS = 4
"""Beats that an owner may miss before it counts as gone."""


class Lease(Strict, frozen=True):
    """Content of lease.json."""

    owner: str
    host: str
    pid: int
    beat: int = 0
    """Renewals so far."""
    job: str | None = None


def read_lease(folder: Path) -> Lease | None:
    """The lease of a run directory, or None if it was never held or was given back."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Lease)
    return None


def is_held(folder: Path, *, beat_seconds: float = BEAT_SECONDS) -> bool:
    """True if a live process holds the lease: at once if it was on this host, else by watching the counter."""
    first = read_lease(folder)
    if first is None or (first.host == os.uname().nodename and not is_alive(first.pid)):
        return False
    deadline = time.monotonic() + MAX_MISSED_BEATS * beat_seconds
    while time.monotonic() < deadline:
        time.sleep(beat_seconds / 4)
        now = read_lease(folder)
        if now != first:
            return now is not None
    return False


@contextlib.contextmanager
def hold(folder: Path, *, job: str | None = None, beat_seconds: float = BEAT_SECONDS) -> Iterator[bool]:
    """Hold a run's lease while training; yields whether it was acquired, False if a live process has it."""
    if is_held(folder, beat_seconds=beat_seconds):
        yield False
        return
    mine = Lease(owner=uuid.uuid4().hex, host=os.uname().nodename, pid=os.getpid(), job=job)
    write_atomic(folder / FILE, msgspec.json.encode(mine))
    stop = threading.Event()

    def renew() -> None:
        lease = mine
        while not stop.wait(beat_seconds):
            found = read_lease(folder)
            if found is not None and found.owner != mine.owner:
                # The other process concluded that this one was gone. Two writers would be worse than lost steps.
                print(f"{folder}: a process on {found.host} has taken over this run; this one stops.", flush=True)
                os._exit(LEASE_LOST)
            lease = msgspec.structs.replace(lease, beat=lease.beat + 1)
            with contextlib.suppress(OSError):  # a full disk must not look like a death; the next beat tries again
                write_atomic(folder / FILE, msgspec.json.encode(lease))

    renewal = threading.Thread(target=renew, daemon=True, name="lease")
    renewal.start()
    try:
        yield True
    finally:
        stop.set()
        renewal.join()
        found = read_lease(folder)
        if found is not None and found.owner == mine.owner:
            (folder / FILE).unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """True if a process with that id exists on this host."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it is another user's
    return True
