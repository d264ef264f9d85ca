"""Seconds from the end of the backward pass to the end of the optimizer step."""

from __future__ import annotations

import time

import torch

EVERY = 16
"""One step in so many is timed on a GPU, where the host would otherwise have to wait for every step."""


class StepClock:
    """Times optimizer steps: all of them on a CPU, some on a GPU, by events that cost the host nothing."""

    def __init__(self) -> None:
        self._seconds, self._steps, self._seen = 0.0, 0, 0
        self._since: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._open: torch.cuda.Event | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the timed steps; None before the first. Waits for the GPU."""
        seconds, steps = self._seconds, self._steps
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
            steps += 1
        return seconds / steps if steps else None

    def start(self, device: torch.device) -> None:
        """The gradients are there."""
        self._seen += 1
        if device.type == "cuda":
            if self._seen % EVERY == 0:
                self._open = _mark()
        else:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """The weights are changed, or this was a micro-batch without a step."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._steps += 1
            self._since = None
        if self._open is not None:
            self._events.append((self._open, _mark()))
            self._open = None


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
