"""Matrices whose rows are sharded (FSDP2's `DTensor`): an owner orthogonalises each, its state stays with the rows.

Communication of a batch: one all-to-all sends the rows of every direction to the owner of the matrix, another returns
the rows of the updates, 2 bytes an entry each way in bf16. Stacks of experts are sharded by whole experts and need none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from scaling.errors import UserError
from scaling.optim.distributed.base import (
    Batch,
    Group,
    State,
    StateLikeParameters,
    gradient,
    iteration_format,
    local_batches,
    state_by_matrix,
)
from scaling.optim.distributed.ddp import assign_owners
from scaling.optim.newton_schulz.views import row_blocks


class RowSharding(StateLikeParameters):
    """Each matrix whose rows are sharded has an owner that orthogonalises it; momentum is a `DTensor` like its weight."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def plan(self, matrix_groups: list[Group], other_groups: list[Group]) -> None:
        """Assign the sharded matrices to owners."""
        for group in [*matrix_groups, *other_groups]:
            for parameter, name in zip(group["params"], group["param_names"], strict=True):
                if not isinstance(parameter, DTensor) or not _sharded_by_rows(parameter):
                    found = getattr(parameter, "placements", "a plain tensor")
                    raise UserError(
                        f"{name} is {found}; beside sharded parameters each must be sharded along its first dimension, "
                        "once, as fully_shard leaves it. Shard the whole model with fully_shard."
                    )
        sharded = [p for group in matrix_groups if group["view"] != "experts" for p in group["params"]]
        if sharded:
            processes = dist.get_world_size(process_group_of(sharded[0]))
            owners = assign_owners([(p.shape[0], p.shape[1]) for p in sharded], processes)
            self._owner |= dict(zip(sharded, owners, strict=True))

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Experts on the process that holds them; other matrices in chunks with an owner each."""
        if group["view"] == "experts":  # fully_shard divides the stack (E, m, n) along E: whole experts, no traffic
            entries: list[tuple[Tensor, Tensor, State]] = []
            for parameter in parameters:
                states = state_by_matrix({name: local(tensor) for name, tensor in state[parameter].items()}, "experts")
                entries += zip(local(parameter).unbind(), local(gradient(parameter)).unbind(), states, strict=True)
            yield from local_batches(group, entries)
            return
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape[0], parameter.shape[1]].append(parameter)
        # Blocks of rows (heads) are cut by shards too, so a matrix is gathered whole and then split into its blocks.
        blocks = row_blocks(group["view"])
        for (rows, columns), members in by_shape.items():
            process_group = process_group_of(members[0])
            dtype, length = iteration_format(group, rows // blocks, columns, members[0].device)
            length = max(dist.get_world_size(process_group), length // blocks)
            for start in range(0, len(members), length):
                # Sorted by owner, so that the matrices for one process are contiguous in the send buffer.
                chunk = sorted(members[start : start + length], key=lambda member: self._owner[member])
                transfer = _RowAllToAll(process_group, rows, blocks, [self._owner[member] for member in chunk])
                yield Batch(
                    weights=[local(member) for member in chunk],
                    gradients=[local(gradient(member)) for member in chunk],
                    states=[{name: local(tensor) for name, tensor in state[member].items()} for member in chunk],
                    part=(transfer.rows[transfer.rank], columns),
                    dtype=dtype,
                    gather=transfer.gather,
                    scatter=transfer.scatter,
                    scatter_updates=lambda x, transfer=transfer: list(transfer.scatter(x).unbind()),  # type: ignore[misc]
                )


class _RowAllToAll:
    """Rows of equal matrices, sent to one owner each and back; the matrices are sorted by owner."""

    def __init__(self, group: dist.ProcessGroup, rows: int, blocks: int, owners: list[int]) -> None:
        self.group, self.blocks = group, blocks
        self.rank, processes = dist.get_rank(group), dist.get_world_size(group)
        self.owned = [owners.count(process) for process in range(processes)]
        # As torch.chunk, and so DTensor, cuts: all but the last of equal height, some perhaps empty.
        height = math.ceil(rows / processes)
        self.rows = [max(0, min(height, rows - height * process)) for process in range(processes)]

    def gather(self, parts: Tensor) -> Tensor:
        """``(matrices, local rows, w)`` to the matrices owned here, cut into their blocks: ``(owned * blocks, m, w)``."""
        width = parts.shape[-1]
        owned = self.owned[self.rank]
        # From process q come its rows of the matrices owned here; to q go the local rows of the matrices that q owns.
        sizes = [owned * rows * width for rows in self.rows]
        arrived = parts.new_empty(sum(sizes))
        sent = [count * self.rows[self.rank] * width for count in self.owned]
        dist.all_to_all_single(arrived, parts.reshape(-1), sizes, sent, group=self.group)
        # Each process sent its rows of all matrices owned here; put the rows of each matrix below one another.
        shards = [
            shard.view(owned, rows, width) for shard, rows in zip(torch.split(arrived, sizes), self.rows, strict=True)
        ]
        return torch.cat(shards, dim=1).view(owned * self.blocks, sum(self.rows) // self.blocks, width)

    def scatter(self, gathered: Tensor) -> Tensor:
        """The inverse of `gather`: ``(owned * blocks, m, w)`` to ``(matrices, local rows, w)``."""
        width = gathered.shape[-1]
        shards = torch.split(gathered.view(self.owned[self.rank], sum(self.rows), width), self.rows, dim=1)
        sent = torch.cat([shard.reshape(-1) for shard in shards])  # what gather received, in the same order
        sizes = [count * self.rows[self.rank] * width for count in self.owned]
        arrived = gathered.new_empty(sum(sizes))
        dist.all_to_all_single(arrived, sent, sizes, [shard.numel() for shard in shards], group=self.group)
        return arrived.view(sum(self.owned), self.rows[self.rank], width)


def local(tensor: Tensor) -> Tensor:
    """The local shard of a `DTensor`, as a view; a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_by_rows(parameter: DTensor) -> bool:
    others = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    return len(others) == 1 and isinstance(others[0], Shard) and others[0].dim == 0


def process_group_of(parameter: Tensor) -> dist.ProcessGroup:
    """The processes over which a parameter is sharded; under HSDP each replica has its own group."""
    assert isinstance(parameter, DTensor)
    dimension = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    return parameter.device_mesh.get_group(dimension)
