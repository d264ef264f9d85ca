"""NorMuon (arXiv:2510.05491, Algorithm 1): Muon whose update gives every row, a neuron's weights, about the same size.

After Newton-Schulz the mean square of each row of ``O`` is averaged over steps and divides the row::

    v <- beta v + (1 - beta) mean(O^2 over columns)        (m, 1)
    O <- O / (sqrt(v) + epsilon)                           (m, n)

The whole is then scaled to the root mean square `rms` exactly (`update_rms` is ``exact``). The average starts at zero
without correction, as in the paper: the common factor cancels in the scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.optim.distributed.base import Batch, Group, ShardingStrategy, State
from scaling.optim.muon import Muon


class NorMuon(Muon):
    """`Muon` for groups that also have `second_moment_beta` and `second_moment_epsilon`."""

    def init_state(self, parameter: Tensor, sharding: ShardingStrategy) -> State:
        """The momentum, and a number for each row."""
        return {
            **super().init_state(parameter, sharding),
            "second_moment": sharding.init_state(parameter, columns=1),
        }

    def refine(self, group: Group, x: Tensor, batch: Batch) -> None:
        """Divide rows by the root of their averaged mean square."""
        shards = [state["second_moment"] for state in batch.states]  # (r, 1) each
        parts = torch.stack(shards) if shards else batch.weights[0].new_zeros(0, batch.part[0], 1)
        second_moment = batch.gather(parts)  # (k, m, 1), beside the matrices that they belong to
        # The squared norm of a row over its length is the mean of its squares; summed in fp32.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
        second_moment.lerp_(mean_square, 1 - group["second_moment_beta"])
        # Rows of one size; the common factor is set by the exact mode of the step that follows.
        x.div_(second_moment.sqrt().add_(group["second_moment_epsilon"]))
        if shards:  # and back to where the state is kept
            torch._foreach_copy_(shards, list(batch.scatter(second_moment).unbind()))
