"""One run, from its directory to its record: `train(run_dir)`.

What is trained is in spec.json, where it runs in placement.json; what came out is record.json, written last. A run that
was stopped at any moment continues from its last resume point and ends with the numbers it would have had: batch k is a
function of the seed and k alone, the learning rate is a function of tokens alone, and everything else is in the resume
point.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer

from scaling.attention import attending_by, chosen_kernel
from scaling.branches import trunk_point
from scaling.data.batches import Batches, held_out
from scaling.data.shards import manifest_hash, read_manifest
from scaling.dynamics import Dynamics
from scaling.errors import Refusal
from scaling.initial import charged_flops, load_initial
from scaling.logbook import Logbook
from scaling.memory import is_out_of_memory, out_of_memory
from scaling.module import StepBatches, TrainingModule
from scaling.outcome import record_of, save_weights
from scaling.processes import rank_of, share_of_batch, start, strategy_of
from scaling.progress import ProgressLine
from scaling.provenance import describe_device
from scaling.records import Device, RunDirectory, RunRecord, write_json
from scaling.resume import AtomicCheckpointIO, ResumePoints, StopRequest, newest_resume_point, step_of
from scaling.spec import Placement, RunSpec


def train(run_dir: Path | str, *, progress: bool | None = None) -> RunRecord | None:
    """Train the run of a directory to its end, from its last resume point if there is one.

    Args:
        run_dir: A run directory with spec and placement.
        progress: A bar (True), a plain line a minute (False), or what the output is fit for (None).

    Returns:
        The record, also of a run that diverged or was finished before; None if it was asked to stop and can continue.

    Raises:
        Refusal: The directory, the data or the placement cannot be used.
    """
    directory = RunDirectory(run_dir)
    if not directory.spec_file.exists():
        directory.spec()  # refuses, before the lock file is made in a folder that is not a run's
    if directory.placement_file.exists() and rank_of(directory.placement()):
        # Not the run's first process, which keeps its books.
        return directory.record() or train_one_process(run_dir)
    with directory.claim():
        record = directory.record()
        if record is not None:
            return record
        resume_point = newest_resume_point(directory.checkpoints) or trunk_point(directory)
        directory.note("start", step=step_of(resume_point) if resume_point else 0)
        try:
            if rank_of(directory.placement()) is None:
                start(directory.path, directory.placement())
                record, step = directory.record(), _last_step(directory)
            else:
                record, step = _train(directory, resume_point, progress=progress)
        except BaseException as error:
            rows = directory.metrics()
            directory.note("end", step=rows[-1].step if rows else 0, outcome="failed", reason=_sentence(error))
            raise
        directory.note("end", step=step, outcome=record.status if record else "preempted")
        return record


def train_one_process(run_dir: Path | str) -> RunRecord | None:
    """The part that one of several processes has in a run; the first of them writes what is written."""
    directory = RunDirectory(run_dir)
    resume_point = newest_resume_point(directory.checkpoints) or trunk_point(directory)
    return _train(directory, resume_point, progress=False)[0]


def _last_step(directory: RunDirectory) -> int:
    rows = directory.metrics()
    return rows[-1].step if rows else 0


def _train(
    directory: RunDirectory, resume_point: Path | None, *, progress: bool | None
) -> tuple[RunRecord | None, int]:
    spec, placement = directory.spec(), directory.placement()
    batches = _open_data(spec, placement)
    torch.set_num_threads(placement.threads)
    _quiet()

    share, micro_batch = share_of_batch(spec, placement)
    if placement.graphs and not (placement.compile and micro_batch == share and placement.processes == 1):
        raise Refusal(
            "placement: graphs = true needs compile = true, one device and no micro_batch smaller than the batch, "
            "because gradients that are added up over replays would be overwritten. Set them so, or remove graphs."
        )
    charged = charged_flops(directory, spec.initial)
    initial = spec.initial if resume_point is None else None
    load = None if initial is None else partial(load_initial, directory, initial)
    module = TrainingModule(spec, placement, load=load)
    device = _device(placement, spec)
    held = held_out(placement.data, context=spec.shape.context, tokens=spec.evaluation.tokens)
    at = torch.device("cuda" if device.kind == "cuda" else "cpu")
    kernel = None
    if placement.processes == 1:  # several would have to agree on it; there torch's own choice stands
        kernel = chosen_kernel(directory.path, spec.shape, windows=micro_batch, device=at, precision=spec.precision)
    if placement.compile:
        # Kept beside the runs, so that the second run of a shape finds what the first one compiled.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.path.parent.parent / "cache" / "inductor"))
    logbook = Logbook(directory, spec, device=device, held_out=held, charged=charged.get("6nd", 0))
    resume = ResumePoints(
        directory.checkpoints,
        seconds=placement.checkpoint_seconds,
        stop=StopRequest(),
        keep=[tokens // spec.batch_tokens for tokens in placement.keep_tokens],
    )
    dynamics = Dynamics(directory, spec, placement, logbook=logbook)
    with _expected_warnings():
        trainer = _trainer(spec, placement, directory, micro_batches=share // micro_batch, callbacks=[
            dynamics, logbook, resume, ProgressLine(spec, name=directory.path.name, bar=progress)
        ])  # fmt: skip
        try:
            with attending_by(kernel):
                trainer.fit(
                    module,
                    train_dataloaders=StepBatches(batches, micro_batch=micro_batch, module=module),
                    ckpt_path=resume_point,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(placement, share=share, micro_batch=micro_batch, device=at) from error
    step = trainer.global_step
    if resume.preempted:
        return None, step
    if logbook.diverged is None:
        save_weights(module, directory.weights_file, first=trainer.is_global_zero)
    record = record_of(
        directory,
        module,
        logbook,
        device=device,
        steps=step,
        charged=charged,
        attention=kernel.name if kernel else None,
    )
    if trainer.is_global_zero:
        write_json(directory.record_file, record)
    return record, step


def _open_data(spec: RunSpec, placement: Placement) -> Batches:
    if spec.data.manifest is None:
        raise Refusal(
            "this run was planned before its data were prepared, so nobody can say which tokens it would see. "
            "Prepare the data, plan again, and start the run that the new plan names."
        )
    manifest = read_manifest(Path(placement.data))
    if manifest.vocabulary > spec.shape.vocabulary:
        raise Refusal(
            f"{placement.data}: the tokenizer of these shards has {manifest.vocabulary:,} ids, and the model has rows "
            f"for {spec.shape.vocabulary:,}. Set vocabulary = {manifest.vocabulary} in [model] and plan again."
        )
    found = manifest_hash(manifest)
    if found != spec.data.manifest:
        raise Refusal(
            f"{placement.data}: these shards have the manifest {found[:12]}, and the run was planned for "
            f"{spec.data.manifest[:12]}. Put the old data back, or plan the campaign again for the new ones."
        )
    return Batches(
        Path(placement.data),
        context=spec.shape.context,
        windows=spec.batch_tokens // spec.shape.context,
        seed=spec.seed,
        repeat=spec.data.repeat,
        steps=spec.steps,
    )


def _trainer(
    spec: RunSpec, placement: Placement, directory: RunDirectory, *, micro_batches: int, callbacks: list[Callback]
) -> Trainer:
    return Trainer(
        accelerator={"cuda": "gpu"}.get(placement.device, placement.device),
        devices=placement.devices,
        num_nodes=placement.nodes,
        strategy=strategy_of(placement),
        max_steps=spec.steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        precision=_precision(spec, placement),
        callbacks=callbacks,
        # One requeue, and it is not Lightning's: its handler would save in the middle of a step.
        plugins=[
            AtomicCheckpointIO(),
            SLURMEnvironment(auto_requeue=False)
            if SLURMEnvironment.detect() and "LOCAL_RANK" not in os.environ
            else LightningEnvironment(),
        ],
        default_root_dir=directory.path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def _device(placement: Placement, spec: RunSpec) -> Device:
    cuda = placement.device == "cuda" or (placement.device == "auto" and torch.cuda.is_available())
    return describe_device(torch.device("cuda" if cuda else "cpu"), precision=spec.precision, count=placement.processes)


def _precision(spec: RunSpec, placement: Placement) -> Literal["bf16-mixed", "32-true"]:
    # Sharded weights are cast where they are gathered (`shard`); autocast on top of that would cast twice.
    sharded = placement.processes > 1 and placement.strategy == "fsdp2"
    return "bf16-mixed" if spec.precision == "bf16" and not sharded else "32-true"


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"


def _quiet() -> None:
    """Leave Lightning's hints on devices and loggers out of a log that is read for its numbers."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # The trainer is told by `should_stop`; it has no minimum of epochs to insist on.
        warnings.filterwarnings("ignore", message=".*Trainer was signaled to stop but the required.*")
        # One process, on a machine that happens to have SLURM.
        warnings.filterwarnings("ignore", message=".*The `srun` command is available.*")
        # Lightning 2.6 on torch 2.14 and later.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        yield
