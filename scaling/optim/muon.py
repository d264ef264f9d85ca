"""Muon beside AdamW as one `torch.optim.Optimizer`: a parameter group names its algorithm.

Muon (Keller Jordan; Moonlight, arXiv:2502.16982, Section 2) for a matrix ``W`` with gradient ``G``::

    M <- momentum * M + G
    O  = newton_schulz(momentum * M + G)              with Nesterov, else newton_schulz(M)
    W <- W - lr * (rms * sqrt(max(rows, columns)) * O + weight_decay * W)

`rms` 0.2 gives the update about the size of AdamW's, so that both share one learning rate and one decay. The decay is
not scaled. Everything that is not a matrix inside a block takes AdamW, RMSNorm weights with their decay (Appendix D).

One optimizer and not two, because Lightning counts steps and refuses clipping when there are two. The state is
complete, and tensors only, from the constructor: a checkpoint of step 0 has the keys of every later one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from scaling.errors import UserError
from scaling.optim.distributed.base import Batch, Group, ShardingStrategy, State, gradient
from scaling.optim.distributed.fsdp import local
from scaling.optim.newton_schulz.coefficients import polynomials
from scaling.optim.newton_schulz.iteration import Workspace, orthogonalise_


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with ``algorithm: muon``, fused AdamW for those with ``algorithm: adamw``.

    Args:
        groups: Parameter groups, complete: `params` (names with parameters), `algorithm`, `lr`, `weight_decay`, and
            for muon `view`, `momentum`, `nesterov`, `ns_steps`, `coefficients`, `form`, `ns_dtype`, `rms`, `update_rms`;
            for adamw `betas`, `eps`. `scaling.optim.registry.build` makes them.
        exchange: How the matrices are spread over processes; `scaling.optim.distributed.select.exchange_for` chooses.

    A parameter without a gradient is left alone for that step, decay included, as torch's optimizers do.

    Raises:
        UserError: A parameter is not stored in float32.
    """

    def __init__(self, groups: Iterable[Group], exchange: ShardingStrategy) -> None:
        super().__init__(list(groups), {})
        self.exchange = exchange
        self.workspace = Workspace()
        self._make_state(self.param_groups)

    def _make_state(self, groups: list[Group]) -> None:
        for group in groups:
            _refuse_rounded_weights(group)
        self.exchange.plan(groups)
        for group in groups:
            fresh = self.fresh_matrix_state if group["algorithm"] != "adamw" else _fresh_adamw_state
            for parameter in group["params"]:
                self.state[parameter] = fresh(parameter)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a complete group, with its state; the constructor makes the state of its groups together."""
        # torch's load_state_dict reads this flag to put `step` beside its parameter, where the fused kernel wants it.
        fused = {"fused": True} if param_group["algorithm"] == "adamw" else {}
        super().add_param_group({**param_group, **fused})
        if hasattr(self, "exchange"):
            self._make_state(self.param_groups[-1:])

    def __getstate__(self) -> dict[str, Any]:
        """What `copy.deepcopy` and `pickle` take; torch's own leaves out everything that a subclass adds."""
        return {**super().__getstate__(), "exchange": self.exchange}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "workspace"):  # load_state_dict passes here too
            self.workspace = Workspace()

    def fresh_matrix_state(self, parameter: Tensor) -> State:
        """What is kept of one parameter between steps, before the first: the momentum."""
        return {"momentum": self.exchange.fresh(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["algorithm"] == "adamw":
                if present:
                    self._adamw_step(group, present)
            else:
                for batch in self.exchange.batches(group, present, self.state):
                    self._matrix_step(group, batch)
        return loss

    def _matrix_step(self, group: Group, batch: Batch) -> None:
        x = batch.collect(self._directions(group, batch))
        if len(x):
            steps = polynomials(group["coefficients"], group["ns_steps"])
            orthogonalise_(x, steps, group["form"], self.workspace)
        self.refine(group, x, batch)
        rows, columns = x.shape[-2:]
        if group["update_rms"] == "exact":
            norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
            x.mul_(torch.where(norms > 0, min(rows, columns) ** 0.5 / norms, 0.0))
        updates = batch.deliver(x)
        if x.is_cuda:  # equal formats take one launch for all, mixed ones a launch each
            wide = self.workspace.take("updates", (len(updates), *updates[0].shape), batch.weights[0])
            torch._foreach_copy_(list(wide.unbind()), updates)
            updates = list(wide.unbind())
        scale = group["rms"] * max(rows, columns) ** 0.5
        torch._foreach_mul_(batch.weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(batch.weights, updates, alpha=-group["lr"] * scale)

    def _directions(self, group: Group, batch: Batch) -> Tensor:
        """The momentum after this gradient, or one look further with Nesterov: one part each, ``(parts, r, n)``."""
        parts = [state["momentum"] for state in batch.states]
        x = self.workspace.take("x", (len(parts), *batch.part), batch.weights[0], batch.dtype)
        accumulate = accumulate_in_few_launches if x.is_cuda else accumulate_in_few_passes
        if parts:  # a process may own no matrix of a batch
            accumulate(parts, batch.gradients, x, group["momentum"], group["nesterov"])
        return x

    def refine(self, group: Group, x: Tensor, batch: Batch) -> None:
        """What a relative of Muon does to the orthogonalised matrices ``(k, m, n)``, in place. Muon: nothing."""

    def _adamw_step(self, group: Group, parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            # The shards themselves: AdamW is elementwise, and a DTensor would be dispatched call by call.
            [local(parameter) for parameter in parameters],
            [local(gradient(parameter)) for parameter in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
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

    def state_dict(self) -> dict[str, Any]:
        """The state as one process would have it, whatever the exchange; every process must call it."""
        saved = super().state_dict()
        return self._translated(saved, self.exchange.whole)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over, from a run with any number of processes."""
        super().load_state_dict(self._translated(state_dict, self.exchange.kept))

    def _translated(self, saved: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """A state dict with the state of every matrix parameter changed; the given one is left as it is."""
        state = dict(saved["state"])
        for group, stored in zip(self.param_groups, saved["param_groups"], strict=True):
            if group["algorithm"] == "adamw":
                continue
            for parameter, key in zip(group["params"], stored["params"], strict=True):
                state[key] = {name: change(parameter, value) for name, value in state[key].items()}
        return {**saved, "state": state}


def accumulate_in_few_passes(
    momenta: list[Tensor], gradients: list[Tensor], x: Tensor, factor: float, nesterov: bool
) -> None:
    """Add gradients to momenta and put the directions into the stack `x`, for a CPU.

    It is bound by memory and calls: two fused passes a matrix, the second straight into the stack.
    """
    for momentum, given, place in zip(momenta, gradients, x.unbind(), strict=True):
        torch.add(given, momentum, alpha=factor, out=momentum)
        if nesterov:
            torch.add(given, momentum, alpha=factor, out=place)
        else:
            place.copy_(momentum)


def accumulate_in_few_launches(
    momenta: list[Tensor], gradients: list[Tensor], x: Tensor, factor: float, nesterov: bool
) -> None:
    """The same for a GPU, which is bound by launches while matrices are small."""
    torch._foreach_mul_(momenta, factor)
    torch._foreach_add_(momenta, gradients)
    ahead = torch._foreach_add(gradients, momenta, alpha=factor) if nesterov else momenta
    torch._foreach_copy_(list(x.unbind()), list(ahead))


def _fresh_adamw_state(parameter: Tensor) -> State:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _refuse_rounded_weights(group: Group) -> None:
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{name} is stored in {parameter.dtype}; its small updates would be rounded away (a third of the movement "
                'is left at a learning rate of 2e-5). Keep weights in float32 and compute in bf16: precision = "bf16".'
            )
