"""Exceptions that reach the user as a sentence instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An input that cannot be used. The command line prints it and exits with status 2.

    The message says where (file, table, field), what was found, what would be accepted, and what to do.
    Modules subclass it where a caller may want to catch one kind.
    """


class ConfigError(UserError):
    """A campaign file, or an option that sets one of its fields, cannot be used."""


class DataError(UserError):
    """Text, a tokenizer or token shards cannot be used."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name: ``optimizer "muonn" is not known; did you mean "muon"? Known: ...``.

    Args:
        what: The kind of thing: ``optimizer``.
        name: The name that was found.
        known: The names that would be accepted.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f'{what} "{name}" is not known; {hint}Known: {", ".join(known)}.'
