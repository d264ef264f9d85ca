"""The size that updates really have, by class of parameter.

Moonlight scales Muon's update to a root mean square of 0.2 if all singular values became one. They do not: five Keller
steps leave 0.11 to 0.19, and a comparison at one learning rate then ranks sizes instead of directions. So it is
measured, from the weights before and after a step, whatever the optimizer and however it is distributed.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaling.optim.shards import local, process_group_of


def parameter_class(name: str) -> str:
    """What parameters of all layers share: ``blocks.3.attention.query.weight`` is of class ``attention.query``."""
    return re.sub(r"(^|\.)blocks\.\d+\.", r"\1", name).removesuffix(".weight")


@contextlib.contextmanager
def measured_updates(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, float]]:
    """A dictionary that holds, after the block, the root mean square of each class's update.

    The unit is the learning rate, and the decay is left out: AdamW's usual value is 0.2 to 0.4, Muon's nominal one
    `rms`. The block is one optimizer step; it costs a copy of the weights, so it belongs at a few chosen steps. Every
    process enters it where weights are sharded. A class with a learning rate of zero is left out.
    """
    found: dict[str, float] = {}
    before = [[local(parameter).detach().clone() for parameter in group["params"]] for group in optimizer.param_groups]
    yield found
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    counts: dict[str, int] = defaultdict(int)
    for group, earlier in zip(optimizer.param_groups, before, strict=True):
        if not group["lr"]:
            continue
        for name, parameter, start in zip(group["param_names"], group["params"], earlier, strict=True):
            start.mul_(1 - group["lr"] * group["weight_decay"]).sub_(local(parameter).detach()).div_(group["lr"])
            square = torch.linalg.vector_norm(start, dtype=torch.float64).square()
            if isinstance(parameter, DTensor):
                dist.all_reduce(square, group=process_group_of(parameter))
            squares[parameter_class(name)] += square.cpu()
            counts[parameter_class(name)] += parameter.numel()
    found.update({name: float(square / counts[name]) ** 0.5 for name, square in squares.items()})
