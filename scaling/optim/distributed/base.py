"""The interface between a matrix optimizer and its distribution over processes, and the case of one process.

A sharding strategy cuts the matrices of a parameter group into batches of equal shape. In a batch each process holds
*parts*, which are whole matrices or pieces of them, with gradient and state. The optimizer's step is then the same
code for one process, for replicated weights (`ddp`), for one flat buffer (`zero1`) and for sharded rows (`fsdp`)::

    x = directions(parts)             (parts, r, w)    local: momentum after this gradient
    x = batch.gather(x)               (k, m, n)        whole matrices that this process orthogonalises
    x = orthogonalise(x)              (k, m, n)
    updates = batch.scatter_updates(x)                 one for each of batch.weights, shaped like it
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
"""A parameter group of torch: its parameters, its algorithm and its hyper-parameters."""
State = dict[str, Tensor]
"""Optimizer state of one parameter, or of one of its matrices."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Matrices of one shape ``(m, n)`` that take the step together."""

    weights: list[Tensor]
    """Weights that this process updates: matrices ``(m, n)``, or its pieces of them."""
    gradients: list[Tensor]
    """Gradients of the parts whose state is on this process, each of shape `part`."""
    states: list[State]
    """State of the same parts, in the same order."""
    part: tuple[int, int]
    """Rows and columns of a part, ``(r, w)``."""
    dtype: torch.dtype
    """Format of the iteration, and of what is sent between processes."""
    # The defaults of these three are those of a single process: its parts are whole matrices.
    gather: Callable[[Tensor], Tensor] = lambda parts: parts
    """Parts ``(parts, r, w)`` to the whole matrices ``(k, m, w)`` of this process; w need not be the matrices' width."""
    scatter: Callable[[Tensor], Tensor] = lambda matrices: matrices
    """The inverse of `gather`."""
    scatter_updates: Callable[[Tensor], list[Tensor]] = lambda stack: list(stack.unbind())
    """Orthogonalised matrices ``(k, m, n)`` to updates, one for each of `weights`."""


class ShardingStrategy(Protocol):
    """One way of distributing the matrices of an optimizer over processes."""

    def plan(self, matrix_groups: list[Group], other_groups: list[Group]) -> None:
        """Decide which process holds what. Called once for each group, before its state is made."""

    def init_state(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros for the local part of a state tensor shaped like `parameter`, its last dimension `columns` if given."""

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterable[Batch]:
        """All of `parameters`, in the same order in every process. What follows the last batch may be a collective."""

    def gather_state(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """A state tensor as a checkpoint stores it; a collective where state is distributed."""

    def shard_state(self, parameter: Tensor, stored: Tensor) -> Tensor:
        """The local part of a stored state tensor: the inverse of `gather_state`."""


class StateLikeParameters:
    """Base of strategies whose state is placed like its parameter: whole, or a `DTensor` that knows its whole."""

    def init_state(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros like the parameter, sharded as it is."""
        return torch.zeros_like(parameter if columns is None else parameter[..., :columns])

    def gather_state(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """The tensor itself: torch.distributed.checkpoint reads a `DTensor`."""
        return shard

    def shard_state(self, parameter: Tensor, stored: Tensor) -> Tensor:
        """The tensor itself."""
        return stored


class Replicated(StateLikeParameters):
    """Every process, or the only one, computes everything."""

    def plan(self, matrix_groups: list[Group], other_groups: list[Group]) -> None:
        """There is nothing to assign."""

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Chunks of equal matrices."""
        view = group["view"]
        # (weight, gradient, state) of every matrix, as views into the parameters.
        entries: list[tuple[Tensor, Tensor, State]] = []
        for parameter in parameters:
            states = state_by_matrix(state[parameter], view)
            entries += zip(split(parameter, view), split(gradient(parameter), view), states, strict=True)
        return local_batches(group, entries)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that is known to have one."""
    assert parameter.grad is not None
    return parameter.grad


def state_by_matrix(state: State, view: str) -> list[State]:
    """The state of a parameter as one dictionary of tensor views for each of its matrices."""
    parts = zip(*(split(tensor, view) for tensor in state.values()), strict=True)
    return [dict(zip(state, part, strict=True)) for part in parts]


def local_batches(group: Group, matrices: Iterable[tuple[Tensor, Tensor, State]]) -> Iterator[Batch]:
    """Chunks of equal matrices (weight, gradient, state), each whole on this process."""
    # One batched product for all matrices of a shape costs fewer launches than a product each.
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
    for entry in matrices:
        by_shape[entry[0].shape[0], entry[0].shape[1]].append(entry)
    for (rows, columns), entries in by_shape.items():
        dtype, length = iteration_format(group, rows, columns, entries[0][0].device)
        for start in range(0, len(entries), length):  # a chunk fits the cache, with its products
            weights, gradients, states = (list(part) for part in zip(*entries[start : start + length], strict=True))
            yield Batch(weights=weights, gradients=gradients, states=states, part=(rows, columns), dtype=dtype)


def iteration_format(group: Group, rows: int, columns: int, device: torch.device) -> tuple[torch.dtype, int]:
    """Format of the iteration for matrices of one shape, and how many of them make a chunk."""
    dtype = resolve_dtype(group["ns_dtype"], device.type, rows, columns)
    return dtype, chunk_length(rows, columns, dtype, device.type)
