"""Values in the files of a run: rows of metrics and dynamics, attempts, and the record of a run that is done."""

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
    """One logged step. Losses are in nats per token, and null if not measured or not finite."""

    step: NonNegative
    tokens: NonNegative
    flops: NonNegative
    """Convention ``6nd``."""
    train_loss: NonNegativeFloat | None
    """Mean over the steps since the previous row."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping, at this step."""
    tokens_per_second: NonNegativeFloat
    mfu: float | None
    """Share of the device's peak, convention ``attention``; null if the peak is unknown."""
    validation_loss: NonNegativeFloat | None = None
    load_imbalance: float | None = None
    """With experts: maximum over mean load, in the worst layer of this step. No token is ever dropped."""


class DynamicsRow(Strict, frozen=True):
    """Measurements of one step, by class of parameter (the name without the layer)."""

    step: int
    tokens: int
    update_rms: dict[str, float]
    """Root mean square of the step's update in units of the learning rate, without weight decay."""
    largest_logit: dict[str, float]
    """Largest attention logit of any head over the first held-out sequences, after the step; by attention."""
    svd_entropy: dict[str, float]
    """``-sum p log p / log n`` of a matrix's squared singular values over their sum, mean over a class (Moonlight,
    Section 3.4): 1 where all are equal."""
    clipped_heads: int | None = None
    """Heads that QK-clip has clipped so far, counted once per step; null without QK-clip."""


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
    """The device of a run."""

    name: str
    kind: str
    count: int = 1
    peak_flops: float | None = None
    """Dense peak of one device at the run's precision, in FLOP/s; null if unknown."""


class Code(Strict, frozen=True):
    """The code of a run; `commit` and `dirty` (uncommitted changes) are null without a checkout."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    """Versions of Python and of the libraries that can change a result."""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    """Hashes of the source files that decide a run's numbers (`scaling.run.provenance.code_hashes`), by path."""

    @property
    def digest(self) -> str | None:
        """One hash over `files`; None if none were recorded."""
        text = "".join(f"{name} {self.files[name]}\n" for name in sorted(self.files))
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text else None


class RunRecord(Strict, frozen=True):
    """The result of a run, which all analysis starts from.

    A diverged run has the status ``diverged`` and a null `validation_loss`, never NaN.
    """

    spec: RunSpec
    status: Literal["finished", "diverged"]
    validation_loss: NonNegativeFloat | None
    """Mean over the held-out sample (`Evaluation.tokens`) after the last step, nats per token."""
    train_loss: NonNegativeFloat | None
    """Mean over the last tenth of the steps, nats per token: fresh batches, not the held-out set."""
    tokens: NonNegative
    """Tokens trained on."""
    flops: dict[str, NonNegative]
    """Training FLOPs under every convention of ``scaling.flops.CONVENTIONS``."""
    parameters: dict[str, NonNegative]
    """Parameters by part: embedding, blocks, head, norms, total; and activated, those of the blocks' matrices per token."""
    groups: dict[str, list[str]]
    """Parameter names by the algorithm that updates them."""
    bytes_per_token: float
    """UTF-8 bytes per held-out token; bits per byte are loss / ln 2 / this."""
    seconds: NonNegativeFloat
    """Training time over all attempts, without evaluation and without steps that were repeated."""
    tokens_per_second: NonNegativeFloat
    mfu: float | None
    device: Device
    code: Code
    manifest: str
    """SHA-256 of the manifest of the shards (`scaling.data.shards.manifest_hash`)."""
    attempts: int
    finished_at: float
    reason: str | None = None
    """Why the run ended early: where and at which learning rate it diverged."""
    initial_flops: dict[str, int] = msgspec.field(default_factory=dict)
    """Part of `flops` that was charged for the run whose weights this one started from, by convention."""
    peak_memory: int | None = None
    """Peak bytes of one process in the last attempt: of tensors on a GPU, of the process on a CPU."""
    optimizer_seconds: float | None = None
    """Duration of clipping and optimizer step, mean over the timed steps of the last attempt."""
    attention: str | None = None
    """Name of the chosen attention kernel; null if the choice was torch's."""
    optimizer_flops: int | None = None
    """FLOPs of the matrix products of all optimizer steps (`scaling.optim.optimizer_flops`), which `flops` excludes."""
    cpu_seconds: float | None = None
    """CPU time during `seconds`, over all threads of the first process: on a shared machine more reliable than `seconds`."""
    weights_sha256: str | None = None
    """SHA-256 of weights.safetensors, which readers of the weights check; null in records of earlier versions."""

    def __post_init__(self) -> None:
        """Reject a record that no run can have written; msgspec reports a ValueError as an invalid value."""
        if self.status == "finished" and self.validation_loss is None:
            raise ValueError("status is finished, and validation_loss is null")
        if missing := sorted(CONVENTIONS.keys() - self.flops.keys()):
            raise ValueError(f"flops has no count under the convention {missing[0]}")
