"""Several token budgets from one trunk: the branches of a plan and the FLOPs that they save."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec

from scaling.errors import UserError
from scaling.flops import train_flops
from scaling.training.warm_start import check_branch

if TYPE_CHECKING:
    from sweeps.planning.plan import CampaignPlan, PlannedRun


def branched(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The runs, with those that differ only in length turned into branches of the longest.

    The warm-up is the campaign's share of the shortest run's tokens for all of them, because they share their first
    steps. A run whose decay would start before the end of the warm-up, or after that of the trunk, stays whole.
    The order stays; ids are new, and trunks keep checkpoints for their branches.
    """
    families: dict[bytes, list[int]] = {}
    for number, run in enumerate(runs):
        spec = run.spec
        shared = (spec.model, spec.batch_tokens, spec.optimizer, spec.data, spec.seed, spec.precision, spec.clip_norm)
        families.setdefault(msgspec.json.encode((run.arm, shared)), []).append(number)
    made = list(runs)
    for members in families.values():
        if len(members) < 2:
            continue
        warmup = min(runs[number].spec.schedule.warmup_tokens for number in members)
        for number in members:
            schedule = msgspec.structs.replace(runs[number].spec.schedule, warmup_tokens=warmup)
            made[number] = _with_spec(runs[number], schedule=schedule)
        longest = max(members, key=lambda number: made[number].spec.budget.tokens)
        kept_tokens = set()
        for number in {*members} - {longest}:
            with contextlib.suppress(UserError):
                branch = _with_spec(made[number], branch_of=made[longest].id)
                check_branch(branch.spec, made[longest].spec)
                made[number] = branch
                kept_tokens.add(branch.spec.branch_tokens)
        placement = msgspec.structs.replace(made[longest].placement, keep_tokens=tuple(sorted(kept_tokens)))
        made[longest] = msgspec.structs.replace(made[longest], placement=placement)
    return made


def _with_spec(run: PlannedRun, **changes: Any) -> PlannedRun:
    spec = msgspec.structs.replace(run.spec, **changes)
    return msgspec.structs.replace(run, spec=spec, id=spec.id)


def saved_flops(plan: CampaignPlan) -> int:
    """FLOPs (6ND) of the steps that branches share with their trunks."""
    return sum(
        train_flops(run.spec.model, run.spec.branch_tokens) for run in plan.distinct() if run.spec.branch_of is not None
    )
