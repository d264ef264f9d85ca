"""What a run writes about itself: metrics, attempts, and the record of a completed run."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from scaling.flops import CONVENTIONS
from scaling.spec import NonNegative, RunSpec, Strict

NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0.0)]

RunState = Literal["planned", "queued", "running", "finished", "diverged", "failed", "preempted"]
"""State of a run. `scaling.run.directory.RunDirectory.state` derives it from files and never returns ``queued``;
`sweeps.reporting.status` sets that, and ``running`` on other machines, from SLURM's queue."""


class MetricsRow(Strict, frozen=True):
    """One logged step. Losses in nats per token; a loss that was not measured, or is not finite, is null."""

    step: NonNegative
    tokens: NonNegative
    flops: NonNegative
    """Convention ``6nd``."""
    train_loss: NonNegativeFloat | None
    """Mean over the steps since the row before."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping, at this step."""
    tokens_per_second: NonNegativeFloat
    mfu: float | None
    """Share of the device's peak, convention ``attention``; null where no peak is known."""
    validation_loss: NonNegativeFloat | None = None
    load_imbalance: float | None = None
    """With experts: load of the busiest over the mean, in the worst layer of this step; no token is ever dropped."""


class DynamicsRow(Strict, frozen=True):
    """What one step did to the weights, and what they are after it; by class of matrix, which layers share."""

    step: int
    tokens: int
    update_rms: dict[str, float]
    """Root mean square of the step's update in units of the learning rate, decay left out; by class of parameter."""
    largest_logit: dict[str, float]
    """Largest attention logit of any head over the first held-out windows, after the step; by attention."""
    svd_entropy: dict[str, float]
    """``-sum p log p / log n`` of a matrix's squared singular values over their sum, mean over a class (Moonlight,
    Section 3.4): 1 where all are equal."""
    clipped_heads: int | None = None
    """Heads that QK-clip has shrunk so far, counted once a step; null without it."""


class Attempt(Strict, frozen=True):
    """One line of attempts.jsonl, the history of a run."""

    event: Literal["start", "end", "exit"]
    """``start`` and ``end`` of an attempt; ``exit`` of its job, which the hook after a SLURM job writes."""
    time: float
    """Seconds since the epoch."""
    host: str
    pid: int
    step: int
    """Optimizer step that the attempt started from, or had reached."""
    outcome: Literal["finished", "diverged", "failed", "preempted"] | None = None
    reason: str | None = None
    """Why the attempt failed, as a sentence."""
    job: str | None = None
    """The scheduler's job id; null without a scheduler."""
    exit_status: int | None = None
    """With ``exit``: status of the job's process, 128 plus the signal if one killed it."""
    node: str | None = None
    """With ``exit``: the node, by SLURM's name for it."""
    slurm_state: str | None = None
    """With ``exit``: the job's state, by SLURM's name for it, such as ``NODE_FAIL``."""


class Device(Strict, frozen=True):
    """What a run ran on."""

    name: str
    kind: str
    count: int = 1
    peak_flops: float | None = None
    """Dense peak of one device at the run's precision, in FLOP/s; null where unknown."""


class Code(Strict, frozen=True):
    """Which code ran: commit and whether the tree had uncommitted changes; null where there was no checkout."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    """Python and the libraries whose numbers reach the result."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Hashes of the source files that decide a run's numbers (`scaling.run.provenance.code_hashes`), by path."""

    @property
    def digest(self) -> str | None:
        """One hash over `files`; None where none were recorded."""
        text = "".join(f"{name} {self.files[name]}\n" for name in sorted(self.files))
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text else None


class RunRecord(Strict, frozen=True):
    """What a run was and what came out; the centre of everything that is analysed later.

    A diverged run has `validation_loss` null and status ``diverged``: never NaN.
    """

    spec: RunSpec
    status: Literal["finished", "diverged"]
    validation_loss: NonNegativeFloat | None
    """Mean over the sampled held-out tokens (`Evaluation.tokens`) after the last step, nats per token."""
    train_loss: NonNegativeFloat | None
    """Mean over the last tenth of the steps, nats per token: fresh batches, not the held-out set."""
    tokens: NonNegative
    """Tokens trained on: whole batches."""
    flops: dict[str, NonNegative]
    """Training FLOPs under every convention of ``scaling.flops.CONVENTIONS``."""
    parameters: dict[str, NonNegative]
    """By part: embedding, blocks, head, norms, total; and activated, the blocks' matrices that one token meets."""
    groups: dict[str, list[str]]
    """Parameter names by the algorithm that updates them."""
    bytes_per_token: float
    """Of the evaluated held-out tokens; bits per byte are loss / ln 2 / this."""
    seconds: NonNegativeFloat
    """Training time of all attempts whose steps were kept, evaluation left out."""
    tokens_per_second: NonNegativeFloat
    mfu: float | None
    device: Device
    code: Code
    manifest: str
    """SHA-256 of the data manifest that was read."""
    attempts: int
    finished_at: float
    reason: str | None = None
    """Why a run ended early: the step and the loss at which it diverged."""
    initial_flops: dict[str, int] = msgspec.field(default_factory=dict)
    """What `flops` includes for the run whose weights this one started from; empty where nothing was charged."""
    peak_memory: int | None = None
    """Most bytes that the last attempt held in one process: on a GPU of tensors, on a CPU of everything."""
    optimizer_seconds: float | None = None
    """Clipping and optimizer step, mean over the steps that were timed in the last attempt."""
    attention: str | None = None
    """Torch's attention kernel by name, where one was chosen; null leaves the choice to torch."""
    optimizer_flops: int | None = None
    """Of all optimizer steps, their matrix products alone (`scaling.optim.optimizer_flops`); in no row of `flops`."""
    cpu_seconds: float | None = None
    """What `seconds` cost the processors, all threads of the run's first process: on a CPU the clock to trust where
    others shared the machine."""
    weights_sha256: str | None = None
    """SHA-256 of weights.safetensors, checked where weights are read; null in records of earlier versions."""

    def __post_init__(self) -> None:
        """Reject a record that no run can have written; msgspec reports a ValueError as a value that is not valid."""
        if self.status == "finished" and self.validation_loss is None:
            raise ValueError("status is finished, and validation_loss is null")
        if missing := sorted(CONVENTIONS.keys() - self.flops.keys()):
            raise ValueError(f"flops has no count under the convention {missing[0]}")
