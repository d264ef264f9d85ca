"""Learning-rate schedules in tokens, as pure functions.

A schedule is a share of the peak at a number of tokens seen. Nothing is remembered, so a resumed run has the rates it
would have had, and a run on twice the devices has the same rates per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scaling.spec import Schedule

SHAPES: dict[str, Callable[[float, float], float]] = {
    # Each maps (share of the way from the end of warm-up to the end of training, final share) to a share of the peak.
    "cosine": lambda way, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * way)),
    "linear": lambda way, final: 1 + (final - 1) * way,
    "constant": lambda way, final: 1.0,
}


def lr_fraction(schedule: Schedule, tokens: int, *, total: int) -> float:
    """Share of the peak learning rate for the step that ends at `tokens`.

    Counting the step's own tokens makes the first step of a warm-up more than zero, and the last step of a decay end
    exactly on `final_fraction`. A warm-up as long as the run ends at the peak.

    Args:
        schedule: Its kind and its lengths in tokens.
        tokens: Tokens seen when the step is done, in ``(0, total]``.
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
