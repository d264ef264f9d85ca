"""Learning-rate schedules: the share of the peak as a pure function of tokens trained on.

It has no state, so a resumed run has the rates of an uninterrupted one, and a run on twice the devices has the same
rates per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scaling.spec import Schedule

SHAPES: dict[str, Callable[[float, float], float]] = {
    # Share of the peak, by the share of the way from the end of warm-up to the end of training, and the final share.
    "cosine": lambda way, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * way)),
    "linear": lambda way, final: 1 + (final - 1) * way,
    "constant": lambda way, final: 1.0,
}


def lr_fraction(schedule: Schedule, tokens: int, *, total: int) -> float:
    """Share of the peak learning rate for the step that ends at `tokens`.

    The step's own tokens count, so the first step of a warm-up has a rate above zero, and the last step of a decay has
    exactly `final_fraction`. A warm-up as long as the run ends at the peak.

    Args:
        schedule: Kind, and lengths in tokens.
        tokens: Tokens trained on after the step, in ``(0, total]``.
        total: Tokens of the whole run.
    """
    if tokens <= schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    if schedule.decay_tokens is not None:
        start = total - schedule.decay_tokens
        if tokens <= start:
            return 1.0
        return SHAPES["linear"]((tokens - start) / schedule.decay_tokens, schedule.final_fraction)
    way = (tokens - schedule.warmup_tokens) / (total - schedule.warmup_tokens)
    return SHAPES[schedule.kind](min(way, 1.0), schedule.final_fraction)
