"""Muon (Keller Jordan; Moonlight, arXiv:2502.16982, Section 2): momentum, orthogonalised matrix by matrix.

One step of all matrices, in one process or many::

    for batch in sharding.batches(group):                  distributed/: equal matrices (m, n), a few MB together
        for each part of a matrix held here, with gradient G and momentum M, (r, w):
            M <- momentum * M + G
            D  = G + momentum * M  if nesterov else M      x, the stack of all D, (parts, r, w)
        x = batch.gather(x)                                (k, m, n), the whole matrices of this process
        x <- x / ||x||                                     newton_schulz/iteration.py
        repeat ns_steps times:
            A  = x x^T                                     (k, s, s), s the shorter side; newton_schulz/matmul.py
            x <- a x + (b A + c A A) x                     a, b, c from newton_schulz/coefficients.py
        refine(x)                                          Muon: nothing; normuon.py: equal sizes of rows
        if update_rms is exact: x <- x * sqrt(s) / ||x||
        for W, O in zip(batch.weights, batch.scatter_updates(x)):
            W <- W - lr * (weight_decay * W + rms * sqrt(max(m, n)) * O)

If all singular values of the orthogonalised matrix are one, its entries have root mean square ``1 / sqrt(max(m, n))``,
so the factor gives the update a root mean square of `rms`. With 0.2, about the size of AdamW's update, both share one
learning rate and one decay. The decay is not scaled. What is not a matrix inside a block takes AdamW, norms with their
decay (Appendix D); the rules are in registry.py.

A relative of Muon is a subclass that overrides `Muon.refine`, and a row of its own in ``OPTIMIZERS``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.optim.distributed.base import Batch, Group, ShardingStrategy, State
from scaling.optim.newton_schulz.coefficients import polynomials
from scaling.optim.newton_schulz.iteration import Workspace, orthogonalise_
from scaling.optim.optimizer import MatrixUpdate


class Muon(MatrixUpdate):
    """Muon for groups with the options of `scaling.optim.options.MuonOptions`."""

    def init_state(self, parameter: Tensor, sharding: ShardingStrategy) -> State:
        """The momentum."""
        return {"momentum": sharding.init_state(parameter)}

    def step(self, group: Group, batch: Batch, workspace: Workspace) -> None:
        """One step of a batch."""
        # Momentum and direction of the local parts, then the whole matrices of this process: (parts, r, w), (k, m, n).
        x = batch.gather(self._directions(group, batch, workspace))
        if len(x):  # a process may own no matrix of a batch
            steps = polynomials(group["coefficients"], group["ns_steps"])
            orthogonalise_(x, steps, group["form"], workspace)
        self.refine(group, x, batch)
        rows, columns = x.shape[-2:]
        if group["update_rms"] == "exact":
            # An orthogonal matrix has Frobenius norm sqrt(min side). Scale to that measured norm; zeros stay zeros.
            norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
            x.mul_(torch.where(norms > 0, min(rows, columns) ** 0.5 / norms, 0.0))
        updates = batch.scatter_updates(x)
        if x.is_cuda:  # equal formats take one launch for all, mixed ones a launch each
            wide = workspace.take("updates", (len(updates), *updates[0].shape), batch.weights[0])
            torch._foreach_copy_(list(wide.unbind()), updates)
            updates = list(wide.unbind())
        # rms * sqrt(max side) gives the update the root mean square `rms` (Moonlight, Section 2.2). Of the whole matrix,
        # though `weights` may be pieces of it. Decoupled decay first, at the plain learning rate.
        scale = group["rms"] * max(rows, columns) ** 0.5
        torch._foreach_mul_(batch.weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(batch.weights, updates, alpha=-group["lr"] * scale)

    def _directions(self, group: Group, batch: Batch, workspace: Workspace) -> Tensor:
        """Momentum after this gradient, or one look further with Nesterov: ``(parts, r, w)`` in the iteration's format."""
        momenta = [state["momentum"] for state in batch.states]
        x = workspace.take("x", (len(momenta), *batch.part), batch.weights[0], batch.dtype)
        accumulate = accumulate_in_few_launches if x.is_cuda else accumulate_in_few_passes
        if momenta:
            accumulate(momenta, batch.gradients, x, group["momentum"], group["nesterov"])
        return x

    def refine(self, group: Group, x: Tensor, batch: Batch) -> None:
        """Change the orthogonalised matrices ``(k, m, n)`` in place. Muon changes nothing."""


def accumulate_in_few_passes(
    momenta: list[Tensor], gradients: list[Tensor], x: Tensor, factor: float, nesterov: bool
) -> None:
    """Add gradients to momenta ``(r, w)`` and write the directions into the stack `x`, for a CPU.

    It is bound by memory and calls: two fused passes a matrix, the second straight into the stack.
    """
    for momentum, given, place in zip(momenta, gradients, x.unbind(), strict=True):
        torch.add(given, momentum, alpha=factor, out=momentum)  # M <- G + factor * M
        if nesterov:
            torch.add(given, momentum, alpha=factor, out=place)  # G + factor * M, with the new M
        else:
            place.copy_(momentum)


def accumulate_in_few_launches(
    momenta: list[Tensor], gradients: list[Tensor], x: Tensor, factor: float, nesterov: bool
) -> None:
    """The same for a GPU, which is bound by launches while matrices are small."""
    torch._foreach_mul_(momenta, factor)
    torch._foreach_add_(momenta, gradients)
    ahead = torch._foreach_add(gradients, momenta, alpha=factor) if nesterov else momenta
    torch._foreach_copy_(list(x.unbind()), list(ahead))
