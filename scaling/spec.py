"""The specification of one run: everything that decides its numbers, and nothing else.

Values are frozen and strict: an unknown field is refused, and nonsense is refused when the value is made. A run is
named by the hash of its canonical JSON, so that asking twice for the same run finds the same directory. Where a run
is placed (device, threads, micro-batch, the folder that holds the data) is not part of it: `Placement` lives beside
the spec, outside the id.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from scaling.errors import Refusal

Positive = Annotated[int, msgspec.Meta(gt=0)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]

ID_LENGTH = 12
"""Hex digits of a run id: 48 bits, so 10,000 runs collide with odds of 2e-7."""


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of every value that is written to a file."""


def ffn_width(width: int, multiple: int) -> int:
    """Hidden units of a SwiGLU block: ``8 * width / 3`` rounded up to a multiple.

    Source: Llama's rule; with ``multiple`` 256 it gives Moonlight's parameter counts to the printed digit
    (arXiv:2502.16982, Table 2).
    """
    return -(-8 * width // (3 * multiple)) * multiple


class ModelShape(Strict, frozen=True):
    """A Llama-like decoder: RMSNorm, RoPE, SwiGLU, multi-head attention without biases.

    Raises:
        Refusal: The heads do not divide the width, or the head size is odd (RoPE turns pairs).
    """

    layers: Positive
    width: Positive
    heads: Positive
    vocabulary: Positive
    context: Positive
    ffn_multiple: Positive = 256
    tied: bool = False
    family: str = "decoder"

    def __post_init__(self) -> None:
        """Refuse a shape that no model can have."""
        if self.width % self.heads:
            fitting = (n for n in range(1, self.width + 1) if self.width % n == 0 and self.width // n % 2 == 0)
            best = min(fitting, key=lambda heads: abs(heads - self.heads), default=1)
            raise Refusal(
                f"width {self.width} is not a multiple of heads {self.heads}. "
                f"Use {best} heads of size {self.width // best}, or a width that {self.heads} divides."
            )
        if (self.width // self.heads) % 2:
            raise Refusal(
                f"width {self.width} with {self.heads} heads gives heads of odd size {self.width // self.heads}, "
                "and rotary embedding turns pairs. Use an even head size."
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden units of the SwiGLU block."""
        return ffn_width(self.width, self.ffn_multiple)


class Budget(Strict, frozen=True):
    """How long a run trains.

    `flops` is what `scaling.flops` counts for the shape and the tokens under the convention ``6nd``; it is written so
    that a reader of spec.json sees it, and `RunSpec` refuses a value that the shape and the tokens do not give.
    """

    tokens: Positive
    flops: Positive


class OptimizerSpec(Strict, frozen=True):
    """An optimizer by its row in ``scaling.optim.recipes.OPTIMIZERS``, every option of that row filled in.

    `peak_lr` and `weight_decay` are shared by all parameters unless an option says otherwise.
    """

    name: str
    peak_lr: Annotated[float, msgspec.Meta(gt=0.0)]
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0)] = 0.1
    options: dict[str, float | int | bool | str] = {}


class Schedule(Strict, frozen=True):
    """Learning rate as a share of its peak, a pure function of tokens seen (`scaling.schedule`)."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_tokens: NonNegative = 0
    final_fraction: Fraction = 0.1
    """Share of the peak that is left at the last token."""
    decay_tokens: NonNegative | None = None
    """Tokens of the final decay of ``wsd``; no meaning for the other kinds."""

    def __post_init__(self) -> None:
        """Refuse a decay that the kind does not have, and a ``wsd`` without one."""
        if (self.kind == "wsd") != (self.decay_tokens is not None):
            raise Refusal(
                f'schedule "{self.kind}" {"needs" if self.kind == "wsd" else "does not take"} decay_tokens; '
                "warm-up-stable-decay is the one kind that takes it."
            )


class DataSpec(Strict, frozen=True):
    """Which tokens a run sees, by content: two runs with equal values see the same tokens in the same order."""

    source: str
    """Row of ``scaling.data.sources.SOURCES`` that the shards were made from."""
    manifest: str | None = None
    """SHA-256 of the shards' manifest; None until the data are prepared, and such a run cannot start."""
    repeat: bool = False
    """Whether a run that needs more tokens than there are goes over them again, each epoch in its own order."""


class Evaluation(Strict, frozen=True):
    """When the held-out loss is measured, besides once at the end. The windows are the same for every run."""

    tokens: Positive = 131_072
    """Held-out tokens, the first of the validation shard."""
    times: NonNegative = 4
    """Measurements at equal distances before the last."""


class RunSpec(Strict, frozen=True):
    """Everything that decides the numbers of one run.

    Raises:
        Refusal: The batch is not whole windows, the budget is less than one batch, or `budget.flops` is not what
            shape and tokens give.
    """

    shape: ModelShape
    budget: Budget
    batch_tokens: Positive
    optimizer: OptimizerSpec
    schedule: Schedule
    data: DataSpec
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: Annotated[float, msgspec.Meta(gt=0.0)] | None = 1.0
    """Global norm that gradients are clipped to; None clips nothing."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        from scaling.flops import train_flops

        context = self.shape.context
        if self.batch_tokens % context:
            raise Refusal(
                f"batch_tokens {self.batch_tokens:,} is not a whole number of windows of context {context:,}; "
                f"use {max(self.batch_tokens // context, 1) * context:,}."
            )
        if self.budget.tokens < self.batch_tokens:
            raise Refusal(
                f"a budget of {self.budget.tokens:,} tokens is less than one batch of {self.batch_tokens:,}; "
                "train longer or use a smaller batch."
            )
        ramps = self.schedule.warmup_tokens + (self.schedule.decay_tokens or 0)
        if ramps > self.budget.tokens:
            raise Refusal(
                f"warm-up and decay take {ramps:,} tokens, and the budget is {self.budget.tokens:,}; shorten them."
            )
        counted = train_flops(self.shape, self.budget.tokens)
        if counted != self.budget.flops:
            raise Refusal(
                f"budget.flops says {self.budget.flops:.6g}, and shape and tokens give {counted:.6g} under the "
                'convention "6nd". Plan the campaign again; do not write FLOPs by hand.'
            )

    @property
    def steps(self) -> int:
        """Optimizer steps: whole batches in the budget."""
        return self.budget.tokens // self.batch_tokens

    @property
    def id(self) -> str:
        """Content hash of the canonical JSON, defaults included: `ID_LENGTH` hex digits."""
        return hashlib.sha256(canonical_json(self)).hexdigest()[:ID_LENGTH]


class Placement(Strict, frozen=True):
    """Where and how a run executes. It changes how long a run takes, never which tokens or which mathematics."""

    data: str
    """Folder with the token shards and their manifest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = 1
    """CPU threads of the run; on small models two runs of one thread beat one run of two."""
    micro_batch: Positive | None = None
    """Windows of one forward pass; None takes the whole batch. Gradients are accumulated up to `batch_tokens`."""
    compile: bool = False
    checkpoint_seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 30.0
    """Seconds between resume points: what a kill can cost."""


def canonical_json(value: msgspec.Struct) -> bytes:
    """One spelling for one value: sorted keys, no spaces, defaults included."""
    return msgspec.json.encode(value, order="sorted")


def as_dict(value: msgspec.Struct) -> dict[str, Any]:
    """A value as plain builtins, for tables and `--json`."""
    built: dict[str, Any] = msgspec.to_builtins(value)
    return built
