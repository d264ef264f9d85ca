"""Muon over several processes, with the same weights as one process, bit for bit.

`Owners`, for replicated weights (DDP): every matrix has one owner that keeps its momentum and orthogonalises it; the
updates are gathered. State and work are 1 / W of one process's, traffic is one update in the iteration's format (2
bytes a weight in bf16), padding less than one matrix a batch.

`Shards`, for weights whose rows are sharded (FSDP2's `DTensor`): momentum stays with the shard; in each batch the
parts of a matrix meet at its owner by one all-to-all and the update returns by another, 2 bytes a weight each way in
bf16. Stacks of experts are sharded by whole experts and need no traffic.

Nothing is lost on the way, because what travels is already in the format that the iteration computes in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from scaling.errors import Refusal
from scaling.optim.coefficients import newton_schulz_flops
from scaling.optim.exchange import (
    Batch,
    Exchange,
    Group,
    Replicated,
    State,
    by_matrix,
    gradient,
    iteration,
    local_batches,
)
from scaling.optim.views import matrices, row_blocks, split


def exchange_for(parameters: Iterable[Tensor]) -> Exchange:
    """The exchange that fits the parameters: sharded, replicated in several processes, or in one.

    With a process group of more than one process, replicated weights are taken to have equal gradients everywhere,
    as DDP leaves them.
    """
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return Shards()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Owners()
    return Replicated()


def deal(costs: Sequence[tuple[int, int]], processes: int) -> list[int]:
    """An owner for each ``(cost, class)``: dealt round like cards, dearest first, a class in one go.

    Equal matrices differ by at most one between processes, and the last class begins where the one before ended.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index][0], costs[index][1]))
    owners = [0] * len(costs)
    for position, index in enumerate(order):
        owners[index] = position % processes
    return owners


def _classes(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cost and class of matrices by their shape."""
    numbers: dict[tuple[int, int], int] = {}
    return [(newton_schulz_flops(*shape, steps=1), numbers.setdefault(shape, len(numbers))) for shape in shapes]


@dataclass
class _Held:
    """What `Owners` knows of a parameter."""

    view: str
    rows: int
    columns: int
    owners: list[int] = field(default_factory=list)
    """One for each matrix of the parameter."""

    def here(self, rank: int) -> list[int]:
        """Matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]


class Owners:
    """Each matrix of replicated weights has an owner. State of the others' matrices is empty, not missing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self._held: dict[Tensor, _Held] = {}

    def plan(self, groups: list[Group]) -> None:
        """Deal the matrices."""
        every: list[_Held] = []
        for group in groups:
            if group["algorithm"] == "adamw":
                continue
            for parameter in group["params"]:
                count, rows, columns = matrices("parameter", tuple(parameter.shape), group["view"])
                self._held[parameter] = held = _Held(group["view"], rows, columns)
                every += [held] * count
        for held, owner in zip(
            every, deal(_classes([(h.rows, h.columns) for h in every]), self.processes), strict=True
        ):
            held.owners.append(owner)

    def fresh(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros for the matrices owned here: ``(owned, m, n)``."""
        held = self._held[parameter]
        return parameter.new_zeros(len(held.here(self.rank)), held.rows, columns or held.columns)

    def whole(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """Every owner's part, added up: each entry is zero everywhere but at its owner."""
        held = self._held[parameter]
        width = kept.shape[-1]
        total = kept.new_zeros(*parameter.shape[:-1], width)
        for index, matrix in zip(held.here(self.rank), kept, strict=True):
            split(total, held.view)[index].copy_(matrix)
        dist.all_reduce(total, group=self.group)
        return total

    def kept(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The matrices owned here."""
        held = self._held[parameter]
        parts = split(whole, held.view)
        return (
            torch.stack([parts[index] for index in held.here(self.rank)])
            if held.here(self.rank)
            else whole.new_zeros(0, held.rows, whole.shape[-1])
        )

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Chunks of equal matrices, about as many from each owner."""
        classes: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
        for parameter in parameters:
            held = self._held[parameter]
            classes[held.rows, held.columns] += [(parameter, index) for index in range(len(held.owners))]
        for (rows, columns), entries in classes.items():
            dtype, length = iteration(group, rows, columns, parameters[0].device)
            length = max(self.processes, length)
            for start in range(0, len(entries), length):
                yield self._batch(entries[start : start + length], state, dtype)

    def _batch(self, entries: list[tuple[Tensor, int]], state: Mapping[Tensor, State], dtype: torch.dtype) -> Batch:
        by_owner: list[list[tuple[Tensor, int]]] = [[] for _ in range(self.processes)]
        for parameter, index in entries:
            by_owner[self._held[parameter].owners[index]].append((parameter, index))
        counts = [len(owned) for owned in by_owner]
        mine = by_owner[self.rank]
        first = self._held[entries[0][0]]

        def deliver(x: Tensor) -> list[Tensor]:
            padded = x.new_empty(max(counts), *x.shape[1:])
            padded[: len(x)].copy_(x)
            gathered = x.new_empty(self.processes * max(counts), *x.shape[1:])
            dist.all_gather_into_tensor(gathered, padded, group=self.group)
            each = torch.split(gathered, max(counts))
            return [update for count, updates in zip(counts, each, strict=True) for update in updates[:count].unbind()]

        return Batch(
            weights=[split(parameter, first.view)[index] for owned in by_owner for parameter, index in owned],
            gradients=[split(gradient(parameter), first.view)[index] for parameter, index in mine],
            states=[
                {
                    name: kept[self._held[parameter].here(self.rank).index(index)]
                    for name, kept in state[parameter].items()
                }
                for parameter, index in mine
            ],
            part=(first.rows, first.columns),
            dtype=dtype,
            deliver=deliver,
        )


class Shards:
    """Each matrix whose rows are sharded meets at an owner; momentum stays with the shard, as a `DTensor`."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def plan(self, groups: list[Group]) -> None:
        """Deal the parameters.

        Raises:
            Refusal: A parameter is not sharded along its first dimension, and along it alone.
        """
        rows = []
        for group in groups:
            for parameter, name in zip(group["params"], group["param_names"], strict=True):
                if not isinstance(parameter, DTensor) or not _sharded_by_rows(parameter):
                    found = getattr(parameter, "placements", "a plain tensor")
                    raise Refusal(
                        f"{name} is {found}; beside sharded parameters each must be sharded along its first dimension, "
                        "once, as fully_shard leaves it. Shard the whole model with fully_shard."
                    )
                if group["algorithm"] != "adamw" and group["view"] != "experts":
                    rows.append(parameter)
        if rows:
            processes = dist.get_world_size(process_group_of(rows[0]))
            owners = deal(_classes([(p.shape[0], p.shape[1]) for p in rows]), processes)
            self._owner = dict(zip(rows, owners, strict=True))

    def fresh(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros sharded like the parameter."""
        return torch.zeros_like(parameter if columns is None else parameter[..., :columns])

    def whole(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """A `DTensor` knows its whole; torch.distributed.checkpoint reads it."""
        return kept

    def kept(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """A `DTensor` again."""
        return whole

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
                meeting = _Meeting(process_group, rows, blocks, [self._owner[member] for member in chunk])
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


class _Meeting:
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
