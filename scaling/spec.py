"""The specification of one run: everything that decides its numbers, and nothing else.

Values are frozen and strict: unknown fields and contradictions are refused when a value is made. A run is named by the
hash of its canonical JSON, so a second request for the same run finds the same directory. The placement of a run
(device, threads, micro-batch, data folder) is a value of its own, `Placement`, outside the id.
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
    """Training tokens of a run, and their FLOPs.

    `flops` is the count of `scaling.flops` for shape and tokens under the convention ``6nd``. It is redundant, for
    readers of spec.json; `RunSpec` checks it.
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
    """Learning rate at the last token, as a share of the peak."""
    decay_tokens: NonNegative | None = None
    """Tokens of the final decay of ``wsd``; no meaning for the other kinds."""

    def __post_init__(self) -> None:
        if (self.kind == "wsd") != (self.decay_tokens is not None):
            raise UserError(
                f'schedule "{self.kind}" {"needs" if self.kind == "wsd" else "does not take"} decay_tokens; '
                "only warm-up-stable-decay has a length of its decay."
            )


class DataSpec(Strict, frozen=True):
    """The training tokens, by content: two runs with equal values see the same tokens in the same order."""

    source: str
    """Row of ``scaling.data.sources.registry.SOURCES`` that the shards were made from."""
    manifest: str | None = None
    """SHA-256 of the shards' manifest; None until the data are prepared, and then the run cannot start."""
    repeat: bool = False
    """Repeat the tokens where a run needs more than there are, each epoch in an order of its own."""


class Evaluation(Strict, frozen=True):
    """Measurements of the held-out loss, besides the one at the end. The sequences are the same for every run."""

    tokens: Positive = 131_072
    """Held-out tokens, sampled from the validation split by a fixed permutation (`scaling.data.batches.held_out`)."""
    times: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 4
    """Measurements at equal distances before the last."""
    dynamics: Positive | None = None
    """Number of measurements of update sizes, attention logits and spectra of weights, at equal distances and with the
    last step (`scaling.training.diagnostics`); None measures none. The run's other numbers do not change."""


class WarmStart(Strict, frozen=True):
    """Initial weights from another finished run, whose directory is beside the run's own."""

    run: str
    """Id of that run, which is a hash of its whole specification."""
    method: Literal["copy", "upcycle"] = "copy"
    """``copy`` takes every weight unchanged; ``upcycle`` makes every expert a copy of the feed-forward."""
    count_flops: bool = True
    """Count that run's FLOPs in this run's record, which lists them separately."""


class RunSpec(Strict, frozen=True):
    """Everything that decides the numbers of one run.

    Raises:
        UserError: The batch is not a whole number of sequences, the budget is less than one batch, or `budget.flops` is
            not the count for shape and tokens.
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
    """Initial weights from another run; None draws them from the seed."""
    branch_of: str | None = None
    """Id of a longer ``wsd`` run that this one shares its steps with up to the start of its own decay. It may start
    from that run's checkpoint (`scaling.training.warm_start`); its numbers are those of the run trained whole."""

    def __post_init__(self) -> None:
        context = self.model.context
        if self.batch_tokens % context:
            raise UserError(
                f"batch_tokens {self.batch_tokens:,} is not a whole number of sequences of context {context:,}; "
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
                "branch_of names a trunk, but the run's own decay starts before its warm-up ends, so they share no "
                "steps. Shorten the warm-up, or remove branch_of."
            )
        counted = train_flops(self.model, self.budget.tokens)
        if counted != self.budget.flops:
            raise UserError(
                f"budget.flops is {self.budget.flops:.6g}, but shape and tokens give {counted:.6g} under the "
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
"""Fields added after the first runs. An id leaves them out where they are None, so earlier runs keep theirs."""


def canonical_json(value: msgspec.Struct) -> bytes:
    """The JSON that ids hash: sorted keys, no spaces, defaults included."""

    def without_absent(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: without_absent(v) for k, v in value.items() if v is not None or k not in ADDED_LATER}

    return msgspec.json.encode(without_absent(msgspec.to_builtins(value)), order="sorted")


def as_dict(value: msgspec.Struct) -> dict[str, Any]:
    """A value as plain builtins, for tables and `--json`."""
    built: dict[str, Any] = msgspec.to_builtins(value)
    return built
