"""The Lightning module of a run (model, optimizer, learning rate), and the loader of its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from scaling.data.batches import Batches
from scaling.flops import count_parameters
from scaling.models.decoder import Decoder
from scaling.models.registry import build_model
from scaling.optim import registry
from scaling.spec import Placement, RunSpec
from scaling.training.launch import full_tensor, shard
from scaling.training.metrics import OptimizerStepTimer
from scaling.training.schedule import lr_fraction

EVALUATION_TOKENS = 16_384
"""Tokens per forward pass over the held-out set; the mean depends on it only by rounding."""

MAX_PARAMETERS_COMPILED_WHOLE = 50_000_000
"""Activated parameters of the blocks up to which a model is compiled as a whole; a larger one is compiled by block."""


class StepBatches:
    """The micro-batches of a run from the trainer's step to the last one.

    Lightning fetches one batch ahead, so a loader that stored its position would resume one batch late. This one stores
    none: the step is the trainer's, and its batch is `Batches.at`.
    """

    def __init__(self, batches: Batches, *, micro_batch: int, module: TrainingModule) -> None:
        self.batches = batches
        self.micro_batch = micro_batch
        self.module = module

    def __iter__(self) -> Iterator[Tensor]:
        """Sequences of shape ``(micro_batch, context + 1)``, int64; for a GPU read ahead into pinned memory."""
        trainer = self.module.trainer
        rank, world = trainer.global_rank, trainer.world_size
        on_gpu = self.module.device.type == "cuda"

        def fetch(step: int) -> Tensor:
            sequences = torch.from_numpy(self.batches.at(step, rank=rank, world=world))
            return sequences.pin_memory() if on_gpu else sequences

        steps = range(trainer.global_step, self.module.spec.steps)
        # On a CPU a reading thread would only compete with the training for the same cores.
        for sequences in prefetch(fetch, steps) if on_gpu else map(fetch, steps):
            yield from torch.split(sequences, self.micro_batch)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the step is the trainer's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: there is no state."""


def prefetch(fetch: Callable[[int], Tensor], steps: Iterable[int]) -> Iterator[Tensor]:
    """``map(fetch, steps)``, where another thread fetches each item while the previous one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        upcoming: Future[Tensor] | None = None
        for step in steps:
            ready, upcoming = upcoming, reader.submit(fetch, step)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()


class TrainingModule(LightningModule):
    """A model with its optimizer and learning rate, under Lightning's automatic optimisation.

    Args:
        spec: The run.
        placement: Where and how it executes.
        load: Fills the initialised model with other weights, once it is sharded.
    """

    def __init__(self, spec: RunSpec, placement: Placement, *, load: Callable[[Decoder], None] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.placement = placement
        self.load = load
        self.clock = OptimizerStepTimer()
        self.model = build_model(spec.model)
        self.model.initialise(spec.seed)
        self.model.recompute = placement.recompute
        self.evaluation_sequences = max(1, EVALUATION_TOKENS // spec.model.context)
        self.last_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.learning_rate = 0.0

    def configure_model(self) -> None:
        """Shard the model, load initial weights and compile, each if requested."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, precision=self.spec.precision)
        if self.load is not None:
            self.load(self.model)
        if self.placement.compile:
            small = count_parameters(self.spec.model).activated <= MAX_PARAMETERS_COMPILED_WHOLE
            self.model.compile_in_place(whole=small and self.device_mesh is None, graphs=self.placement.graphs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the spec."""
        return registry.build(self.spec.optimizer, self.model.named_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the numbers of parameters in the saved optimizer state by names, so that any strategy can load it.

        The strategies number parameters differently: one process and DDP by parameter group, FSDP2 in the order of
        `named_parameters`. By number, FSDP2 would assign the state of one parameter to another.
        """
        for saved in filter(None, checkpoint["optimizer_states"]):  # empty in all but the first FSDP2 process
            names = {
                number: f"model.{name}"
                for group in saved["param_groups"]
                for number, name in zip(group["params"], group["param_names"], strict=True)
            }
            saved["state"] = {names[number]: state for number, state in saved["state"].items()}
            for group in saved["param_groups"]:
                group["params"] = [names[number] for number in group["params"]]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        if self.placement.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss = self.model.loss(batch)
        self.last_loss = loss.detach()
        auxiliary = self.model.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the learning rate of this step in every group."""
        tokens = (self.trainer.global_step + 1) * self.spec.batch_tokens
        fraction = lr_fraction(self.spec.schedule, tokens, total=self.spec.steps * self.spec.batch_tokens)
        self.learning_rate = self.spec.optimizer.peak_lr * fraction
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction
        self.model.end_of_step(self.total_over_processes)
        self.clock.start(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward and step as in Lightning; stops the clock before callbacks evaluate or save."""
        super().optimizer_step(*args, **kwargs)
        self.clock.stop()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by global norm, and store the norm for the metrics."""
        limit = float("inf") if self.spec.clip_norm is None else self.spec.clip_norm
        self.grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach())

    def total_over_processes(self, value: Tensor) -> Tensor:
        """Sum over processes of a tensor that each computed on its share of the batch."""
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total

    def maximum_over_processes(self, value: Tensor) -> Tensor:
        """Elementwise maximum over processes of a tensor that each computed on its share of the batch."""
        largest: Tensor = self.trainer.strategy.reduce(value, reduce_op="max")
        return largest

    def mean_over_processes(self, value: Tensor) -> float:
        """Mean over processes of a number that each computed on its share of the batch."""
        return float(self.trainer.strategy.reduce(value, reduce_op="mean"))
