"""One run, from its directory to its record: `train(run_dir)`.

What is trained is in spec.json, where it runs in placement.json; what came out is record.json, written last. A run that
was stopped at any moment continues from its last checkpoint and ends with the numbers it would have had: batch k is a
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

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer

from scaling.data.batches import Batches, held_out
from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError, os_error_sentence
from scaling.io import write_json
from scaling.run.directory import RunDirectory
from scaling.run.provenance import describe_device
from scaling.run.record import Device, RunRecord
from scaling.spec import Placement, RunSpec
from scaling.training.attention_backend import attending_by, chosen_kernel
from scaling.training.build_record import build_record, save_weights
from scaling.training.checkpoint import AtomicCheckpointIO, Checkpoints, ShutdownRequest, newest_checkpoint, step_of
from scaling.training.diagnostics import Dynamics
from scaling.training.launch import launch_ranks, rank_of, share_of_batch, strategy_of
from scaling.training.memory import is_out_of_memory, out_of_memory
from scaling.training.metrics import MetricsLogger
from scaling.training.module import StepBatches, TrainingModule
from scaling.training.progress import ProgressCallback
from scaling.training.warm_start import charged_flops, load_initial, trunk_checkpoint


def train(run_dir: Path | str, *, progress: bool | None = None) -> RunRecord | None:
    """Train the run of a directory to its end, from its last checkpoint if there is one.

    Args:
        run_dir: A run directory with spec and placement.
        progress: A bar (True), a plain line a minute (False), or what the output is fit for (None).

    Returns:
        The record, also of a run that diverged or was finished before; None if it was asked to stop and can continue.

    Raises:
        UserError: The directory, the data or the placement cannot be used.
    """
    directory = RunDirectory(run_dir)
    if not directory.spec_file.exists():
        raise UserError(
            f"{directory.path}: not a run directory, because it holds no spec.json. "
            "Name a directory under runs/, as scaling submit writes it."
        )
    if directory.placement_file.exists() and rank_of(directory.placement()):
        # Not the run's first process, which keeps its books.
        return directory.record() or train_one_process(run_dir)
    with directory.claim():
        record = directory.record()
        if record is not None:
            return record
        placement = directory.placement()
        try:
            checkpoint = newest_checkpoint(directory.checkpoints) or trunk_checkpoint(directory)
            directory.note("start", step=step_of(checkpoint) if checkpoint else 0)
            if rank_of(placement) is None:
                launch_ranks(directory.path, placement)
                record, step = directory.record(), _last_step(directory)
            else:
                record, step = _train(directory, checkpoint, progress=progress)
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk: `error` is then the one to report
                directory.note("end", step=_last_step(directory), outcome="failed", reason=_sentence(error))
            raise
        directory.note("end", step=step, outcome=record.status if record else "preempted")
        return record


def train_one_process(run_dir: Path | str) -> RunRecord | None:
    """The part that one of several processes has in a run; the first of them writes what is written."""
    directory = RunDirectory(run_dir)
    checkpoint = newest_checkpoint(directory.checkpoints) or trunk_checkpoint(directory)
    return _train(directory, checkpoint, progress=False)[0]


def _last_step(directory: RunDirectory) -> int:
    with contextlib.suppress(UserError):
        row = directory.last_row()
        return row.step if row else 0
    return 0


def _train(directory: RunDirectory, checkpoint: Path | None, *, progress: bool | None) -> tuple[RunRecord | None, int]:
    spec, placement = directory.spec(), directory.placement()
    batches = _open_data(spec, placement)
    _set_threads(placement.threads)
    _quiet()

    share, micro_batch = share_of_batch(spec, placement)
    if placement.graphs and not (placement.compile and micro_batch == share and placement.processes == 1):
        raise UserError(
            "placement: graphs = true needs compile = true, one device and no micro_batch smaller than the batch, "
            "because gradients that are added up over replays would be overwritten. Set them so, or remove graphs."
        )
    charged = charged_flops(directory, spec.warm_start)
    initial = spec.warm_start if checkpoint is None else None
    load = None if initial is None else partial(load_initial, directory, initial)
    module = TrainingModule(spec, placement, load=load)
    device = _device(placement, spec)
    held = held_out(placement.data, context=spec.model.context, tokens=spec.evaluation.tokens).sequences
    at = torch.device("cuda" if device.kind == "cuda" else "cpu")
    kernel = None
    if placement.processes == 1 or at.type == "cpu":  # several processes would have to agree on a measured choice
        kernel = chosen_kernel(directory.path, spec.model, windows=micro_batch, device=at, precision=spec.precision)
    if placement.compile:
        _use_compiler_cache(directory.path.parent.parent / "cache" / "inductor")
    logbook = MetricsLogger(directory, spec, device=device, held_out=held, charged=charged.get("6nd", 0))
    resume = Checkpoints(
        directory.checkpoints,
        seconds=placement.checkpoint_seconds,
        stop=ShutdownRequest(),
        keep=[tokens // spec.batch_tokens for tokens in placement.keep_tokens],
    )
    dynamics = Dynamics(directory, spec, placement, logbook=logbook)
    with _expected_warnings():
        trainer = _trainer(spec, placement, directory, micro_batches=share // micro_batch, callbacks=[
            dynamics, logbook, resume, ProgressCallback(spec, name=directory.path.name, bar=progress)
        ])  # fmt: skip
        try:
            with attending_by(kernel):
                trainer.fit(
                    module,
                    train_dataloaders=StepBatches(batches, micro_batch=micro_batch, module=module),
                    ckpt_path=checkpoint,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(placement, share=share, micro_batch=micro_batch, device=at) from error
    step = trainer.global_step
    if resume.preempted:
        return None, step
    weights = None
    if logbook.diverged is None:
        weights = save_weights(module, directory.weights_file, first=trainer.is_global_zero)
    record = build_record(
        directory,
        module,
        logbook,
        device=device,
        steps=step,
        charged=charged,
        attention=kernel.name if kernel else None,
        weights=weights,
    )
    if trainer.is_global_zero:
        write_json(directory.record_file, record)
    return record, step


def _set_threads(threads: int) -> None:
    # Far too many threads end in a crash of OpenMP, which has no message.
    processors = os.cpu_count() or 1
    if threads > 8 * processors:
        raise UserError(
            f"placement: threads = {threads:,}, and this machine has {processors} processors. "
            f"Set threads to {processors} or less in [placement]."
        )
    torch.set_num_threads(threads)


def _use_compiler_cache(folder: Path) -> None:
    """Keep compiled code beside the runs, so that the second run of a shape finds what the first one compiled.

    torch writes its default, a folder under the temporary one that anybody may make first, into the environment when
    it is imported, and reads the environment at each use. Another value there is the user's, and stays.

    Raises:
        UserError: The folder is another user's, who could put code into it.
    """
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    variable = "TORCHINDUCTOR_CACHE_DIR"
    if cache_dir() == default_cache_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UserError(
                f"{folder}: it is a link or belongs to another user, and compiled code that lies there is executed. Remove "
                f"it, set the environment variable {variable} to a folder of your own, or set compile = false in [placement]."
            )
        folder.chmod(0o700)
        os.environ[variable] = str(folder.absolute())
    # torch keeps precompiled headers under its default whatever the environment says.
    codecache._HEADER_DIR = str(Path(cache_dir()) / "precompiled_headers")


def _open_data(spec: RunSpec, placement: Placement) -> Batches:
    if spec.data.manifest is None:
        raise UserError(
            "this run was planned before its data were prepared, so nobody can say which tokens it would see. "
            "Prepare the data, plan again, and start the run that the new plan names."
        )
    manifest = read_manifest(Path(placement.data))
    if manifest.vocabulary > spec.model.vocabulary:
        raise UserError(
            f"{placement.data}: the tokenizer of these shards has {manifest.vocabulary:,} ids, and the model has rows "
            f"for {spec.model.vocabulary:,}. Set vocabulary = {manifest.vocabulary} in [model] and plan again."
        )
    found = manifest_hash(manifest)
    if found != spec.data.manifest:
        raise UserError(
            f"{placement.data}: these shards have the manifest {found[:12]}, and the run was planned for "
            f"{spec.data.manifest[:12]}. Put the old data back, or plan the campaign again for the new ones."
        )
    return Batches(
        Path(placement.data),
        context=spec.model.context,
        sequences=spec.batch_tokens // spec.model.context,
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
        precision="bf16-mixed" if spec.precision == "bf16" else "32-true",
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


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError):
        return os_error_sentence(error)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


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
        # Under autocast a norm inside latent attention gets bf16 activations and has fp32 parameters.
        warnings.filterwarnings("ignore", message=".*Mismatch dtype between input and weight.*")
        # Lightning 2.6 on torch 2.14 and later.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        yield
