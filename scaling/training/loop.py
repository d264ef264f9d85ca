"""Training of one run: `train` reads spec.json and placement.json of a run directory and writes record.json last.

A run that was stopped at any moment continues from its last checkpoint and ends with the numbers of an uninterrupted
run: batch k depends only on the seed and k, the learning rate depends only on tokens, and the checkpoint contains
everything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.attention import sdpa_kernel

from scaling.data.batches import Batches, held_out
from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError, os_error_sentence
from scaling.io import write_json
from scaling.run.directory import RunDirectory
from scaling.run.progress import ProgressReporter
from scaling.run.provenance import describe_device
from scaling.run.record import RunRecord
from scaling.spec import Placement, RunSpec
from scaling.training.attention_backend import chosen_kernel
from scaling.training.build_record import build_record, save_weights
from scaling.training.checkpoint import AtomicCheckpointIO, Checkpoints, newest_checkpoint, step_of
from scaling.training.diagnostics import Dynamics
from scaling.training.launch import launch_ranks, rank_of, share_of_batch, strategy_of
from scaling.training.memory import is_out_of_memory, out_of_memory
from scaling.training.metrics import MetricsLogger
from scaling.training.module import StepBatches, TrainingModule
from scaling.training.shutdown import ShutdownRequest
from scaling.training.warm_start import charged_flops, load_initial, trunk_checkpoint
from scaling.units import human


def train(run_dir: Path | str, *, progress: bool | None = None) -> RunRecord | None:
    """Train a run to its end, from its last checkpoint if there is one.

    Args:
        run_dir: A run directory with spec and placement.
        progress: A bar (True), a line a minute (False), or a bar if stderr is a terminal (None).

    Returns:
        The record, also of a run that diverged or had finished before; None after a shutdown request, which the next
        call continues from.

    Raises:
        UserError: The directory, the data or the placement cannot be used.
    """
    directory = RunDirectory(run_dir)
    if not directory.spec_file.exists():
        raise UserError(
            f"{directory.path}: not a run directory, because it holds no spec.json. "
            "Name a directory under runs/ that scaling submit wrote."
        )
    if directory.placement_file.exists() and rank_of(directory.placement()):
        return directory.record() or train_rank(run_dir)  # only rank 0 locks the run and writes its files
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
                directory.note("end", step=_last_step(directory), outcome="failed", reason=_reason(error))
            raise
        directory.note("end", step=step, outcome=record.status if record else "preempted")
        return record


def train_rank(run_dir: Path | str) -> RunRecord | None:
    """Train in one of several processes of a run, without the bookkeeping of `train`."""
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
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # without its hints on devices and loggers

    share, micro_batch = share_of_batch(spec, placement)
    if placement.graphs and not (placement.compile and micro_batch == share and placement.processes == 1):
        raise UserError(
            "placement: graphs = true needs compile = true, one device and no micro_batch smaller than the batch, "
            "because replays of a graph overwrite accumulated gradients. Set these, or remove graphs."
        )
    charged = charged_flops(directory, spec.warm_start)
    initial = spec.warm_start if checkpoint is None else None
    load = None if initial is None else partial(load_initial, directory, initial)
    module = TrainingModule(spec, placement, load=load)
    cuda = placement.device == "cuda" or (placement.device == "auto" and torch.cuda.is_available())
    at = torch.device("cuda" if cuda else "cpu")
    device = describe_device(at, precision=spec.precision, count=placement.processes)
    sample = held_out(placement.data, context=spec.model.context, tokens=spec.evaluation.tokens)
    kernel = None
    if placement.processes == 1 or at.type == "cpu":  # processes that measure could choose different kernels
        kernel = chosen_kernel(directory.path, spec.model, sequences=micro_batch, device=at, precision=spec.precision)
    if placement.compile:
        _use_compiler_cache(directory.path.parent.parent / "cache" / "inductor")
    metrics = MetricsLogger(directory, spec, device=device, held_out=sample.sequences, charged=charged.get("6nd", 0))
    checkpoints = Checkpoints(
        directory.checkpoints,
        seconds=placement.checkpoint_seconds,
        stop=ShutdownRequest(),
        keep=[tokens // spec.batch_tokens for tokens in placement.keep_tokens],
    )
    dynamics = Dynamics(directory, spec, placement, metrics=metrics)
    reporter = ProgressReporter(directory.path.name, total=spec.steps, unit="steps", bar=progress)
    callback = ProgressCallback(spec, reporter)
    callbacks = [dynamics, metrics, checkpoints, callback]
    with _expected_warnings(), callback.shown:
        trainer = _trainer(spec, placement, directory, micro_batches=share // micro_batch, callbacks=callbacks)
        try:
            with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
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
    if checkpoints.preempted:
        return None, step
    weights = None
    if metrics.diverged is None:
        weights = save_weights(module, directory.weights_file, first=trainer.is_global_zero)
    record = build_record(
        directory,
        module,
        metrics,
        device=device,
        steps=step,
        bytes_per_token=sample.bytes_per_token,
        charged=charged,
        attention=kernel.name if kernel else None,
        weights=weights,
    )
    if trainer.is_global_zero:
        write_json(directory.record_file, record)
    return record, step


class ProgressCallback(Callback):
    """Passes the steps of a run to a `ProgressReporter`, in its first process, until `shown` is closed."""

    def __init__(self, spec: RunSpec, reporter: ProgressReporter) -> None:
        self.spec, self.reporter = spec, reporter
        self.shown = contextlib.ExitStack()
        self._shown_at, self._shown_step = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if trainer.is_global_zero:
            self.shown.enter_context(self.reporter)
            self._shown_at, self._shown_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the step if it will be shown: reading the loss makes the host wait for the GPU."""
        if not trainer.is_global_zero or not self.reporter.due:
            return
        now, step, loss = time.monotonic(), trainer.global_step, float(cast(Any, pl_module).last_loss)
        rate = (step - self._shown_step) * self.spec.batch_tokens / (now - self._shown_at)
        self.reporter.update(step, loss=f"{loss:.4f}", speed=f"{human(rate)} tokens/s")
        self._shown_at, self._shown_step = now, step


def _set_threads(threads: int) -> None:
    # OpenMP crashes without a message if there are far too many threads.
    processors = os.cpu_count() or 1
    if threads > 8 * processors:
        raise UserError(
            f"placement: threads = {threads:,}, and this machine has {processors} processors. "
            f"Set threads to {processors} or less in [placement]."
        )
    torch.set_num_threads(threads)


def _use_compiler_cache(folder: Path) -> None:
    """Keep compiled code next to the runs, so that later runs of the same shape reuse it.

    torch's default is a folder in the temporary directory, which any user can create first. Importing torch writes it to
    the environment, which torch reads at each use. Another value there was set by the user, and is kept.
    """
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    variable = "TORCHINDUCTOR_CACHE_DIR"
    if cache_dir() == default_cache_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UserError(
                f"{folder}: it is a link or belongs to another user, and compiled code in it is executed. Remove "
                f"it, set the environment variable {variable} to a folder of your own, or set compile = false in [placement]."
            )
        folder.chmod(0o700)
        os.environ[variable] = str(folder.absolute())
    # torch ignores the environment for precompiled headers.
    codecache._HEADER_DIR = str(Path(cache_dir()) / "precompiled_headers")


def _open_data(spec: RunSpec, placement: Placement) -> Batches:
    if spec.data.manifest is None:
        raise UserError(
            "this run was planned before its data was prepared, so its tokens are not determined. "
            "Prepare the data, plan again, and start the run of the new plan."
        )
    manifest = read_manifest(Path(placement.data))
    if manifest.vocabulary > spec.model.vocabulary:
        raise UserError(
            f"{placement.data}: the tokenizer of these shards has {manifest.vocabulary:,} ids, and the model has "
            f"{spec.model.vocabulary:,} embeddings. Set vocabulary = {manifest.vocabulary} in [model] and plan again."
        )
    found = manifest_hash(manifest)
    if found != spec.data.manifest:
        raise UserError(
            f"{placement.data}: these shards have the manifest {found[:12]}, and the run was planned for "
            f"{spec.data.manifest[:12]}. Restore the old shards, or plan the campaign again for the new ones."
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
        # Without Lightning's own requeue, whose signal handler saves in the middle of a step.
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


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        return os_error_sentence(error)
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # `should_stop` ends the training early on purpose.
        warnings.filterwarnings("ignore", message=".*Trainer was signaled to stop but the required.*")
        # A single process on a machine that has SLURM.
        warnings.filterwarnings("ignore", message=".*The `srun` command is available.*")
        # Under autocast, norms inside latent attention have bf16 activations and fp32 parameters.
        warnings.filterwarnings("ignore", message=".*Mismatch dtype between input and weight.*")
        # Lightning 2.6 on torch 2.14 and later.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        yield
