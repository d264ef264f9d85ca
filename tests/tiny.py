"""A run of a second, with every part stated: what many tests train, plan or write down."""

from __future__ import annotations

from scaling.flops import train_flops
from scaling.spec import Budget, DataSpec, Evaluation, ModelShape, OptimizerSpec, RunSpec, Schedule

TINY = ModelShape(layers=1, width=16, heads=2, vocabulary=256, context=16, ffn_multiple=8)


def make_spec(
    *,
    shape: ModelShape = TINY,
    steps: int = 12,
    windows: int = 8,
    optimizer: str = "adamw",
    peak_lr: float = 1e-2,
    seed: int = 0,
    manifest: str | None = None,
    times: int = 1,
) -> RunSpec:
    """A run of tiny shape and few steps."""
    from scaling.optim.recipes import complete

    batch_tokens = windows * shape.context
    tokens = steps * batch_tokens
    return RunSpec(
        shape=shape,
        budget=Budget(tokens=tokens, flops=train_flops(shape, tokens)),
        batch_tokens=batch_tokens,
        optimizer=complete(OptimizerSpec(name=optimizer, peak_lr=peak_lr)),
        schedule=Schedule(kind="cosine", warmup_tokens=2 * batch_tokens),
        data=DataSpec(source="text", manifest=manifest),
        evaluation=Evaluation(tokens=32 * shape.context, times=times),
        seed=seed,
    )
