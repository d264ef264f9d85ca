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

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from scaling.optim.coefficients import polynomials
from scaling.optim.newton_schulz import Workspace, chunk_length, iterate, normalise, resolve_dtype
from scaling.optim.views import split

Group = dict[str, Any]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with ``algorithm: muon``, fused AdamW for those with ``algorithm: adamw``.

    Args:
        groups: Parameter groups, complete: `params` (names with parameters), `algorithm`, `lr`, `weight_decay`, and
            for muon `view`, `momentum`, `nesterov`, `ns_steps`, `coefficients`, `ns_dtype`, `rms`, `update_rms`;
            for adamw `betas`, `eps`. `scaling.optim.recipes.build` makes them.

    A parameter without a gradient is left alone for that step, decay included, as torch's optimizers do.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__([_with_fused_flag(group) for group in groups], {})
        self.workspace = Workspace()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.fresh_state(parameter, group)

    def fresh_state(self, parameter: Tensor, group: Group) -> dict[str, Tensor]:
        """State of one parameter before the first step."""
        if group["algorithm"] == "muon":
            return {"momentum": torch.zeros_like(parameter)}
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["algorithm"] == "muon":
                self._muon_step(group, present)
            elif present:
                self._adamw_step(group, present)
        return loss

    def _muon_step(self, group: Group, parameters: list[Tensor]) -> None:
        """Equal matrices of the whole group go through Newton-Schulz as one stack, a chunk at a time."""
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            assert parameter.grad is not None
            trio = (parameter, parameter.grad, self.state[parameter]["momentum"])
            for weight, gradient, momentum in zip(*(split(tensor, group["view"]) for tensor in trio), strict=True):
                stacks[weight.shape[0], weight.shape[1]].append((weight, gradient, momentum))
        for (rows, columns), stack in stacks.items():
            device = stack[0][0].device.type
            dtype = resolve_dtype(group["ns_dtype"], device, rows, columns)
            length = chunk_length(rows, columns, dtype, device)
            for start in range(0, len(stack), length):
                weights, gradients, momenta = (list(part) for part in zip(*stack[start : start + length], strict=True))
                directions = self._directions(group, gradients, momenta)
                x = self.workspace.take("x", tuple(directions.shape), directions, dtype)
                updates = iterate(
                    normalise(directions, x), polynomials(group["coefficients"], group["ns_steps"]), self.workspace
                )
                self._apply(group, weights, updates)

    def _directions(self, group: Group, gradients: list[Tensor], momenta: list[Tensor]) -> Tensor:
        """The momentum after this gradient, or one look further with Nesterov: fp32, shape ``(k, m, n)``."""
        factor = group["momentum"]
        stack = self.workspace.take("directions", (len(momenta), *momenta[0].shape), momenta[0])
        torch._foreach_mul_(momenta, factor)
        torch._foreach_add_(momenta, gradients)
        torch.stack(momenta, out=stack)
        if group["nesterov"]:
            stack.mul_(factor)
            torch._foreach_add_(list(stack.unbind()), gradients)
        return stack

    def _apply(self, group: Group, weights: list[Tensor], updates: Tensor) -> None:
        """Decay, then the scaled update."""
        rows, columns = updates.shape[-2:]
        scale = group["rms"] * max(rows, columns) ** 0.5
        if group["update_rms"] == "exact":
            norms = torch.linalg.vector_norm(updates, dim=(-2, -1), keepdim=True, dtype=torch.float32)
            updates = updates * (min(rows, columns) ** 0.5 / norms.clamp_(min=torch.finfo(torch.float32).tiny))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _adamw_step(self, group: Group, parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
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


def _with_fused_flag(group: Group) -> Group:
    # torch's load_state_dict reads this flag to put `step` beside its parameter, where the fused kernel wants it.
    return {**group, "fused": True} if group["algorithm"] == "adamw" else group
