"""Published numbers of Moonlight with their sources: a reference that every fit must reproduce.

Moonlight (arXiv:2502.16982) prints no table of its losses; the ten stars of its Fig. 1a are read here from the vector
paths of the figure, and so are the two lines through them, whose coefficients the paper prints with four digits.

The stars are read to five decimals, which fixes the exponent of a line through five of them within 2.5e-5 of itself; the
drawn lines give it to seven digits. `moonlight_table` combines both: the losses nearest to the readings, none further than
half a unit of their last digit, through which the authors' lines are the least-squares lines. With ``reconciled=False`` it
returns the readings as they are, and the exponents are 2e-5 larger.
"""

from __future__ import annotations

from analysis.data.table import RunsTable, check_table
from analysis.fitting.laws import PowerLaw

MOONLIGHT_LINES = {
    "adamw": PowerLaw(scale=2.608424, exponent=0.0544148),
    "muon": PowerLaw(scale=2.506192, exponent=0.0515115),
}
"""The lines as drawn in Fig. 1a, unrounded; Table 3 prints 2.608 C^-0.054 and 2.506 C^-0.052."""

MOONLIGHT_LINES_PRINTED = {
    "adamw": PowerLaw(scale=2.608, exponent=0.054),
    "muon": PowerLaw(scale=2.506, exponent=0.052),
}
"""Table 3."""

MOONLIGHT_ARROW = 0.519
"""Printed over the arrow of Fig. 1a."""

MOONLIGHT_PARAMS = (339_000_000, 545_000_000, 822_000_000, 1_100_000_000, 1_500_000_000)
"""N of the compute axis: with these every vertex of Fig. 3 falls on a whole step. Table 2 prints 399M for the first."""

MOONLIGHT_BATCH = (96, 128, 160, 192, 256)
"""Sequences of 8192 tokens, Table 2."""

MOONLIGHT_STEPS = (11_333, 13_377, 15_829, 18_132, 18_523)
"""Last steps of Fig. 3. A star is the mean training loss of the last 80 steps, drawn at the middle of them."""

MOONLIGHT_READ = {
    "adamw": (2.85098, 2.68139, 2.58855, 2.50197, 2.42079),
    "muon": (2.72554, 2.57440, 2.48753, 2.40801, 2.33587),
}
"""Losses of the stars as read, nats per token."""

MOONLIGHT_LOSSES = {
    "adamw": (2.8509751, 2.6813882, 2.5885508, 2.5019727, 2.4207944),
    "muon": (2.7255359, 2.5743985, 2.4875306, 2.4080121, 2.3358735),
}
"""`MOONLIGHT_READ` with further digits, chosen so that the drawn lines are the least-squares lines."""


def moonlight_table(*, reconciled: bool = True) -> RunsTable:
    """Moonlight's ten runs as a checked table: five sizes, each once with AdamW and once with Muon.

    `flops` are ``6 N`` per token with the N of the compute axis, up to the middle of the last 80 steps. The loss is a
    training loss: the paper gives no held-out one.
    """
    import pandas as pd

    losses = MOONLIGHT_LOSSES if reconciled else MOONLIGHT_READ
    rows = []
    for rung, (params, batch, steps) in enumerate(zip(MOONLIGHT_PARAMS, MOONLIGHT_BATCH, MOONLIGHT_STEPS, strict=True)):
        tokens = batch * 8192 * (steps - 39.5)
        for arm in ("adamw", "muon"):
            rows.append(
                {
                    "arm": arm,
                    "rung": ("339M", "545M", "822M", "1.1B", "1.5B")[rung],
                    "cell": rung,
                    "params": params,
                    "tokens": tokens,
                    "flops": 6 * params * tokens,
                    "loss": losses[arm][rung],
                    "loss_kind": "train",
                    "convention": "6nd",
                }
            )
    return check_table(pd.DataFrame(rows), "Moonlight, Fig. 1a")
