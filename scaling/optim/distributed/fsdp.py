"""Muon on weights whose rows are sharded (FSDP2's `DTensor`): the parts of a matrix meet at its owner.

Momentum stays with the shard. In each batch one all-to-all brings the directions together and another returns the
updates, 2 bytes a weight each way in bf16. Stacks of experts are sharded by whole experts and need no traffic.
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
    by_matrix,
    gradient,
    iteration,
    local_batches,
)
from scaling.optim.distributed.ddp import assign_owners
from scaling.optim.newton_schulz.views import row_blocks


class RowSharding(StateLikeParameters):
    """Each matrix whose rows are sharded meets at an owner; momentum stays with the shard, as a `DTensor`."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def plan(self, groups: list[Group]) -> None:
        """Deal the parameters.

        Raises:
            UserError: A parameter is not sharded along its first dimension, and along it alone.
        """
        rows = []
        for group in groups:
            for parameter, name in zip(group["params"], group["param_names"], strict=True):
                if not isinstance(parameter, DTensor) or not _sharded_by_rows(parameter):
                    found = getattr(parameter, "placements", "a plain tensor")
                    raise UserError(
                        f"{name} is {found}; beside sharded parameters each must be sharded along its first dimension, "
                        "once, as fully_shard leaves it. Shard the whole model with fully_shard."
                    )
                if group["algorithm"] != "adamw" and group["view"] != "experts":
                    rows.append(parameter)
        if rows:
            processes = dist.get_world_size(process_group_of(rows[0]))
            owners = assign_owners([(p.shape[0], p.shape[1]) for p in rows], processes)
            self._owner |= dict(zip(rows, owners, strict=True))

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Experts where they are; other matrices in chunks with an owner each."""
        if group["view"] == "experts":
            entries: list[tuple[Tensor, Tensor, State]] = []
            for parameter in parameters:
                states = by_matrix({name: local(kept) for name, kept in state[parameter].items()}, "experts")
                entries += zip(local(parameter).unbind(), local(gradient(parameter)).unbind(), states, strict=True)
            yield from local_batches(group, entries)
            return
        classes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            classes[parameter.shape[0], parameter.shape[1]].append(parameter)
        blocks = row_blocks(group["view"])
        for (rows, columns), members in classes.items():
            process_group = process_group_of(members[0])
            dtype, length = iteration(group, rows // blocks, columns, members[0].device)
            length = max(dist.get_world_size(process_group), length // blocks)
            for start in range(0, len(members), length):
                chunk = sorted(members[start : start + length], key=lambda member: self._owner[member])
                meeting = _RowAllToAll(process_group, rows, blocks, [self._owner[member] for member in chunk])
                yield Batch(
                    weights=[local(member) for member in chunk],
                    gradients=[local(gradient(member)) for member in chunk],
                    states=[{name: local(kept) for name, kept in state[member].items()} for member in chunk],
                    part=(meeting.rows[meeting.rank], columns),
                    dtype=dtype,
                    collect=meeting.collect,
                    release=meeting.release,
                    deliver=lambda x, meeting=meeting: list(meeting.release(x).unbind()),  # type: ignore[misc]
                )


class _RowAllToAll:
    """Row shards of equal matrices, one owner each, sorted by owner."""

    def __init__(self, group: dist.ProcessGroup, rows: int, blocks: int, owners: list[int]) -> None:
        self.group, self.blocks = group, blocks
        self.rank, processes = dist.get_rank(group), dist.get_world_size(group)
        self.owned = [owners.count(process) for process in range(processes)]
        # As torch.chunk, and so DTensor, cuts: all but the last of equal height, some perhaps empty.
        height = math.ceil(rows / processes)
        self.rows = [max(0, min(height, rows - height * process)) for process in range(processes)]

    def collect(self, parts: Tensor) -> Tensor:
        """``(matrices, rows here, w)`` to the matrices owned here, cut into their blocks: ``(owned * blocks, m, w)``."""
        width = parts.shape[-1]
        owned = self.owned[self.rank]
        sizes = [owned * rows * width for rows in self.rows]
        arrived = parts.new_empty(sum(sizes))
        sent = [count * self.rows[self.rank] * width for count in self.owned]
        dist.all_to_all_single(arrived, parts.reshape(-1), sizes, sent, group=self.group)
        shards = [
            shard.view(owned, rows, width) for shard, rows in zip(torch.split(arrived, sizes), self.rows, strict=True)
        ]
        return torch.cat(shards, dim=1).view(owned * self.blocks, sum(self.rows) // self.blocks, width)

    def release(self, whole: Tensor) -> Tensor:
        """The inverse of `collect`."""
        width = whole.shape[-1]
        shards = torch.split(whole.view(self.owned[self.rank], sum(self.rows), width), self.rows, dim=1)
        sent = torch.cat([shard.reshape(-1) for shard in shards])
        sizes = [count * self.rows[self.rank] * width for count in self.owned]
        arrived = whole.new_empty(sum(sizes))
        dist.all_to_all_single(arrived, sent, sizes, [shard.numel() for shard in shards], group=self.group)
        return arrived.view(sum(self.owned), self.rows[self.rank], width)


def local(tensor: Tensor) -> Tensor:
    """The shard of a `DTensor` that is here, as a view; a plain tensor is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_by_rows(parameter: DTensor) -> bool:
    others = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    return len(others) == 1 and isinstance(others[0], Shard) and others[0].dim == 0


def process_group_of(parameter: Tensor) -> dist.ProcessGroup:
    """The processes that share a sharded parameter; under HSDP each replica has its own."""
    assert isinstance(parameter, DTensor)
    dimension = next(i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard))
    return parameter.device_mesh.get_group(dimension)
