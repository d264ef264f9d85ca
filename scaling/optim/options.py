"""Options of each optimizer, typed and with their defaults: the table ``options`` of a campaign. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from scaling.io import NonNegativeFloat, PositiveFloat, Size, Small, Strict
from scaling.optim.newton_schulz.coefficients import CoefficientSet, Form

Beta = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class AdamWOptions(Strict, frozen=True):
    """Betas of Moonlight's AdamW (0.9, 0.95: its author, Moonlight issue 23), decay on every parameter."""

    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: PositiveFloat = 1e-8
    qk_clip: PositiveFloat | None = None
    """Bound of attention logits, as in `MatrixOptions`."""


class MatrixOptions(Strict, frozen=True):
    """Options that Muon and its relatives share; those of AdamW beside them begin with ``adamw_``."""

    momentum: Beta = 0.95
    ns_steps: Small = 5
    coefficients: CoefficientSet = "keller"
    form: Form = "standard"
    """``gram`` iterates long matrices by their Gram matrix in fp16 (fp32 on a CPU): fewer products, other rounding."""
    ns_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Format of Newton-Schulz. ``auto`` is bf16 except for small matrices on a CPU (`iteration.SMALL_SIDE`); on a CPU
    without bf16 instructions large ones are faster in ``fp32``."""
    rms: PositiveFloat = 0.2
    """Root mean square that an update is scaled to, in units of the learning rate."""
    head_blocks: Size = 1
    """Row blocks that query, key and value are orthogonalised in: 1, or the number of heads."""
    adamw_beta1: Beta = 0.9
    adamw_beta2: Beta = 0.95
    adamw_epsilon: PositiveFloat = 1e-8
    adamw_lr_factor: PositiveFloat = 1.0
    """Peak learning rate of the AdamW part, as a multiple of the run's."""
    adamw_decay_factor: NonNegativeFloat = 1.0
    """Weight decay of the AdamW part, as a multiple of the run's."""
    qk_clip: PositiveFloat | None = None
    """Bound of attention logits (Kimi K2: 100): after a step, heads above it are scaled down. None bounds nothing."""


class MuonOptions(MatrixOptions, frozen=True):
    """Moonlight's recipe (arXiv:2502.16982, Section 2)."""

    nesterov: bool = True
    update_rms: Literal["nominal", "exact"] = "nominal"
    """``nominal`` scales by ``rms * sqrt(max side)``, which is exact if all singular values are one; ``exact`` measures."""


class NorMuonOptions(MatrixOptions, frozen=True):
    """NorMuon (arXiv:2510.05491, Algorithm 1): rows of the update scaled to one size, then the whole to `rms` exactly."""

    nesterov: bool = False
    second_moment_beta: Beta = 0.95
    second_moment_epsilon: PositiveFloat = 1e-8
