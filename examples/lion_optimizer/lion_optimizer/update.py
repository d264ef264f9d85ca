"""The update: one state tensor for each parameter, and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.optim.distributed.base import Group, State
from scaling.optim.optimizer import ElementwiseUpdate


class Lion(ElementwiseUpdate):
    """Lion, arXiv:2302.06675, Algorithm 2.

    With momentum ``m``, gradient ``g``, learning rate ``lr`` and weight decay ``d``::

        c = beta1 * m + (1 - beta1) * g
        w = w - lr * (sign(c) + d * w)
        m = beta2 * m + (1 - beta2) * g
    """

    def init_state(self, parameter: Tensor) -> State:
        """The momentum, shaped like the parameter."""
        return {"momentum": torch.zeros_like(parameter)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """Update parameters and momenta in place; the harness sets ``group["lr"]`` from the schedule before each step."""
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            momentum = state["momentum"]
            direction = momentum.lerp(gradient, 1.0 - group["beta1"]).sign_()
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"])
            momentum.lerp_(gradient, 1.0 - group["beta2"])
