"""What the optimizer itself costs, in FLOPs, beside those of the model. No torch.

Counted are matrix products, two FLOPs for a multiplication and addition, by the mathematics: symmetric products are
counted whole, so that the number does not depend on the machine. AdamW multiplies no matrices. The count grows with
steps and not with tokens: negligible at Moonlight's batches (below one per cent of 6ND), a third of a small run's.
"""

from __future__ import annotations

from collections.abc import Mapping

from scaling.models.registry import check_family
from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.newton_schulz.views import matrices
from scaling.optim.options import MatrixOptions
from scaling.optim.registry import assign, options_of
from scaling.spec import OptimizerSpec, RunSpec


def run_optimizer_flops(spec: RunSpec, tokens: int | None = None) -> int:
    """FLOPs of all optimizer steps of a run, or of those that `tokens` took."""
    steps = spec.steps if tokens is None else tokens // spec.batch_tokens
    return steps * update_flops(spec.optimizer, check_family(spec.model).weights(spec.model))


def update_flops(spec: OptimizerSpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """FLOPs of one optimizer step, given its parameters by name; those that AdamW takes may be missing.

    What torch's FlopCounterMode counts when every product is a plain one.
    """
    options = options_of(spec)
    if not isinstance(options, MatrixOptions):
        return 0
    total = 0
    for assignment in assign(spec, shapes):
        if assignment.algorithm != "adamw":
            count, rows, columns = matrices(assignment.name, assignment.shape, assignment.view)
            total += count * newton_schulz_flops(rows, columns, options.ns_steps, options.form)
    return total
