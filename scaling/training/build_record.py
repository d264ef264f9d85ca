"""Results of a run at its end: the weights file and the record."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from scaling.flops import CONVENTIONS, count_parameters, train_flops, train_flops_per_token
from scaling.io import file_sha256
from scaling.optim import registry
from scaling.optim.optimizer_flops import run_optimizer_flops
from scaling.run.directory import RunDirectory
from scaling.run.provenance import describe_code
from scaling.run.record import Device, RunRecord
from scaling.training.launch import full_tensor
from scaling.training.memory import peak_bytes
from scaling.training.metrics import MetricsLogger
from scaling.training.module import TrainingModule

PARTS = ("embedding", "blocks", "head", "norms", "total", "activated")
"""Parts of `scaling.flops.ParamCount` that a record holds."""


def save_weights(module: TrainingModule, path: Path, *, first: bool) -> str | None:
    """Gather and write the weights under the model's names; a collective operation, in which the first process writes.

    Returns:
        SHA-256 of the file; None in the other processes.
    """
    saved = module.model.saved_tensors()
    weights = {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in saved.items()}
    if not first:
        return None
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, temporary, metadata={"format": "pt"})
    digest = file_sha256(temporary)
    temporary.replace(path)
    return digest


def build_record(
    directory: RunDirectory,
    module: TrainingModule,
    metrics: MetricsLogger,
    *,
    device: Device,
    steps: int,
    bytes_per_token: float,
    charged: dict[str, int],
    attention: str | None,
    weights: str | None,
) -> RunRecord:
    """The record of a run that has ended, finished or diverged.

    Args:
        directory: The run's directory.
        module: The trained module.
        metrics: Its metrics.
        device: Where it trained.
        steps: Optimizer steps taken.
        bytes_per_token: UTF-8 bytes per token of the held-out sample.
        charged: FLOPs of the run whose weights it started from, by convention.
        attention: Name of the attention kernel, if one was chosen.
        weights: SHA-256 of the weights file, if there is one.
    """
    spec = module.spec
    tokens = steps * spec.batch_tokens
    parameters = count_parameters(spec.model)
    groups: dict[str, list[str]] = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.model.named_parameters()}
    for claimed in registry.assign(spec.optimizer, shapes):
        groups.setdefault(claimed.algorithm.name, []).append(claimed.name)
    rate = tokens / max(metrics.wall_time.seconds, 1e-9)
    peak = device.peak_flops
    return RunRecord(
        spec=spec,
        status="diverged" if metrics.diverged else "finished",
        validation_loss=metrics.validation_loss,
        train_loss=None if metrics.diverged else metrics.train_loss,
        tokens=tokens,
        flops={name: train_flops(spec.model, tokens, name) + charged.get(name, 0) for name in CONVENTIONS},
        initial_flops=charged,
        optimizer_flops=run_optimizer_flops(spec, tokens),
        attention=attention,
        weights_sha256=weights,
        peak_memory=peak_bytes(torch.device("cuda" if device.kind == "cuda" else "cpu")),
        optimizer_seconds=module.clock.mean,
        parameters={part: getattr(parameters, part) for part in PARTS},
        groups=groups,
        bytes_per_token=bytes_per_token,
        seconds=metrics.wall_time.seconds,
        cpu_seconds=metrics.cpu_time.seconds,
        tokens_per_second=rate,
        mfu=rate * train_flops_per_token(spec.model, "attention") / (peak * device.count) if peak else None,
        device=device,
        code=describe_code(),
        manifest=str(spec.data.manifest),
        attempts=sum(attempt.event == "start" for attempt in directory.attempts()),
        finished_at=time.time(),
        reason=metrics.diverged,
    )
