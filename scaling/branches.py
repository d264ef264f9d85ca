"""Cooldown branches: a short run that takes its first steps from a longer one.

Two ``wsd`` runs that differ only in their length take the same steps until the shorter one begins to decay: the same
batches, the same rates. So one long trunk, which keeps a resume point where each branch leaves it, serves several token
budgets, and only the decays are trained anew. A branch's numbers are those of the run trained whole, bit for bit on a
CPU; where the trunk has no such point, the branch is trained whole.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from scaling.errors import Refusal
from scaling.records import RunDirectory
from scaling.spec import RunSpec, canonical_json


def trunk_point(directory: RunDirectory) -> Path | None:
    """The resume point that a run may start from in its trunk's directory, beside its own.

    Returns:
        None for a run without `branch_of`, and for one whose trunk is not there or kept no point at that step.

    Raises:
        Refusal: What `branch_of` names is not a trunk of this run: its first steps would be other steps.
    """
    spec = directory.spec()
    if spec.branch_of is None:
        return None
    trunk = RunDirectory(directory.path.parent / spec.branch_of)
    if not trunk.spec_file.exists():
        return None
    refuse_foreign(spec, trunk.spec())
    # Torch lives behind this import, and planning reads `refuse_foreign` without it.
    from scaling.resume import branch_point

    return branch_point(trunk.checkpoints, spec.branch_tokens // spec.batch_tokens)


def refuse_foreign(branch: RunSpec, trunk: RunSpec) -> None:
    """Refuse a trunk whose steps are not the branch's own up to the branch's decay.

    Raises:
        Refusal: The sentence names the fields that differ, or the lengths that do not fit.
    """
    if branch.schedule.kind != "wsd" or trunk.schedule.kind != "wsd":
        raise Refusal(
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
        raise Refusal(
            f"run {branch.id} is no branch of {branch.branch_of}: they differ in {', '.join(differing)}. "
            "A branch may differ from its trunk in its tokens and its decay alone."
        )
    if branch.branch_tokens > trunk.branch_tokens:
        raise Refusal(
            f"run {branch.id} leaves its trunk at {branch.branch_tokens:,} tokens, and the trunk {branch.branch_of} "
            f"decays from {trunk.branch_tokens:,} on. Make the trunk longer, or train the run whole."
        )


def _differs(branch: RunSpec, trunk: RunSpec, field: str) -> bool:
    left, right = getattr(branch, field), getattr(trunk, field)
    if isinstance(left, msgspec.Struct) and isinstance(right, msgspec.Struct):
        return canonical_json(left) != canonical_json(right)
    return bool(left != right)
