"""Nodes that jobs avoid."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sweeps.slurm import array_records, bad_nodes
from sweeps.slurm.bad_nodes import NodeFailure


def failing(root: Path, *where: tuple[str, str]) -> None:
    """Note failures at their start of runs on nodes."""
    (root / array_records.FOLDER).mkdir(exist_ok=True)
    for number, (run, node) in enumerate(where):
        failure = NodeFailure(node=node, run=run, job=str(number), restart=0, time=time.time())
        bad_nodes.note_failures(root, [failure])


def test_two_failed_runs_exclude_a_node(tmp_path: Path, commands: Any) -> None:
    commands(sinfo="printf 'n1\\nn2\\nn3\\n'")
    failing(tmp_path, ("a", "n1"), ("a", "n1"))
    assert bad_nodes.excluded_nodes(tmp_path) == []
    failing(tmp_path, ("a", "n1"), ("a", "n1"), ("b", "n1"))
    assert bad_nodes.excluded_nodes(tmp_path) == ["n1"]
    failing(tmp_path, ("a", "n1"), ("a", "n1"), ("b", "n1"), ("b", "n2"))
    assert bad_nodes.excluded_nodes(tmp_path) == []  # b is at fault


def test_the_only_nodes_are_not_excluded(tmp_path: Path, commands: Any) -> None:
    failing(tmp_path, ("a", "n1"), ("b", "n1"))
    commands(sinfo="echo n1; echo n2")
    assert bad_nodes.excluded_nodes(tmp_path) == ["n1"]
    commands(sinfo="echo n1")
    assert bad_nodes.excluded_nodes(tmp_path) == []
