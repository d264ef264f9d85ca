"""Moonlight's distributed Muon (arXiv:2502.16982, Algorithm 1): ZeRO-1 over one flat buffer of matrices.

The matrices of a group are laid end to end in one buffer, which is cut into equal shards, one for each process; a
process keeps the momentum of its shard alone. A step is::

    1 average the gradients                    DDP's all-reduce: clipping needs the whole gradient
    2 momentum of the local shard
    3 gather the matrices that are cut         point to point, in the iteration's format
    4 orthogonalise every matrix that has a piece in the local shard
    5 apply the local piece of its update
    6 all-gather the weights                   4 bytes an entry

State is one buffer where AdamW has two, and only matrices that the boundary of two shards cuts are sent. Each process
that has a piece of such a matrix orthogonalises it; `scaling.optim.distributed.ddp` orthogonalises none twice.
Parameters of element-wise algorithms and their state are replicated, as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from scaling.errors import UserError
from scaling.optim.distributed.base import Batch, Group, State, gradient, iteration_format, local_batches
from scaling.optim.newton_schulz.views import matrices, split

ALIGNMENT = 64
"""Shards and parameters start at multiples of so many entries. A kernel on a CPU rounds the last entries of a tensor,
which fill no vector, its own way; so pieces round like the whole matrix."""


def _aligned(entries: int) -> int:
    return -(-entries // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Place:
    """A parameter in the flat buffer of its group."""

    offset: int
    """Its first entry in the buffer."""
    length: int
    """Entries of a shard of that buffer."""

    def pieces(self, start: int, stop: int) -> dict[int, slice]:
        """Entries ``start`` to ``stop`` of the parameter by the process that holds them, counted in the parameter."""
        first, last = self.offset + start, self.offset + stop
        return {
            process: slice(
                max(first, process * self.length) - self.offset, min(last, (process + 1) * self.length) - self.offset
            )
            for process in range(first // self.length, (last - 1) // self.length + 1)
        }


@dataclass(frozen=True)
class _CutMatrix:
    """A matrix whose entries are held by several processes."""

    parameter: Tensor
    start: int
    """Its first entry in the parameter."""
    shape: tuple[int, int]
    pieces: dict[int, slice]


class Zero1Sharding:
    """Equal shards of the flat buffer of each group's matrices; state tensors are flat, ``(local entries,)``."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self._place: dict[Tensor, _Place] = {}

    def plan(self, matrix_groups: list[Group], other_groups: list[Group]) -> None:
        """Lay the parameters of each group end to end."""
        for group in matrix_groups:
            total = sum(_aligned(parameter.numel()) for parameter in group["params"])
            length = _aligned(-(-total // self.processes))
            # Shard p holds the entries from p * length to (p + 1) * length; the end of the last one may be empty.
            offset = 0
            for parameter in group["params"]:
                self._place[parameter] = _Place(offset, length)
                offset += _aligned(parameter.numel())

    def _local(self, parameter: Tensor) -> slice:
        """The entries of a parameter that this process holds; empty where it holds none."""
        return self._place[parameter].pieces(0, parameter.numel()).get(self.rank, slice(0, 0))

    def init_state(self, parameter: Tensor, columns: int | None = None) -> Tensor:
        """Zeros for the local entries."""
        if columns is not None:
            raise UserError(
                'placement: strategy = "zero1" cuts a matrix between any two entries, and this optimizer keeps a number '
                'for each row. Use strategy = "ddp" or "fsdp2".'
            )
        local = self._local(parameter)
        return parameter.new_zeros(local.stop - local.start)

    def gather_state(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """The sum of all processes' contributions: each entry is zero everywhere but at its holder."""
        total = shard.new_zeros(parameter.numel())
        total[self._local(parameter)] = shard
        dist.all_reduce(total, group=self.group)
        return total.view(parameter.shape)

    def shard_state(self, parameter: Tensor, stored: Tensor) -> Tensor:
        """The local entries."""
        return stored.flatten()[self._local(parameter)].clone()

    def batches(self, group: Group, parameters: list[Tensor], state: Mapping[Tensor, State]) -> Iterator[Batch]:
        """Matrices that are cut, one by one, then those that are whole here; after the last the weights are gathered."""
        cut: list[_CutMatrix] = []
        whole: list[tuple[Tensor, Tensor, State]] = []
        for parameter in parameters:
            # Matrices of a parameter (blocks of rows, experts) are contiguous in it, one after another.
            count, rows, columns = matrices("parameter", tuple(parameter.shape), group["view"])
            local = self._local(parameter)
            for index in range(count):
                start = index * rows * columns
                pieces = self._place[parameter].pieces(start, start + rows * columns)
                if len(pieces) > 1:
                    cut.append(_CutMatrix(parameter, start, (rows, columns), pieces))
                elif self.rank in pieces:  # state is flat, and starts at this process's first entry
                    here = slice(start - local.start, start - local.start + rows * columns)
                    states = {name: tensor[here].view(rows, columns) for name, tensor in state[parameter].items()}
                    views = (split(tensor, group["view"])[index] for tensor in (parameter, gradient(parameter)))
                    whole.append((*views, states))  # type: ignore[arg-type]
        # Cut matrices first: they wait for other processes, which are then still at their own cut matrices.
        for matrix in _rounds(cut):
            if self.rank in matrix.pieces:
                yield self._cut_batch(group, matrix, state[matrix.parameter])
        yield from local_batches(group, whole)
        if parameters:
            self._gather_weights(group["params"])

    def _cut_batch(self, group: Group, matrix: _CutMatrix, state: State) -> Batch:
        """One matrix that several processes orthogonalise; each updates its own piece, seen as ``(1, entries)``."""
        mine, first = matrix.pieces[self.rank], self._local(matrix.parameter).start
        here = slice(mine.start - first, mine.stop - first)
        dtype, _ = iteration_format(group, *matrix.shape, matrix.parameter.device)

        def gather(part: Tensor) -> Tensor:  # (1, 1, entries) to (1, m, n)
            flat = part.new_empty(matrix.shape[0] * matrix.shape[1])
            inside = {
                p: flat[piece.start - matrix.start : piece.stop - matrix.start] for p, piece in matrix.pieces.items()
            }
            # Every holder sends its piece of the direction to all others, and then has the whole matrix.
            inside[self.rank].copy_(part.flatten())
            transfers = [
                dist.P2POp(operation, inside[piece], group=self.group, group_peer=process)
                for process in matrix.pieces
                if process != self.rank
                for operation, piece in ((dist.isend, self.rank), (dist.irecv, process))
            ]
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
            return flat.view(1, *matrix.shape)

        def local_update(x: Tensor) -> list[Tensor]:  # (1, m, n) to (1, entries)
            return [x.flatten()[mine.start - matrix.start : mine.stop - matrix.start].view(1, -1)]

        return Batch(
            weights=[matrix.parameter.view(-1)[mine].view(1, -1)],
            gradients=[gradient(matrix.parameter).flatten()[mine].view(1, -1)],
            states=[{name: tensor[here].view(1, -1) for name, tensor in state.items()}],
            part=(1, mine.stop - mine.start),
            dtype=dtype,
            gather=gather,
            scatter_updates=local_update,
        )

    def _gather_weights(self, parameters: list[Tensor]) -> None:
        """Bring every process's updated entries to all processes."""
        length = self._place[parameters[0]].length
        shard = parameters[0].new_zeros(length)
        for parameter in parameters:
            local, start = self._local(parameter), self._place[parameter].offset - self.rank * length
            if local.stop > local.start:
                shard[start + local.start : start + local.stop] = parameter.view(-1)[local]
        # The weights in fp32: the only full-size traffic beside the gradients.
        flat = shard.new_empty(length * self.processes)
        dist.all_gather_into_tensor(flat, shard, group=self.group)
        for parameter in parameters:
            offset = self._place[parameter].offset
            parameter.view(-1).copy_(flat[offset : offset + parameter.numel()])


def _rounds(cut: list[_CutMatrix]) -> list[_CutMatrix]:
    """Cut matrices in an order in which neighbours need not wait for each other: two rounds, in the usual case.

    One order for all processes cannot block. In the order of the buffer, though, process p would wait at its first
    matrix until p - 1 had done its own first, and so on. Matrices of one round have no process in common.
    """
    rounds: list[set[int]] = []
    numbered = []
    for matrix in cut:
        free = (number for number, busy in enumerate(rounds) if not busy & matrix.pieces.keys())
        number = next(free, len(rounds))
        if number == len(rounds):
            rounds.append(set())
        rounds[number] |= matrix.pieces.keys()
        numbered.append((number, matrix))
    return [matrix for _, matrix in sorted(numbered, key=lambda entry: entry[0])]
