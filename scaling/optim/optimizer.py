"""One `torch.optim.Optimizer` in which each parameter group names its algorithm: Muon beside AdamW, or AdamW alone.

It is one optimizer and not two, because Lightning counts steps and refuses clipping when there are two. The state is
complete, and tensors only, from the constructor on: a checkpoint of step 0 has the keys of every later one.

An algorithm is an `ElementwiseUpdate` or a `MatrixUpdate`. The optimizer gives the first tensors of any shape, the
local shards where they are sharded, and the second batches of whole matrices (`scaling.optim.distributed.base`), so
neither knows how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from scaling.errors import UserError
from scaling.optim.distributed.base import Batch, Group, Replicated, ShardingStrategy, State, gradient
from scaling.optim.distributed.ddp import OwnerSharding
from scaling.optim.distributed.fsdp import RowSharding, local
from scaling.optim.distributed.zero1 import Zero1Sharding
from scaling.optim.newton_schulz.iteration import Workspace


class ElementwiseUpdate:
    """An algorithm that treats every entry alike. Subclasses keep no state of their own."""

    def init_state(self, parameter: Tensor) -> State:
        """State of one parameter before the first step: tensors, made with ``zeros_like`` where they are shaped like it."""
        raise NotImplementedError

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """Update `parameters` and `states` in place; `group` holds ``lr``, ``weight_decay`` and the row's own values."""
        raise NotImplementedError


class MatrixUpdate:
    """An algorithm that treats a matrix as a whole. Subclasses keep no state of their own."""

    def init_state(self, parameter: Tensor, sharding: ShardingStrategy) -> State:
        """State of one parameter before the first step, made with ``sharding.init_state``."""
        raise NotImplementedError

    def step(self, group: Group, batch: Batch, workspace: Workspace) -> None:
        """Update the weights and states of a batch in place."""
        raise NotImplementedError


Update = ElementwiseUpdate | MatrixUpdate


class AdamW(ElementwiseUpdate):
    """torch's fused AdamW, for groups with ``betas`` and ``eps``."""

    def init_state(self, parameter: Tensor) -> State:
        """Two moments and the number of steps."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """One step of all parameters in few kernels."""
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # maxima of the second moment, for amsgrad alone
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class GroupedOptimizer(torch.optim.Optimizer):
    """Every parameter group takes the update that its ``algorithm`` names.

    Args:
        groups: Complete parameter groups, as `scaling.optim.registry.build` makes them: `params` (names with
            parameters), `algorithm`, `view`, `lr`, `weight_decay`, and what the algorithm reads.
        updates: Update by the name of its algorithm.
        sharding: How matrices are distributed over processes.

    A parameter without a gradient keeps its value in that step, without decay, as in torch's optimizers.

    Raises:
        UserError: A parameter is not stored in float32.
    """

    def __init__(self, groups: Iterable[Group], updates: Mapping[str, Update], sharding: ShardingStrategy) -> None:
        self.updates = dict(updates)  # before torch's constructor, which calls add_param_group
        super().__init__(list(groups), {})
        self.sharding = sharding
        self.workspace = Workspace()
        self._make_state(self.param_groups)

    def _make_state(self, groups: list[Group]) -> None:
        for group in groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.dtype != torch.float32:
                    raise UserError(
                        f"{name} is stored in {parameter.dtype}; its small updates would be rounded away (a third of the "
                        "movement is left at a learning rate of 2e-5). Keep weights in float32 and compute in bf16: "
                        'precision = "bf16".'
                    )
        # Owners are assigned to the matrices of all groups at once, so that they share the cost evenly.
        self.sharding.plan([g for g in groups if self._is_matrix(g)], [g for g in groups if not self._is_matrix(g)])
        for group in groups:
            update = self.updates[group["algorithm"]]
            for parameter in group["params"]:
                self.state[parameter] = (
                    update.init_state(parameter, self.sharding)
                    if isinstance(update, MatrixUpdate)
                    else update.init_state(parameter)
                )

    def _is_matrix(self, group: Group) -> bool:
        return isinstance(self.updates[group["algorithm"]], MatrixUpdate)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a complete group with its state; the constructor makes the state of its groups together."""
        # torch's load_state_dict reads this flag to put `step` beside its parameter, where the fused kernel wants it.
        fused = {} if self._is_matrix(param_group) else {"fused": True}
        super().add_param_group({**param_group, **fused})
        if hasattr(self, "sharding"):
            self._make_state(self.param_groups[-1:])

    def __getstate__(self) -> dict[str, Any]:
        """The state for `copy.deepcopy` and `pickle`; torch's own leaves out all that a subclass adds."""
        return {**super().__getstate__(), "updates": self.updates, "sharding": self.sharding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "workspace"):  # load_state_dict calls this method too
            self.workspace = Workspace()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        loss = None
        if closure is not None:  # Lightning computes the loss and its gradients in here
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self.updates[group["algorithm"]]
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if isinstance(update, MatrixUpdate):
                for batch in self.sharding.batches(group, present, self.state):
                    update.step(group, batch, self.workspace)
            elif present:
                # The shards themselves: a `DTensor` would be dispatched call by call, with the same numbers.
                update.step(
                    group,
                    [local(parameter) for parameter in present],
                    [local(gradient(parameter)) for parameter in present],
                    [{name: local(tensor) for name, tensor in self.state[p].items()} for p in present],
                )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as one process would have it, for any sharding; a collective."""
        return self._with_matrix_state(super().state_dict(), self.sharding.gather_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that was saved by any number of processes."""
        super().load_state_dict(self._with_matrix_state(state_dict, self.sharding.shard_state))

    def _with_matrix_state(self, saved: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """A state dict with the state of every matrix parameter changed; the given one stays as it is."""
        # Element-wise state is the same in every process, or a DTensor that the checkpoint can read.
        state = dict(saved["state"])
        for group, stored in zip(self.param_groups, saved["param_groups"], strict=True):
            if self._is_matrix(group):
                for parameter, key in zip(group["params"], stored["params"], strict=True):
                    state[key] = {name: change(parameter, value) for name, value in state[key].items()}
        return {**saved, "state": state}


def sharding_strategy_for(parameters: Iterable[Tensor], *, zero1: bool = False) -> ShardingStrategy:
    """The strategy that fits the parameters; with any, the weights are those of one process, bit for bit.

    Args:
        parameters: All parameters of the optimizer.
        zero1: Distribute replicated weights by Moonlight's Algorithm 1.
    """
    # Sharded rows are recognised by their type, as fully_shard leaves them.
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return RowSharding()
    # Plain tensors are replicated: all processes have equal gradients, as DDP leaves them.
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Zero1Sharding() if zero1 else OwnerSharding()
    return Replicated()
