"""Which process orthogonalises which matrix. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.optim.distributed.base import Batch, Group, State, gradient, iteration
from scaling.optim.newton_schulz.coefficients import newton_schulz_flops
from scaling.optim.newton_schulz.views import matrices, split


def assign_owners(shapes: Sequence[tuple[int, int]], processes: int) -> list[int]:
    """An owner for each matrix, by its rows and columns: dealt round like cards, dearest first, a shape in one go.

    Two processes differ by at most one matrix of each shape, and a shape begins where the one before ended.
    """
    order = sorted(range(len(shapes)), key=lambda index: (-newton_schulz_flops(*shapes[index], steps=1), shapes[index]))
    owners = [0] * len(shapes)
    for position, index in enumerate(order):
        owners[index] = position % processes
    return owners


@dataclass
class _Held:
    """What `OwnerSharding` knows of a parameter."""

    view: str
    rows: int
    columns: int
    owners: list[int] = field(default_factory=list)
    """One for each matrix of the parameter."""

    def here(self, rank: int) -> list[int]:
        """Matrices that `rank` owns."""
        return [index for index, owner in enumerate(self.owners) if owner == rank]


class OwnerSharding:
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
        for held, owner in zip(every, assign_owners([(h.rows, h.columns) for h in every], self.processes), strict=True):
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
