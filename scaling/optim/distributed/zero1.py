"""Moonlight's distributed Muon (arXiv:2502.16982, Algorithm 1) as printed: ZeRO-1 over one flat buffer of matrices.

    1 reduce-scatter the gradients       4 orthogonalise every matrix that has a part here
    2 momentum on the local shard        5 keep the local part, apply it
    3 gather the matrices that are cut   6 all-gather the weights

It is here to hold the paper's claims to a count: one buffer of state where AdamW has two, and 1 to 1.25 times AdamW's
traffic, because only matrices cut by the border of a shard are gathered, in two bytes against four. What to train with
are the exchanges of `distributed.py`, which orthogonalise no matrix twice and have checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling.optim.distributed.base import gradient
from scaling.optim.newton_schulz.coefficients import polynomials
from scaling.optim.newton_schulz.iteration import Workspace, orthogonalise_, resolve_dtype


@dataclass(frozen=True)
class _Piece:
    """The part of a matrix that one process keeps, in entries of the flattened matrix."""

    process: int
    start: int
    stop: int


class Zero1Muon:
    """Algorithm 1 for a list of matrices with local, not yet averaged, gradients.

    The weights become views of one flat buffer; each process keeps the momentum of an equal run of its entries.

    Args:
        weights: Matrices, equal in every process.
        options: `momentum`, `nesterov`, `ns_steps`, `coefficients`, `form`, `ns_dtype`, `rms`, `weight_decay`, as in a group of
            `scaling.optim.muon.MuonAdamW`; `update_rms` is nominal.
    """

    def __init__(self, weights: list[nn.Parameter], options: dict[str, Any], group: dist.ProcessGroup | None = None):
        self.weights, self.options, self.group = weights, options, group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.length = -(-sum(weight.numel() for weight in weights) // self.processes)
        self.flat = weights[0].new_zeros(self.length * self.processes, requires_grad=False)
        self.momentum = weights[0].new_zeros(self.length, requires_grad=False)
        self.offsets = []
        offset = 0
        for weight in weights:
            self.flat[offset : offset + weight.numel()] = weight.detach().flatten()
            weight.data = self.flat[offset : offset + weight.numel()].view_as(weight)
            self.offsets.append(offset)
            offset += weight.numel()
        self.workspace = Workspace()

    def pieces(self, index: int) -> list[_Piece]:
        """Who keeps which part of a matrix."""
        first, size = self.offsets[index], self.weights[index].numel()
        processes = range(first // self.length, (first + size - 1) // self.length + 1)
        return [
            _Piece(p, max(first, p * self.length) - first, min(first + size, (p + 1) * self.length) - first)
            for p in processes
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step; collective."""
        gradients = torch.zeros_like(self.flat)
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            gradients[offset : offset + weight.numel()] = gradient(weight).flatten()
        reduced = torch.empty_like(self.momentum)
        dist.reduce_scatter_tensor(reduced, gradients, group=self.group)
        reduced /= self.processes

        factor = self.options["momentum"]
        torch.add(reduced, self.momentum, alpha=factor, out=self.momentum)
        direction = reduced.add_(self.momentum, alpha=factor) if self.options["nesterov"] else self.momentum
        updates = self._orthogonalised(direction)

        start = self.rank * self.length
        shard = self.flat[start : start + self.length].clone()
        shard.mul_(1 - lr * self.options["weight_decay"])
        for offset, update, scale in updates:
            shard[offset : offset + update.numel()].add_(update, alpha=-lr * scale)
        dist.all_gather_into_tensor(self.flat, shard, group=self.group)

    def _orthogonalised(self, direction: Tensor) -> list[tuple[int, Tensor, float]]:
        """Offset in the shard, orthogonalised entries and scale of every matrix that has a part here."""
        here = {index: self.pieces(index) for index in range(len(self.weights))}
        here = {index: pieces for index, pieces in here.items() if any(p.process == self.rank for p in pieces)}
        wholes: dict[int, Tensor] = {}
        transfers = []
        for index, pieces in here.items():
            weight = self.weights[index]
            dtype = resolve_dtype(self.options["ns_dtype"], weight.device.type, weight.shape[0], weight.shape[1])
            wholes[index] = whole = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
            mine = next(piece for piece in pieces if piece.process == self.rank)
            begin = self._offset(index, mine)
            whole[mine.start : mine.stop] = direction[begin : begin + mine.stop - mine.start]
            for piece in pieces:
                if piece.process != self.rank:
                    sent, wanted = whole[mine.start : mine.stop], whole[piece.start : piece.stop]
                    transfers += [
                        dist.P2POp(dist.isend, sent, group=self.group, group_peer=piece.process, tag=index),
                        dist.P2POp(dist.irecv, wanted, group=self.group, group_peer=piece.process, tag=index),
                    ]
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        steps = polynomials(self.options["coefficients"], self.options["ns_steps"])
        updates = []
        for index, whole in wholes.items():
            matrix = whole.view(1, *self.weights[index].shape)
            mine = next(piece for piece in here[index] if piece.process == self.rank)
            made = orthogonalise_(matrix, steps, self.options["form"], self.workspace).flatten()[mine.start : mine.stop]
            scale = self.options["rms"] * max(self.weights[index].shape) ** 0.5
            updates.append((self._offset(index, mine), made, scale))
        return updates

    def _offset(self, index: int, piece: _Piece) -> int:
        """Where a piece begins in the shard of its process."""
        return self.offsets[index] + piece.start - piece.process * self.length
