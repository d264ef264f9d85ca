"""Nodes that runs do not start on: noted when a job ends before its first step, and left out of what is submitted next.

A node that fails every job at once is free again at once, and so eats a queue. After failures of two runs it is left
out. A run that failed at its start on two nodes is taken to be at fault itself, and counts against neither.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path

from scaling.io import Strict, append_line, read_lines
from sweeps.slurm.array_records import FOLDER
from sweeps.slurm.client import Unreachable, ask

FILE = "nodes.jsonl"

RUNS = 2
"""That have to fail at their start on a node before it is left out."""

FORGET_SECONDS = 86_400.0
"""After which a failure no longer counts: nodes are repaired."""


class NodeFailure(Strict, frozen=True):
    """One line of nodes.jsonl: a job ended on a node before the run's first step."""

    node: str
    run: str
    job: str
    restart: int
    time: float


def failures(root: Path) -> list[NodeFailure]:
    """Of the last day."""
    return [
        failure
        for failure in read_lines(root / FOLDER / FILE, NodeFailure)
        if time.time() - failure.time < FORGET_SECONDS
    ]


def note_failures(root: Path, found: Iterable[NodeFailure]) -> None:
    """Append what is not there yet."""
    known = {(failure.run, failure.job, failure.restart) for failure in failures(root)}
    for failure in found:
        if (failure.run, failure.job, failure.restart) not in known:
            append_line(root / FOLDER / FILE, failure)


def bad_nodes(root: Path) -> dict[str, int]:
    """Nodes to leave out, with how many runs failed at their start there."""
    found = failures(root)
    nodes_of: dict[str, set[str]] = {}
    for failure in found:
        nodes_of.setdefault(failure.run, set()).add(failure.node)
    runs_of: dict[str, set[str]] = {}
    for failure in found:
        if len(nodes_of[failure.run]) == 1:
            runs_of.setdefault(failure.node, set()).add(failure.run)
    return {node: len(runs) for node, runs in sorted(runs_of.items()) if len(runs) >= RUNS}


def left_out(root: Path) -> list[str]:
    """`bad_nodes`, unless they are all that there is: then it is not the nodes."""
    bad = list(bad_nodes(root))
    return bad if bad and _others_than(bad) else []


def _others_than(nodes: Iterable[str]) -> bool:
    """Whether SLURM has nodes besides these; yes where it cannot say."""
    try:
        return bool(set(ask("sinfo", "-h", "-N", "-o", "%N").split()) - set(nodes))
    except Unreachable:
        return True


def sentences(root: Path) -> list[str]:
    """What a person should know about nodes, one sentence each."""
    return [
        f"{node} is left out of what is submitted: {runs} runs ended there before their first step. Tell your "
        f"administrators; when it is repaired, remove {root / FOLDER / FILE}."
        for node, runs in bad_nodes(root).items()
    ]


def keep_away(jobs: Iterable[str], nodes: list[str]) -> None:
    """Leave nodes out for the tasks of these jobs that wait, besides those that they leave out already.

    Those that run are not moved, and what SLURM refuses stays as it is.
    """
    if not nodes or not _others_than(nodes):
        return
    for job in jobs:
        with contextlib.suppress(Unreachable):
            asked = re.findall(r"JobState=PENDING.*?ExcNodeList=(\S*)", ask("scontrol", "-o", "show", "job", job))
            if asked:
                named = [] if asked[0] in ("", "(null)") else [asked[0]]
                ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*named, *nodes])}")
