"""The sharding strategy of a run. Each trains the weights of one process, bit for bit.

Values are sent between processes in the format in which Newton-Schulz computes, so no precision is lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaling.optim.distributed.base import Replicated, ShardingStrategy
from scaling.optim.distributed.ddp import OwnerSharding
from scaling.optim.distributed.fsdp import RowSharding
from scaling.optim.distributed.zero1 import Zero1Sharding


def sharding_strategy_for(parameters: Iterable[Tensor], *, zero1: bool = False) -> ShardingStrategy:
    """The strategy that fits the parameters: sharded, replicated in several processes, or in one.

    With a process group of more than one process, replicated weights are assumed to have equal gradients everywhere,
    as DDP leaves them.

    Args:
        parameters: All parameters of the optimizer.
        zero1: Distribute replicated weights by Moonlight's Algorithm 1.
    """
    # Sharded rows are recognised by their type, as fully_shard leaves them; plain tensors are equal in all processes.
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return RowSharding()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Zero1Sharding() if zero1 else OwnerSharding()
    return Replicated()
