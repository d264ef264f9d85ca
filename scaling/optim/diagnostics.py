"""Measured sizes of updates, and the spread of the spectra of weights, by class of parameter.

Moonlight scales Muon's update to a root mean square of 0.2 if all singular values become one. They do not: five Keller
steps leave 0.11 to 0.19, and a comparison at one learning rate then ranks sizes instead of directions. So the size is
measured, from the weights before and after a step, for any optimizer and any distribution.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaling.optim.distributed.fsdp import local, process_group_of


def parameter_class(name: str) -> str:
    """The name that parameters of all layers share: ``blocks.3.attention.query.weight`` is of class ``attention.query``."""
    return re.sub(r"(^|\.)blocks\.\d+\.", r"\1", name).removesuffix(".weight")


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of all parameters, or of their local shards, in the order of the optimizer's groups."""
    return [local(parameter).detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def update_rms(optimizer: torch.optim.Optimizer, before: list[Tensor]) -> dict[str, float]:
    """The root mean square of each class's update, since the weights were `before`, one step ago.

    The unit is the learning rate, and the decay is left out: AdamW's usual value is 0.2 to 0.4, Muon's nominal one
    `rms`. Where weights are sharded every process must call it. A class with a learning rate of zero is left out.

    Args:
        optimizer: After the step, its learning rates as they were in it.
        before: What `weights_of` returned before the step; used up.
    """
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    counts: dict[str, int] = defaultdict(int)
    # Root mean square of a class over all its parameters: sums of squares and counts, divided at the end.
    starts = iter(before)
    for group in optimizer.param_groups:
        for name, parameter, start in zip(group["param_names"], group["params"], starts, strict=False):
            if not group["lr"]:
                continue
            # start <- ((1 - lr * decay) * start - now) / lr, the update before the learning rate.
            start.mul_(1 - group["lr"] * group["weight_decay"]).sub_(local(parameter).detach()).div_(group["lr"])
            square = torch.linalg.vector_norm(start, dtype=torch.float64).square()
            if isinstance(parameter, DTensor):  # the shards' sums of squares add up
                dist.all_reduce(square, group=process_group_of(parameter))
            squares[parameter_class(name)] += square.cpu()
            counts[parameter_class(name)] += parameter.numel()
    return {name: float(square / counts[name]) ** 0.5 for name, square in squares.items()}


@torch.no_grad()
def svd_entropy(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Entropy of the squared singular values of the blocks' matrices, the mean of a class: 1 where all are equal.

    ``-sum p log p / log n`` with ``p`` the squared singular values over their sum (Moonlight, Section 3.4). Every
    expert is a matrix of its own; matrices of one row, and those that are not finite, are left out. Sharded weights are
    gathered, so every process must call it. It costs a singular value decomposition a matrix.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.ndim < 2 or min(parameter.shape[-2:]) < 2 or not re.search(r"(^|\.)blocks\.", name):
                continue
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if not torch.isfinite(whole).all():
                continue
            # Energy of each direction, p = s^2 / sum s^2; log n is the entropy of n equal ones.
            values = torch.linalg.svdvals(whole.float())
            shares = values.double().square()
            shares /= shares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
            entropy = torch.special.entr(shares).sum(dim=-1) / math.log(values.shape[-1])
            found[parameter_class(name)].append(entropy.flatten().cpu())
    return {name: float(torch.cat(entropies).mean()) for name, entropies in found.items()}
