"""Runs that start from another run: from its final weights (warm start), or as a branch from one of its checkpoints.

The directory of the other run is next to that of this one. The spec states whether a warm start is charged with the FLOPs
of its parent, and the record states what was charged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import UserError
from scaling.run.directory import RunDirectory, finished_run
from scaling.run.record import RunRecord
from scaling.spec import RunSpec, WarmStart, canonical_json

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def parent(directory: RunDirectory, initial: WarmStart, *, weights: bool = True) -> tuple[RunDirectory, RunRecord]:
    """The finished run that another starts from."""
    found = RunDirectory(directory.path.parent / initial.run)
    return found, finished_run(found, purpose=f"the warm start of run {directory.path.name}", weights=weights)


def charged_flops(directory: RunDirectory, initial: WarmStart | None) -> dict[str, int]:
    """FLOPs of the parent by convention, including those that it was charged with; empty if none are charged."""
    parents = charged_parents(directory, initial)
    return dict(parents[0].flops) if parents else {}


def charged_parents(directory: RunDirectory, initial: WarmStart | None) -> list[RunRecord]:
    """Records of the runs that a run is charged for: its parent, that run's parent, and so on."""
    if initial is None or not initial.count_flops:
        return []
    found, record = parent(directory, initial, weights=False)
    return [record, *charged_parents(found, record.spec.warm_start)]


def load_initial(directory: RunDirectory, initial: WarmStart, model: Decoder) -> None:
    """Fill an initialised model with the parent's weights."""
    from scaling.models.upcycle import load_weights

    found, record = parent(directory, initial)
    load_weights(model, found.intact_weights(record), method=initial.method)


def trunk_checkpoint(directory: RunDirectory) -> Path | None:
    """The checkpoint of its trunk from which a branch can start.

    Returns:
        None for a run that is no branch, and if the trunk does not exist or kept no checkpoint at that step.

    Raises:
        UserError: The run of `branch_of` takes other first steps than this one.
    """
    spec = directory.spec()
    if spec.branch_of is None:
        return None
    trunk = RunDirectory(directory.path.parent / spec.branch_of)
    if not trunk.spec_file.exists():
        return None
    check_branch(spec, trunk.spec())
    # Imported here because it imports torch, which planning must not load for `check_branch`.
    from scaling.training.checkpoint import branch_checkpoint

    return branch_checkpoint(trunk.checkpoints, spec.branch_tokens // spec.batch_tokens)


def check_branch(branch: RunSpec, trunk: RunSpec) -> None:
    """Check that a trunk takes the same steps as its branch until the branch's decay."""
    if branch.schedule.kind != "wsd" or trunk.schedule.kind != "wsd":
        raise UserError(
            f'a branch and its trunk need the schedule "wsd"; these have "{branch.schedule.kind}" and '
            f'"{trunk.schedule.kind}". Other kinds decay from the start, so runs of different lengths share no step.'
        )
    differing = [
        field
        for field in RunSpec.__struct_fields__
        if field not in ("budget", "schedule", "evaluation", "branch_of") and _differs(branch, trunk, field)
    ]
    if branch.schedule.warmup_tokens != trunk.schedule.warmup_tokens:
        differing.append("schedule.warmup_tokens")
    if differing:
        raise UserError(
            f"run {branch.id} is no branch of {branch.branch_of}: they differ in {', '.join(differing)}. "
            "A branch may differ from its trunk only in its tokens and its decay."
        )
    if branch.branch_tokens > trunk.branch_tokens:
        raise UserError(
            f"run {branch.id} branches off at {branch.branch_tokens:,} tokens, and the trunk {branch.branch_of} "
            f"decays from {trunk.branch_tokens:,} on. Make the trunk longer, or train the run whole."
        )


def _differs(branch: RunSpec, trunk: RunSpec, field: str) -> bool:
    left, right = getattr(branch, field), getattr(trunk, field)
    if isinstance(left, msgspec.Struct) and isinstance(right, msgspec.Struct):
        return canonical_json(left) != canonical_json(right)
    return bool(left != right)
