"""Errors that reach the user as a sentence instead of a traceback, and the text that may stand in one."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit statuses of the command line and of processes that train. Those of SLURM jobs are in `sweeps.slurm`."""

    SUCCESS = 0
    FAILURE = 1
    """A check failed or runs are not complete; also an unexpected exception."""
    USER_ERROR = 2
    """A `UserError`, an error of the operating system, or a command line that cannot be parsed."""
    STOPPED = 75
    """A run was stopped at a checkpoint and can continue (EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Ctrl-C, as in shells."""


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters other than tab and line feed, which a terminal may interpret."""


class UserError(Exception):
    """An input that cannot be used. The command line prints it and exits with status 2.

    The message says where (file, table, field), what was found, what would be accepted, and what to do.
    Modules subclass it where a caller may want to catch one kind, as in ``analysis.fitting.laws.UnreachableLoss``.
    """


def plain(text: str) -> str:
    """Text for a terminal or a table, with control characters replaced by visible ones (``ESC`` by ``␛``)."""
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd", text)


def shortened(text: str, most: int = 80) -> str:
    """Text to quote in a sentence: the beginning if it is long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class ConfigError(UserError):
    """A campaign file, or an option that stands for one of its fields, cannot be used."""


class DataError(UserError):
    """Text, a tokenizer or token shards cannot be used."""


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


REMEDIES = {
    errno.ENOSPC: "Free space on that disk; the same command then continues.",
    errno.EDQUOT: "Free space under your quota; the same command then continues.",
    errno.EFBIG: "Raise the limit on the size of a file (ulimit -f); the same command then continues.",
    errno.EROFS: "Choose a folder that you may write, for instance with --root.",
    errno.EACCES: "Choose a folder that you may read and write, for instance with --root.",
    errno.EPERM: "Choose a folder that you may read and write, for instance with --root.",
    errno.ENOTDIR: "There is a file where a folder is needed: move it, or choose another folder.",
    errno.EEXIST: "There is a file where a folder is needed: move it, or choose another folder.",
    errno.EISDIR: "There is a folder where a file is needed: move it, or choose another name.",
    errno.ENAMETOOLONG: "Use a shorter name, or a folder with a shorter path.",
    errno.ELOOP: "A link refers to itself: remove it.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENOENT: "Check the path.",
}
"""Remedies for errors of the operating system, by number."""


def os_error_sentence(error: OSError) -> str:
    """An error of the operating system as a sentence: where, what was found, what to do."""
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    place = f"{' -> '.join(paths)}: " if paths else ""
    remedy = REMEDIES.get(error.errno or 0, "Files written so far are complete; the same command continues.")
    return f"{place}{error.strerror or error}. {remedy}"
