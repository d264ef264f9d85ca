"""The one exception that reaches the user as a sentence instead of a traceback, and the text that may stand in it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters other than tab and line feed: a terminal may obey them."""


class Refusal(Exception):
    """An input that cannot be used. The command line prints it and exits with status 2.

    The message says where (file, table, field), what was found, what would be accepted, and what to do.
    Modules subclass it where a caller may want to catch one kind, as in ``analysis.laws.UnreachableLoss``.
    """


def plain(text: str) -> str:
    """Text for a terminal or a table: each control character is replaced by one that is seen (``ESC`` by ``␛``)."""
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text)


def shortened(text: str, most: int = 80) -> str:
    """Text to quote in a sentence: of a long one the beginning."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence for a name that is in no table: ``optimizer "muonn" is not known; did you mean "muon"? Known: ...``.

    Args:
        what: The kind of thing, as the reader calls it.
        name: What was found.
        known: What would be accepted.
    """
    known, name = sorted(known), shortened(name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f'{what} "{name}" is not known; {hint}Known: {", ".join(known)}.'
