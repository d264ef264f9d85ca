"""Matrices of replicated weights with one owner each: state is divided, and no matrix is orthogonalised twice.

Communication of a batch: DDP has averaged the gradients, so an owner computes its updates without any; then one
all-gather sends every update to every process, 2 bytes an entry in bf16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.optim.distributed.base import Batch, Group, State, gradient, iteration_format
from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.newton_schulz.views import matrices, split


def assign_owners(shapes: Sequence[tuple[int, int]], processes: int) -> list[int]:
    """An owner for each matrix, round-robin in the order of falling cost; equal shapes follow each other.

    Two processes differ by at most one matrix of each shape. The first owner of a shape follows the last owner of the
    shape before, so that rounding does not always favour the same process.
    """
    order = sorted(range(len(shapes)), key=lambda index: (-newton_schulz_flops(*shapes[index], steps=1), shapes[index]))
    owners = [0] * len(shapes)
    # Costs of equal shapes are equal, so going round keeps the sum of each process within one matrix of the others.
    for position, index in enumerate(order):
        owners[index] = position % processes
    return owners


@dataclass
class _OwnedParameter:
    """The matrices of a parameter and their owners."""

    view: str
    rows: int
    columns: int
    owners: list[int] = field(default_factory=list)
    """Owner of each matrix of the parameter."""

    def owned_by(self, rank: int) -> list[int]:
        """Numbers of the matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]


class OwnerSharding:
    """Each matrix of replicated weights has an owner. State of other processes' matrices is empty, not missing."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self._owned: dict[Tensor, _OwnedParameter] = {}

    def plan(self, matrix_groups: list[Group], other_groups: list[Group]) -> None:
        """Assign the matrices of all groups to owners."""
        every: list[_OwnedParameter] = []
        for group in matrix_groups:
            for parameter in group["params"]:
                count, rows, columns = matrices("parameter", tuple(parameter.shape), group["view"])
                self._owned[parameter] = entry = _OwnedParameter(group["view"], rows, columns)
                every += [entry] * count  # once for each matrix: the loop below appends their owners in order
        shapes = [(entry.rows, entry.columns) for entry in every]
        for entry, owner in zip(every, assign_owners(shapes, self.processes), strict=True):
            entry.owners.append(owner)

    def init_state(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros for the matrices that this process owns, ``(owned, m, n)``."""
        entry = self._owned[parameter]
        return parameter.new_zeros(len(entry.owned_by(self.rank)), entry.rows, columns or entry.columns)

    def gather_state(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """The sum of all processes' contributions: each entry is zero everywhere but at its owner."""
        entry = self._owned[parameter]
        total = shard.new_zeros(*parameter.shape[:-1], shard.shape[-1])  # the width of the state, not of the parameter
        for index, matrix in zip(entry.owned_by(self.rank), shard, strict=True):
            split(total, entry.view)[index].copy_(matrix)
        dist.all_reduce(total, group=self.group)
        return total

    def shard_state(self, parameter: Tensor, stored: Tensor) -> Tensor:
        """The matrices that this process owns."""
        entry = self._owned[parameter]
        parts, owned = split(stored, entry.view), entry.owned_by(self.rank)
        if not owned:
            return stored.new_zeros(0, entry.rows, stored.shape[-1])
        return torch.stack([parts[index] for index in owned])

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Chunks of equal matrices, about as many of each owner."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, int]]] = defaultdict(list)
        for parameter in parameters:
            entry = self._owned[parameter]
            by_shape[entry.rows, entry.columns] += [(parameter, index) for index in range(len(entry.owners))]
        for (rows, columns), members in by_shape.items():
            dtype, length = iteration_format(group, rows, columns, parameters[0].device)
            length = max(self.processes, length)  # at least one matrix for each process
            for start in range(0, len(members), length):
                yield self._batch(members[start : start + length], state, dtype)

    def _batch(self, members: list[tuple[Tensor, int]], state: Mapping[Tensor, State], dtype: torch.dtype) -> Batch:
        # The chunk sorted by owner: each process orthogonalises its own section, and updates arrive in this order.
        by_owner: list[list[tuple[Tensor, int]]] = [[] for _ in range(self.processes)]
        for parameter, index in members:
            by_owner[self._owned[parameter].owners[index]].append((parameter, index))
        counts = [len(owned) for owned in by_owner]
        mine = by_owner[self.rank]
        first = self._owned[members[0][0]]

        def all_gather(x: Tensor) -> list[Tensor]:
            # all_gather_into_tensor wants equal sizes: pad to the largest count, then drop the padding.
            padded = x.new_empty(max(counts), *x.shape[1:])
            padded[: len(x)].copy_(x)
            gathered = x.new_empty(self.processes * max(counts), *x.shape[1:])
            dist.all_gather_into_tensor(gathered, padded, group=self.group)
            each = torch.split(gathered, max(counts))
            return [update for count, updates in zip(counts, each, strict=True) for update in updates[:count].unbind()]

        return Batch(
            # Every process updates all weights, in the order in which the updates arrive: by owner.
            weights=[split(parameter, first.view)[index] for owned in by_owner for parameter, index in owned],
            gradients=[split(gradient(parameter), first.view)[index] for parameter, index in mine],
            states=[self._state_of(parameter, index, state[parameter]) for parameter, index in mine],
            part=(first.rows, first.columns),
            dtype=dtype,
            scatter_updates=all_gather,
        )

    def _state_of(self, parameter: Tensor, index: int, state: State) -> State:
        position = self._owned[parameter].owned_by(self.rank).index(index)
        return {name: tensor[position] for name, tensor in state.items()}
