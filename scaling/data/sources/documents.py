"""The unit that sources yield: one document, its half of the split, and how far the source has come."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]


ENOUGH_DOCUMENTS = 10
"""Documents that `split_by_content` must give each half on average; then the odds that one gets none are 1 in 20,000."""


class Document(NamedTuple):
    """One text as its source gave it."""

    text: str
    half: Split | None
    """Where a published split puts it; None leaves it to `split_by_content` or `split_inside`."""
    done: float | None
    """Share of the source that has been read, 0 to 1; None where the source does not know its length."""


def content_digest(text: str) -> bytes:
    """16 bytes that name a text by its content."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def documents_to_choose_from(validation_fraction: float) -> int:
    """The fewest documents that are split by `split_by_content`; a source that has fewer is split by `split_inside`."""
    return math.ceil(ENOUGH_DOCUMENTS / min(validation_fraction, 1 - validation_fraction))


def split_by_content(text: str, digest: bytes, validation_fraction: float) -> list[tuple[str, Split]]:
    """The whole text in one half, decided by its content alone.

    Equal texts always fall in the same half, whatever their names, so a copy cannot carry a validation document into
    training, and adding files to a folder moves no document that was there before.
    """
    position = int.from_bytes(digest[:8], "big") / 2**64
    return [(text, "validation" if position < validation_fraction else "train")]


def split_inside(text: str, digest: bytes, validation_fraction: float) -> list[tuple[str, Split]]:
    """The last bytes of the text for validation, then those before them for training; an empty part is left out.

    Equal texts are cut at the same character, so a copy carries nothing from one half into the other.
    """
    content = text.encode()
    at = len(content) - round(len(content) * validation_fraction)
    while at < len(content) and content[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    # Validation first: a preparation that stops at a number of training tokens stops behind both parts.
    parts: list[tuple[str, Split]] = [(content[at:].decode(), "validation"), (content[:at].decode(), "train")]
    return [part for part in parts if part[0]]
