"""Documents, which sources yield, and the two rules that divide them into training and validation split."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]

MIN_EXPECTED_DOCUMENTS = 10
"""Documents that `split_by_content` must assign to each split on average; the odds that one gets none are 1 in 20,000."""


class Document(NamedTuple):
    """One text of a source."""

    text: str
    split: Split | None
    """The published split that the text belongs to; None leaves it to `split_by_content` or `split_inside`."""
    done: float | None
    """Share of the source that has been read, 0 to 1; None if the source does not know its length."""


def content_digest(text: str) -> bytes:
    """A text's BLAKE2b hash of 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def min_documents_to_split_by_content(validation_fraction: float) -> int:
    """The fewest documents to which `split_by_content` applies; a source with fewer is divided by `split_inside`."""
    return math.ceil(MIN_EXPECTED_DOCUMENTS / min(validation_fraction, 1 - validation_fraction))


def split_by_content(text: str, digest: bytes, validation_fraction: float) -> list[tuple[str, Split]]:
    """The whole text, in the split that its hash decides.

    Equal texts are in the same split under any name, so a copy cannot carry a validation document into training, and
    adding files to a folder moves no other document.
    """
    position = int.from_bytes(digest[:8], "big") / 2**64
    return [(text, "validation" if position < validation_fraction else "train")]


def split_inside(text: str, digest: bytes, validation_fraction: float) -> list[tuple[str, Split]]:
    """The end of the text for validation, then its beginning for training; an empty part is omitted.

    Equal texts are cut at the same character, so a copy carries nothing from one split into the other.
    """
    content = text.encode()
    at = len(content) - round(len(content) * validation_fraction)
    while at < len(content) and content[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    # Validation first, so that a preparation that stops at a number of training tokens has written both parts.
    parts: list[tuple[str, Split]] = [(content[at:].decode(), "validation"), (content[:at].decode(), "train")]
    return [part for part in parts if part[0]]
