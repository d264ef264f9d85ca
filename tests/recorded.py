"""Records without training: a run's loss is what a function of its spec says."""

from __future__ import annotations

from collections.abc import Callable

from scaling.flops import CONVENTIONS, train_flops
from scaling.io import write_json
from scaling.run.directory import RunDirectory
from scaling.run.record import Code, Device, RunRecord
from scaling.spec import RunSpec

Loss = Callable[[RunSpec], float | None]


def write_record(directory: RunDirectory, spec: RunSpec, loss: float | None) -> None:
    """The record of a finished run, or of a diverged one where the loss is None."""
    tokens = spec.steps * spec.batch_tokens
    record = RunRecord(
        spec=spec,
        status="finished" if loss is not None else "diverged",
        validation_loss=loss,
        train_loss=loss,
        tokens=tokens,
        flops={name: train_flops(spec.model, tokens, name) for name in CONVENTIONS},
        parameters={},
        groups={},
        bytes_per_token=1.0,
        seconds=1.0,
        tokens_per_second=float(tokens),
        mfu=None,
        device=Device(name="none", kind="cpu"),
        code=Code(commit=None, dirty=None, versions={}),
        manifest=str(spec.data.manifest),
        attempts=1,
        finished_at=0.0,
        reason=None if loss is not None else "the loss was not finite",
    )
    write_json(directory.record_file, record)
