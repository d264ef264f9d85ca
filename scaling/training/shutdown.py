"""Graceful shutdown: a signal sets a flag that the training loop checks at each step boundary. Imports no torch."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Signals that request a checkpoint and an exit at the next step boundary; SLURM's warning is sent as USR2."""


@contextlib.contextmanager
def handling(
    signals: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Context that handles signals. Does nothing outside the main thread, which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


class ShutdownRequest:
    """A request to end at the next step boundary: a stop signal was received, or the parent process is gone."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = multiprocessing.parent_process()
        self._parent_checked_at = time.monotonic()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Store the signal; everything else happens at the step boundary."""
        self.reason = signal.Signals(signum).name

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Context that handles the stop signals."""
        return handling(STOP_SIGNALS, self)

    def due(self) -> bool:
        """True if a shutdown was requested."""
        if self._parent is not None and time.monotonic() - self._parent_checked_at > 1.0:
            self._parent_checked_at = time.monotonic()
            if not self._parent.is_alive():
                self.reason = "its parent process is gone"
        return self.reason is not None
