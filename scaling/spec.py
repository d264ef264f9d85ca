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

from scaling.errors import UserError
from scaling.flops import train_flops
from scaling.io import (
    BatchTokens,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Sequences,
    Small,
    Strict,
)
from scaling.model_config import ModelConfig

ID_LENGTH = 12
"""Hex digits of a run id: 48 bits, so 10,000 runs collide with odds of 2e-7."""


class Budget(Strict, frozen=True):
    """How long a run trains.

    `flops` is what `scaling.flops` counts for the shape and the tokens under the convention ``6nd``; it is written so
    that a reader of spec.json sees it, and `RunSpec` refuses a value that the shape and the tokens do not give.
    """

    tokens: Positive
    flops: Annotated[int, msgspec.Meta(gt=0)]


class OptimizerSpec(Strict, frozen=True):
    """An optimizer by its row in ``scaling.optim.registry.OPTIMIZERS``, every option of that row filled in.

    `peak_lr` and `weight_decay` are shared by all parameters unless an option says otherwise.
    """

    name: str
    peak_lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1
    options: dict[str, float | int | bool | str] = msgspec.field(default_factory=dict)


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
            raise UserError(
                f'schedule "{self.kind}" {"needs" if self.kind == "wsd" else "does not take"} decay_tokens; '
                "warm-up-stable-decay is the one kind that takes it."
            )


class DataSpec(Strict, frozen=True):
    """Which tokens a run sees, by content: two runs with equal values see the same tokens in the same order."""

    source: str
    """Row of ``scaling.data.sources.registry.SOURCES`` that the shards were made from."""
    manifest: str | None = None
    """SHA-256 of the shards' manifest; None until the data are prepared, and such a run cannot start."""
    repeat: bool = False
    """Whether a run that needs more tokens than there are goes over them again, each epoch in its own order."""


class Evaluation(Strict, frozen=True):
    """When the held-out loss is measured, besides once at the end. The windows are the same for every run."""

    tokens: Positive = 131_072
    """Held-out tokens, sampled from the validation split by a fixed permutation (`scaling.data.batches.held_out`)."""
    times: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 4
    """Measurements at equal distances before the last."""
    dynamics: Positive | None = None
    """How often, at equal distances and with the last step, sizes of updates, attention logits and spectra of weights
    are measured (`scaling.training.diagnostics`); None never. The run's other numbers are the same either way."""


class WarmStart(Strict, frozen=True):
    """Weights that a run starts from: those of another finished run, whose directory lies beside its own."""

    run: str
    """Id of that run, and so everything that it was."""
    method: Literal["copy", "upcycle"] = "copy"
    """``copy`` takes the weights over; ``upcycle`` makes every expert a copy of the feed-forward."""
    count_flops: bool = True
    """Whether the record's FLOPs include those of that run; either way it says so."""


class RunSpec(Strict, frozen=True):
    """Everything that decides the numbers of one run.

    Raises:
        UserError: The batch is not whole windows, the budget is less than one batch, or `budget.flops` is not what
            shape and tokens give.
    """

    model: ModelConfig
    budget: Budget
    batch_tokens: BatchTokens
    optimizer: OptimizerSpec
    schedule: Schedule
    data: DataSpec
    evaluation: Evaluation = Evaluation()
    seed: Seed = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: PositiveFloat | None = 1.0
    """Global norm that gradients are clipped to; None clips nothing."""
    warm_start: WarmStart | None = None
    """Where the weights come from; None draws them from the seed."""
    branch_of: str | None = None
    """Id of a longer ``wsd`` run that this one shares its steps with up to the start of its own decay. It may start
    from that run's checkpoint (`scaling.training.warm_start`); its numbers are those of the run trained whole."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        context = self.model.context
        if self.batch_tokens % context:
            raise UserError(
                f"batch_tokens {self.batch_tokens:,} is not a whole number of windows of context {context:,}; "
                f"use {max(self.batch_tokens // context, 1) * context:,}."
            )
        if self.budget.tokens < self.batch_tokens:
            raise UserError(
                f"a budget of {self.budget.tokens:,} tokens is less than one batch of {self.batch_tokens:,}; "
                "train longer or use a smaller batch."
            )
        ramps = self.schedule.warmup_tokens + (self.schedule.decay_tokens or 0)
        if ramps > self.budget.tokens:
            raise UserError(
                f"warm-up and decay take {ramps:,} tokens, and the budget is {self.budget.tokens:,}; shorten them."
            )
        if self.branch_of is not None and self.branch_tokens < self.schedule.warmup_tokens:
            raise UserError(
                "branch_of names a trunk, and the run's own decay starts before its warm-up is over, so there is nothing "
                "to share. Shorten the warm-up, or train the run whole."
            )
        counted = train_flops(self.model, self.budget.tokens)
        if counted != self.budget.flops:
            raise UserError(
                f"budget.flops says {self.budget.flops:.6g}, and shape and tokens give {counted:.6g} under the "
                'convention "6nd". Plan the campaign again; do not write FLOPs by hand.'
            )

    @property
    def steps(self) -> int:
        """Optimizer steps: whole batches in the budget."""
        return self.budget.tokens // self.batch_tokens

    @property
    def branch_tokens(self) -> int:
        """Tokens at the last step boundary before the decay of a ``wsd`` schedule; all tokens for the other kinds.

        Up to here a longer run with the same warm-up has taken the same steps.
        """
        # The decay is counted back from the last whole step, as the training loop does.
        start = self.steps * self.batch_tokens - (self.schedule.decay_tokens or 0)
        return start // self.batch_tokens * self.batch_tokens

    @property
    def id(self) -> str:
        """Content hash of the canonical JSON, defaults included: `ID_LENGTH` hex digits."""
        return hashlib.sha256(canonical_json(self)).hexdigest()[:ID_LENGTH]


class ExecutionConfig(Strict, frozen=True):
    """How a run executes; the fields that a campaign's ``[placement]`` and a run's placement.json share."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; ``auto`` takes a GPU if there is one."""
    threads: Small = 1
    """CPU threads of one run; on small models two runs with one thread are faster than one run with two."""
    micro_batch: Sequences | None = None
    """Most sequences of one forward pass; unset: the whole batch. A plan takes the largest divisor of the batch, and
    gradients are accumulated up to `batch_tokens`."""
    compile: bool = False
    """Compile the model with ``torch.compile``."""
    graphs: bool = False
    """With `compile`: CUDA graphs for the forward and backward pass of models whose steps are bound by kernel launches."""
    devices: Small = 1
    """Devices of one machine that share a run, a process each; in a SLURM job as many as its tasks."""
    strategy: Literal["ddp", "fsdp2", "zero1"] = "ddp"
    """With several devices: each keeps all parameters (``ddp``), a shard of them (``fsdp2``), or all parameters and a
    shard of the momentum by Moonlight's Algorithm 1 (``zero1``)."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them: a third more work, far less memory."""
    checkpoint_seconds: NonNegativeFloat = 30.0
    """Seconds between checkpoints: the most work that a kill can cost."""


class Placement(ExecutionConfig, frozen=True, kw_only=True):
    """Where and how one run executes. It changes how long a run takes, never its tokens or its mathematics."""

    data: str
    """Folder with the token shards and their manifest."""
    keep_tokens: tuple[Positive, ...] = ()
    """Tokens at which a checkpoint is kept for good, so that shorter runs can branch off (`RunSpec.branch_of`)."""
    nodes: Small = 1
    """Machines, each with `devices` devices."""

    @property
    def processes(self) -> int:
        """Processes that share the run."""
        return self.devices * self.nodes


ADDED_LATER = frozenset({"ffn", "moe", "mla", "family_options", "warm_start", "branch_of", "dynamics"})
"""Fields that came after the first runs. Where they are None an id does not see them, so those runs keep theirs."""


def canonical_json(value: msgspec.Struct) -> bytes:
    """One spelling for one value: sorted keys, no spaces, defaults included."""
    return msgspec.json.encode(_without_absent(msgspec.to_builtins(value)), order="sorted")


def _without_absent(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_absent(v) for k, v in value.items() if v is not None or k not in ADDED_LATER}


def as_dict(value: msgspec.Struct) -> dict[str, Any]:
    """A value as plain builtins, for tables and `--json`."""
    built: dict[str, Any] = msgspec.to_builtins(value)
    return built
