"""FLOPs of the optimizer itself, beside those of the model. Imports no torch.

Counted are matrix products, two FLOPs for a multiplication and addition, by the mathematics: symmetric products are
counted whole, so that the number does not depend on the machine. AdamW multiplies no matrices. The count grows with
steps and not with tokens: below one per cent of 6ND at Moonlight's batches, a third of it in a small run.
"""

from __future__ import annotations

from collections.abc import Mapping

from scaling.models.registry import check_family
from scaling.optim.newton_schulz.views import matrices
from scaling.optim.registry import assign, options_of
from scaling.spec import OptimizerSpec, RunSpec


def run_optimizer_flops(spec: RunSpec, tokens: int | None = None) -> int:
    """FLOPs of all optimizer steps of a run, or of those in its first `tokens`."""
    steps = spec.steps if tokens is None else tokens // spec.batch_tokens
    return steps * update_flops(spec.optimizer, check_family(spec.model).weights(spec.model))


def update_flops(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """FLOPs of one optimizer step, given its parameters by name; those of element-wise algorithms may be missing.

    The number that torch's FlopCounterMode counts when every product is a plain one.
    """
    options = options_of(spec)
    total = 0
    for assignment in assign(spec, shapes):
        if assignment.algorithm.is_matrix:
            count, rows, columns = matrices(assignment.name, assignment.shape, assignment.view)
            total += count * assignment.algorithm.flops(options, rows, columns)
    return total
