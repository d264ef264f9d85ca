"""Runs that start from the weights of another: where those are, and what they cost.

The other run's directory lies beside this one. Whether its FLOPs are charged is part of the spec; what was charged is
stated in the record.
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
    """The finished run that another starts from.

    Raises:
        UserError: It does not exist, has not finished, or, with `weights`, its weights are missing.
    """
    found = RunDirectory(directory.path.parent / initial.run)
    return found, finished_run(found, purpose=f"the warm start of run {directory.path.name}", weights=weights)


def charged_flops(directory: RunDirectory, initial: WarmStart | None) -> dict[str, int]:
    """What the parent cost under every convention, its own parents included where they were charged; empty if not charged."""
    parents = charged_parents(directory, initial)
    return dict(parents[0].flops) if parents else {}


def charged_parents(directory: RunDirectory, initial: WarmStart | None) -> list[RunRecord]:
    """Records of the runs that a run stands on and pays for, the nearest first.

    Raises:
        UserError: One of them is not there.
    """
    if initial is None or not initial.charged:
        return []
    found, record = parent(directory, initial, weights=False)
    return [record, *charged_parents(found, record.spec.warm_start)]


def load_initial(directory: RunDirectory, initial: WarmStart, model: Decoder) -> None:
    """Fill an initialised model with the parent's weights.

    Raises:
        UserError: As `parent`, or the weights are damaged or of another shape.
    """
    from scaling.models.upcycle import load_weights

    found, record = parent(directory, initial)
    load_weights(model, found.intact_weights(record), how=initial.how)


def trunk_checkpoint(directory: RunDirectory) -> Path | None:
    """The checkpoint that a run may start from in its trunk's directory, beside its own.

    Returns:
        None for a run without `branch_of`, and for one whose trunk is not there or kept no point at that step.

    Raises:
        UserError: What `branch_of` names is not a trunk of this run: its first steps would be other steps.
    """
    spec = directory.spec()
    if spec.branch_of is None:
        return None
    trunk = RunDirectory(directory.path.parent / spec.branch_of)
    if not trunk.spec_file.exists():
        return None
    refuse_foreign(spec, trunk.spec())
    # Torch lives behind this import, and planning reads `refuse_foreign` without it.
    from scaling.training.checkpoint import branch_checkpoint

    return branch_checkpoint(trunk.checkpoints, spec.branch_tokens // spec.batch_tokens)


def refuse_foreign(branch: RunSpec, trunk: RunSpec) -> None:
    """Refuse a trunk whose steps are not the branch's own up to the branch's decay.

    Raises:
        UserError: The sentence names the fields that differ, or the lengths that do not fit.
    """
    if branch.schedule.kind != "wsd" or trunk.schedule.kind != "wsd":
        raise UserError(
            f'a branch and its trunk need the schedule "wsd"; these have "{branch.schedule.kind}" and '
            f'"{trunk.schedule.kind}". Other kinds decay from the start, so no two lengths share a step.'
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
            "A branch may differ from its trunk in its tokens and its decay alone."
        )
    if branch.branch_tokens > trunk.branch_tokens:
        raise UserError(
            f"run {branch.id} leaves its trunk at {branch.branch_tokens:,} tokens, and the trunk {branch.branch_of} "
            f"decays from {trunk.branch_tokens:,} on. Make the trunk longer, or train the run whole."
        )


def _differs(branch: RunSpec, trunk: RunSpec, field: str) -> bool:
    left, right = getattr(branch, field), getattr(trunk, field)
    if isinstance(left, msgspec.Struct) and isinstance(right, msgspec.Struct):
        return canonical_json(left) != canonical_json(right)
    return bool(left != right)
