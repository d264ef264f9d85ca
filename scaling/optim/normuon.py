"""NorMuon (arXiv:2510.05491, Algorithm 1): Muon whose update gives every row, a neuron's weights, about the same size.

After Newton-Schulz the mean square of each row of ``O`` is averaged over steps, ``v <- beta v + (1 - beta) mean(O^2)``,
and the row divided by ``sqrt(v) + epsilon``; the whole is then scaled to the root mean square `rms` exactly. The
average starts at zero without correction, as in the paper: the common factor cancels in the scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.optim.distributed.base import Batch, Group, State
from scaling.optim.muon import MuonAdamW


class NorMuonAdamW(MuonAdamW):
    """`MuonAdamW` with groups that also name `second_moment_beta` and `second_moment_epsilon`."""

    def fresh_matrix_state(self, parameter: Tensor) -> State:
        """The momentum, and a number for each row."""
        return {
            **super().fresh_matrix_state(parameter),
            "second_moment": self.exchange.fresh(parameter, columns=1),
        }

    def refine(self, group: Group, x: Tensor, batch: Batch) -> None:
        """Rows divided by the root of their averaged mean square."""
        kept = [state["second_moment"] for state in batch.states]
        parts = torch.stack(kept) if kept else batch.weights[0].new_zeros(0, batch.part[0], 1)
        second_moment = batch.collect(parts)  # (k, m, 1)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
        second_moment.lerp_(mean_square, 1 - group["second_moment_beta"])
        x.div_(second_moment.sqrt().add_(group["second_moment_epsilon"]))
        if kept:
            torch._foreach_copy_(kept, list(batch.release(second_moment).unbind()))
