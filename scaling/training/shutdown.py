"""A wish to stop: noted when a signal brings it, granted at the step boundary. No torch behind it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Each asks for a checkpoint at the next step boundary and a clean exit; SLURM's warning is sent as USR2."""


class ShutdownRequest:
    """Whether this run should end at the next step boundary, and why: a signal came, or the parent process is gone."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = multiprocessing.parent_process()
        self._looked_at_parent = time.monotonic()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal and return; everything else happens at the step boundary."""
        self.reason = signal.Signals(signum).name

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the stop signals over, and give them back at the end. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self) for signum in STOP_SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def due(self) -> bool:
        """Whether to stop now."""
        if self._parent is not None and time.monotonic() - self._looked_at_parent > 1.0:
            self._looked_at_parent = time.monotonic()
            if not self._parent.is_alive():
                self.reason = "the process that started it is gone"
        return self.reason is not None
