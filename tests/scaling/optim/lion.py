"""Lion (arXiv:2302.06675, Algorithm 2) as another package would add it: one file, one row, nothing of Muon or AdamW."""

import torch
from torch import Tensor

from scaling.io import Strict
from scaling.optim.distributed.base import Group, State
from scaling.optim.optimizer import ElementwiseUpdate
from scaling.optim.options import Beta
from scaling.optim.registry import Algorithm, GroupRule, OptimizerRecipe
from scaling.optim.search_space import SearchRange


class LionOptions(Strict, frozen=True):
    beta1: Beta = 0.9
    beta2: Beta = 0.99


class Lion(ElementwiseUpdate):
    """The sign of an interpolation between momentum and gradient."""

    def init_state(self, parameter: Tensor) -> State:
        return {"momentum": torch.zeros_like(parameter)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            update = state["momentum"].lerp(gradient, 1 - group["beta1"]).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
            state["momentum"].lerp_(gradient, 1 - group["beta2"])


LION = Algorithm(name="lion", update=Lion)
ROW = OptimizerRecipe(
    label="Lion",
    options=LionOptions,
    rules=lambda options: (GroupRule(pattern=".*", algorithm=LION),),
    groups=lambda spec, options: {
        "lion": {
            "lr": spec.peak_lr,
            "weight_decay": spec.weight_decay,
            "beta1": options.beta1,
            "beta2": options.beta2,
        }
    },
    search=(SearchRange(name="peak_lr", scale="log", low=1e-5, high=1e-2, least=1e-7, most=1.0),),
)
