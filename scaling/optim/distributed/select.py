"""Muon over several processes, with the same weights as one process, bit for bit.

What travels between processes is already in the format that Newton-Schulz computes in, so nothing is lost on the way:
`owners` for replicated weights, `shards` for sharded ones, `zero1` for the paper's own scheme.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaling.optim.distributed.base import Replicated, ShardingStrategy
from scaling.optim.distributed.ddp import OwnerSharding
from scaling.optim.distributed.fsdp import RowSharding


def sharding_strategy_for(parameters: Iterable[Tensor]) -> ShardingStrategy:
    """The exchange that fits the parameters: sharded, replicated in several processes, or in one.

    With a process group of more than one process, replicated weights are taken to have equal gradients everywhere,
    as DDP leaves them.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return RowSharding()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return OwnerSharding()
    return Replicated()
