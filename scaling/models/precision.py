"""Autocast on any device: the meta device, where counts are taken, knows nothing of it."""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The format that autocast gives matrix products on a kind of device now; None where it is off."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """A context in which every operation keeps the format of its operands."""
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
