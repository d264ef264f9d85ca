"""A run of a second, with every part stated, and campaigns of such runs: what many tests train, plan or write down."""

from __future__ import annotations

from scaling.flops import train_flops
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.spec import Budget, DataSpec, Evaluation, OptimizerSpec, RunSpec, Schedule

TINY = ModelConfig(layers=1, width=16, heads=2, vocabulary=256, context=16, ffn_multiple=8)

TINY_MOONLIGHT = ModelConfig(
    layers=2,
    width=16,
    heads=2,
    vocabulary=256,
    context=16,
    ffn_multiple=16,
    family="moonlight-moe",
    moe=MoEConfig(num_experts=8, top_k=2, num_shared_experts=1, dense_layers=1, granularity=2, bias_update_rate=0.02),
    mla=MLAConfig(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8),
)


def make_spec(
    *,
    shape: ModelConfig = TINY,
    steps: int = 12,
    windows: int = 8,
    optimizer: str = "adamw",
    peak_lr: float = 1e-2,
    seed: int = 0,
    manifest: str | None = None,
    times: int = 1,
) -> RunSpec:
    """A run of tiny shape and few steps."""
    from scaling.optim.registry import complete

    batch_tokens = windows * shape.context
    tokens = steps * batch_tokens
    return RunSpec(
        model=shape,
        budget=Budget(tokens=tokens, flops=train_flops(shape, tokens)),
        batch_tokens=batch_tokens,
        optimizer=complete(OptimizerSpec(name=optimizer, peak_lr=peak_lr)),
        schedule=Schedule(kind="cosine", warmup_tokens=2 * batch_tokens),
        data=DataSpec(source="text", manifest=manifest),
        evaluation=Evaluation(tokens=32 * shape.context, times=times),
        seed=seed,
    )


def campaign_head(name: str, *, training: str = "", evaluation: str = "times = 0") -> str:
    """The first tables of a campaign file, a template with a place for ``text``.

    Args:
        name: The campaign's name.
        training: More lines for ``[training]``.
        evaluation: More lines for ``[evaluation]``.
    """
    return f"""
name = "{name}"
[data]
source = "text"
path = "{{text}}"
repeat = true
[model]
vocabulary = 256
context = 16
ffn_multiple = 8
[training]
batch_tokens = 128
{training}
[evaluation]
tokens = 512
{evaluation}
"""


def arm_table(name: str, *lines: str, optimizer: str | None = None) -> str:
    """An ``[[arms]]`` table, of the optimizer of its own name unless another is given."""
    return "\n".join(["[[arms]]", f'name = "{name}"', f'optimizer = "{optimizer or name}"', *lines, ""])


def rung_table(name: str, *, tokens: int | str | None = None, layers: int = 1, width: int = 16) -> str:
    """A ``[[rungs]]`` table; `tokens` may be a place in the template."""
    lines = ["[[rungs]]", f'name = "{name}"', f"layers = {layers}", f"width = {width}", "heads = 2"]
    return "\n".join([*lines, *([] if tokens is None else [f"tokens = {tokens}"]), ""])


ON_CPU = """[placement]
device = "cpu"
"""

BOTH_ARMS = arm_table("adamw", "peak_lr = 1e-2") + arm_table("muon", "peak_lr = 2e-2")
