"""The unit that sources yield: one document, its half of the split, and how far the source has come."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]


class Document(NamedTuple):
    """One text as its source gave it."""

    text: str
    half: Split | None
    """Where a published split puts it; None leaves it to the hash of its content (`split_by_hash`)."""
    done: float | None
    """Share of the source that has been read, 0 to 1; None where the source does not know its length."""


def content_digest(text: str) -> bytes:
    """16 bytes that name a text by its content."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_by_hash(digest: bytes, validation_fraction: float) -> Split:
    """Training or validation, decided by the content alone.

    Equal texts always fall in the same half, whatever their names, so a copy cannot carry a validation document into
    training, and adding files to a folder moves no document that was there before.
    """
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"
