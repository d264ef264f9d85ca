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
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from scaling.attention import attending_by, chosen_kernel
from scaling.branches import trunk_point
from scaling.data.batches import Batches, held_out
from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import Refusal
from scaling.flops import CONVENTIONS, count_parameters, train_flops, train_flops_per_token
from scaling.initial import charged_flops, load_initial
from scaling.logbook import Logbook
from scaling.memory import is_out_of_memory, out_of_memory, peak_bytes
from scaling.models import build_model
from scaling.models.decoder import Decoder
from scaling.optim import recipes
from scaling.processes import rank_of, shard, share_of_batch, start, strategy_of, whole
from scaling.progress import ProgressLine
from scaling.provenance import describe_code, describe_device
from scaling.records import Device, RunDirectory, RunRecord, write_json
from scaling.resume import AtomicCheckpointIO, ResumePoints, StopRequest, newest_resume_point, step_of
from scaling.schedule import lr_fraction
from scaling.spec import Placement, RunSpec
from scaling.stepclock import StepClock

EVALUATION_TOKENS = 16_384
"""Tokens of one forward pass over the held-out set; the mean does not depend on it but for rounding."""

COMPILED_WHOLE = 50_000_000
"""Activated weights of the blocks up to which a model is compiled in one; larger ones spend little on launches."""


class StepBatches:
    """The run's micro-batches from the trainer's step on, as an endless iterable.

    Lightning fetches one batch ahead, so a loader that remembered its position would come back one late. This one has
    no position: it asks the trainer for the step, and batch k is what `Batches.at` says.
    """

    def __init__(self, batches: Batches, *, micro_batch: int, module: TrainingModule) -> None:
        self.batches = batches
        self.micro_batch = micro_batch
        self.module = module

    def __iter__(self) -> Iterator[Tensor]:
        """Windows of shape ``(micro_batch, context + 1)``, int64."""
        trainer = self.module.trainer
        step, rank, world = trainer.global_step, trainer.global_rank, trainer.world_size
        while True:
            yield from torch.split(torch.from_numpy(self.batches.at(step, rank=rank, world=world)), self.micro_batch)
            step += 1

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step is the trainer's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class TrainingModule(LightningModule):
    """A model, its optimizer and its learning rate under Lightning's automatic optimisation."""

    def __init__(self, spec: RunSpec, placement: Placement, *, load: Callable[[Decoder], None] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.placement = placement
        self.load = load
        self.clock = StepClock()
        self.model = build_model(spec.shape)
        self.model.initialise(spec.seed)
        self.model.recompute = placement.recompute
        self.evaluation_windows = max(1, EVALUATION_TOKENS // spec.shape.context)
        self.last_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.learning_rate = 0.0

    def configure_model(self) -> None:
        """Shard the model if it is to be, then fill it with the weights that it starts from, if it has any."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, precision=self.spec.precision)
        if self.load is not None:
            self.load(self.model)
        if self.placement.compile:
            small = count_parameters(self.spec.shape).activated <= COMPILED_WHOLE
            self.model.compile_in_place(whole=small and self.device_mesh is None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one optimizer that the spec's row builds."""
        return recipes.build(self.spec.optimizer, self.model.named_parameters())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        loss = self.model.loss(batch)
        self.last_loss = loss.detach()
        auxiliary = self.model.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the rate of this step in every group."""
        tokens = (self.trainer.global_step + 1) * self.spec.batch_tokens
        fraction = lr_fraction(self.spec.schedule, tokens, total=self.spec.steps * self.spec.batch_tokens)
        self.learning_rate = self.spec.optimizer.peak_lr * fraction
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
        self.model.end_of_step(self.total_over_processes)
        self.clock.start(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward and step as Lightning does them; the clock ends here, before callbacks evaluate or save."""
        super().optimizer_step(*args, **kwargs)
        self.clock.stop()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by global norm, and keep the norm for the metrics."""
        limit = float("inf") if self.spec.clip_norm is None else self.spec.clip_norm
        self.grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach())

    def total_over_processes(self, value: Tensor) -> Tensor:
        """The sum of a tensor that every process has of its own share of the batch."""
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total

    def mean_over_processes(self, value: Tensor) -> float:
        """The mean of a number that every process has of its own share of the batch."""
        return float(self.trainer.strategy.reduce(value, reduce_op="mean"))


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
    with _expected_warnings():
        trainer = _trainer(spec, placement, directory, micro_batches=share // micro_batch, callbacks=[
            logbook, resume, ProgressLine(spec, name=directory.path.name, bar=progress)
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
        _save_weights(module, directory.weights_file, first=trainer.is_global_zero)
    record = _record(directory, spec, placement, module, logbook, device=device, steps=step, charged=charged)
    record = msgspec.structs.replace(record, attention=kernel.name if kernel else None)
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


def _save_weights(module: TrainingModule, path: Path, *, first: bool) -> None:
    # Not the state as it is: a tied head is named once, and what is recomputed from the shape stays out.
    state = module.model.state_dict()
    named = [name for name, _ in [*module.model.named_parameters(), *module.model.named_buffers()] if name in state]
    weights = {name: whole(state[name].detach()).cpu().contiguous() for name in named}
    if not first:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _record(
    directory: RunDirectory,
    spec: RunSpec,
    placement: Placement,
    module: TrainingModule,
    logbook: Logbook,
    *,
    device: Device,
    steps: int,
    charged: dict[str, int],
) -> RunRecord:
    tokens = steps * spec.batch_tokens
    parameters = count_parameters(spec.shape)
    groups: dict[str, list[str]] = {}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.model.named_parameters()}
    for claimed in recipes.assign(spec.optimizer, shapes):
        groups.setdefault(claimed.algorithm, []).append(claimed.name)
    rate = tokens / max(logbook.watch.seconds, 1e-9)
    peak = device.peak_flops
    return RunRecord(
        spec=spec,
        status="diverged" if logbook.diverged else "finished",
        validation_loss=logbook.validation_loss,
        train_loss=None if logbook.diverged else logbook.train_loss,
        tokens=tokens,
        flops={name: train_flops(spec.shape, tokens, name) + charged.get(name, 0) for name in CONVENTIONS},
        initial_flops=charged,
        peak_memory=peak_bytes(torch.device("cuda" if device.kind == "cuda" else "cpu")),
        optimizer_seconds=module.clock.mean,
        parameters={
            "embedding": parameters.embedding,
            "blocks": parameters.blocks,
            "head": parameters.head,
            "norms": parameters.norms,
            "total": parameters.total,
            "activated": parameters.activated,
        },
        groups=groups,
        bytes_per_token=read_manifest(Path(placement.data)).validation.bytes_per_token,
        seconds=logbook.watch.seconds,
        tokens_per_second=rate,
        mfu=rate * train_flops_per_token(spec.shape, "attention") / (peak * device.count) if peak else None,
        device=device,
        code=describe_code(),
        manifest=str(spec.data.manifest),
        attempts=sum(attempt.event == "start" for attempt in directory.attempts()),
        finished_at=time.time(),
        reason=logbook.diverged,
    )


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
