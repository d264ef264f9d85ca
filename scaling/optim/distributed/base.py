"""Who keeps the momentum of which matrix and who orthogonalises it: the seam between Muon and its distribution.

An exchange cuts the parameters of a group into batches of equal matrices. In a batch each process holds *parts*
(whole matrices, or its rows of them) with gradient and state. `Batch.collect` turns parts into the whole matrices
that this process orthogonalises, `Batch.deliver` turns those into the updates of the weights that it holds. For one
process all of it is the same thing (`Replicated`); `distributed.py` has the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scaling.optim.newton_schulz.iteration import chunk_length, resolve_dtype
from scaling.optim.newton_schulz.views import split

Group = dict[str, Any]
State = dict[str, Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """The exchange with oneself."""
    return tensor


def in_order(stack: Tensor) -> list[Tensor]:
    """The matrices of a stack."""
    return list(stack.unbind())


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Equal matrices that take the step together."""

    weights: list[Tensor]
    """What this process updates: matrices ``(m, n)``, or its rows of them."""
    gradients: list[Tensor]
    """Of the parts whose state is here, each of shape `part`."""
    states: list[State]
    """Beside `gradients`."""
    part: tuple[int, int]
    """Rows and columns of a part."""
    dtype: torch.dtype
    """Of the iteration, and of what travels."""
    collect: Callable[[Tensor], Tensor] = unchanged
    """Parts ``(parts, r, w)`` to whole matrices ``(k, m, w)``; w need not be the matrices' width."""
    release: Callable[[Tensor], Tensor] = unchanged
    """The way back."""
    deliver: Callable[[Tensor], list[Tensor]] = in_order
    """Orthogonalised matrices ``(k, m, n)`` to updates, one for each of `weights`."""


class ShardingStrategy(Protocol):
    """One way of spreading Muon over processes."""

    def plan(self, groups: list[Group]) -> None:
        """Take in parameter groups, each of them once and before its state is made."""

    def fresh(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros: what is kept here of a tensor like `parameter`, with another width if `columns` says so."""

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterable[Batch]:
        """All of `parameters`, in an order that is the same in every process."""

    def whole(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """A state tensor as a checkpoint stores it; a collective where it is spread."""

    def kept(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The part of a stored state tensor that stays here: the inverse of `whole`."""


class StateLikeParameters:
    """What exchanges share that keep state as the parameter is kept: whole, or a `DTensor` that knows its whole."""

    def fresh(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros like the parameter, sharded as it is."""
        return torch.zeros_like(parameter if columns is None else parameter[..., :columns])

    def whole(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """As it is: torch.distributed.checkpoint reads a `DTensor`."""
        return kept

    def kept(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """As it is."""
        return whole


class Replicated(StateLikeParameters):
    """Every process, or the only one, does everything."""

    def plan(self, groups: list[Group]) -> None:
        """Nothing to plan."""

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Chunks of equal matrices."""
        view = group["view"]
        entries: list[tuple[Tensor, Tensor, State]] = []
        for parameter in parameters:
            states = by_matrix(state[parameter], view)
            entries += zip(split(parameter, view), split(gradient(parameter), view), states, strict=True)
        return local_batches(group, entries)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that is known to have one."""
    assert parameter.grad is not None
    return parameter.grad


def by_matrix(state: State, view: str) -> list[State]:
    """The state of a parameter as one dictionary of views for each of its matrices."""
    parts = zip(*(split(kept, view) for kept in state.values()), strict=True)
    return [dict(zip(state, part, strict=True)) for part in parts]


def local_batches(group: Group, matrices: Iterable[tuple[Tensor, Tensor, State]]) -> Iterator[Batch]:
    """Chunks of equal matrices (weight, gradient, state), all of them here."""
    classes: dict[tuple[int, int], list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
    for entry in matrices:
        classes[entry[0].shape[0], entry[0].shape[1]].append(entry)
    for (rows, columns), entries in classes.items():
        dtype, length = iteration(group, rows, columns, entries[0][0].device)
        for start in range(0, len(entries), length):
            weights, gradients, states = (list(part) for part in zip(*entries[start : start + length], strict=True))
            yield Batch(weights=weights, gradients=gradients, states=states, part=(rows, columns), dtype=dtype)


def iteration(group: Group, rows: int, columns: int, device: torch.device) -> tuple[torch.dtype, int]:
    """Format of the iteration for a class of matrices, and how many of them make a chunk."""
    dtype = resolve_dtype(group["ns_dtype"], device.type, rows, columns)
    return dtype, chunk_length(rows, columns, dtype, device.type)
