"""Nodes that new jobs avoid: a job that ends before its run's first step counts against its node.

A node that fails every job at once is free again at once, and so drains a queue. A run that failed at its start on two
nodes is assumed to be at fault itself, and counts against neither.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from scaling.io import Strict, append_line, read_lines
from sweeps.slurm.array_records import FOLDER
from sweeps.slurm.client import CommandError, run_slurm

FILE = "nodes.jsonl"

MIN_FAILED_RUNS = 2
"""Runs that have to fail at their start on a node before it is excluded."""

MAX_AGE_SECONDS = 86_400.0
"""Age after which a failure no longer counts: nodes are repaired."""


class NodeFailure(Strict, frozen=True):
    """One line of nodes.jsonl: a job ended on a node before the run's first step."""

    node: str
    run: str
    job: str
    restart: int
    time: float


def failures(root: Path) -> list[NodeFailure]:
    """Failures of the last day."""
    lines = read_lines(root / FOLDER / FILE, NodeFailure)
    return [failure for failure in lines if time.time() - failure.time < MAX_AGE_SECONDS]


def note_failures(root: Path, found: Iterable[NodeFailure]) -> None:
    """Append failures that are not in the file yet."""
    known = {(failure.run, failure.job, failure.restart) for failure in failures(root)}
    for failure in found:
        if (failure.run, failure.job, failure.restart) not in known:
            append_line(root / FOLDER / FILE, failure)


def bad_nodes(root: Path) -> dict[str, int]:
    """Nodes to exclude, with the number of runs that failed at their start there."""
    nodes_by_run, runs_by_node = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for failure in failures(root):
        nodes_by_run[failure.run].add(failure.node)
    for run, nodes in nodes_by_run.items():
        if len(nodes) == 1:
            runs_by_node[min(nodes)].add(run)
    return {node: len(runs) for node, runs in sorted(runs_by_node.items()) if len(runs) >= MIN_FAILED_RUNS}


def excluded_nodes(root: Path) -> list[str]:
    """`bad_nodes`, or none if the cluster has no others: then the nodes are not at fault."""
    bad = list(bad_nodes(root))
    return bad if bad and _others_exist(bad) else []


def _others_exist(nodes: Iterable[str]) -> bool:
    try:
        return bool(set(run_slurm("sinfo", "-h", "-N", "-o", "%N").split()) - set(nodes))
    except CommandError:
        return True  # not known


def describe_bad_nodes(root: Path) -> list[str]:
    """One sentence for each bad node, with what to do about it."""
    return [
        f"{node} is excluded from new jobs: {runs} runs ended there before their first step. Report it to your "
        f"administrators; when it is repaired, remove {root / FOLDER / FILE}."
        for node, runs in bad_nodes(root).items()
    ]


def exclude_from_pending(jobs: Iterable[str], nodes: list[str]) -> None:
    """Exclude further nodes from the pending tasks of some jobs, as far as SLURM permits; running tasks are not moved."""
    if not nodes or not _others_exist(nodes):
        return
    for job in jobs:
        with contextlib.suppress(CommandError):
            text = run_slurm("scontrol", "-o", "show", "job", job)
            if pending := re.search(r"JobState=PENDING.*?ExcNodeList=(\S*)", text):
                before = [] if pending[1] in ("", "(null)") else [pending[1]]
                run_slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*before, *nodes])}")
