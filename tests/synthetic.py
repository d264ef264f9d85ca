"""Tables of runs with a known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.fitting.laws import LossSurface, PowerLaw

ADAMW = PowerLaw(scale=2.6, exponent=0.054)
MUON = PowerLaw(scale=2.5, exponent=0.054)


def ladder(
    laws: dict[str, PowerLaw],
    *,
    rungs: int = 5,
    seeds: int = 1,
    shared: float = 0.0,
    own: float = 0.0,
    seed: int = 0,
    smallest: float = 3e17,
    largest: float = 4e20,
) -> pd.DataFrame:
    """Runs on one ladder of computes; log noise `shared` by the arms of a cell and `own` of each run."""
    generator = np.random.default_rng(seed)
    rows = []
    for rung, flops in enumerate(np.geomspace(smallest, largest, rungs)):
        params = np.sqrt(flops / 120.0)
        for number in range(seeds):
            common = shared * generator.standard_normal()
            for arm, law in laws.items():
                noise = common + own * generator.standard_normal()
                loss = law.loss(float(flops) / 8.64e19) * float(np.exp(noise))
                rows.append((arm, params, 20.0 * params, flops, loss, f"{rung}-{number}", number))
    return pd.DataFrame(rows, columns=["arm", "params", "tokens", "flops", "loss", "cell", "seed"])


def grid(surfaces: dict[str, LossSurface], *, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """IsoFLOP profiles: seven computes with seven splits each."""
    generator = np.random.default_rng(seed)
    rows = []
    for flops in np.geomspace(6e18, 3e21, 7):
        for lean in np.geomspace(0.25, 4.0, 7):
            params = lean * np.sqrt(flops / 120.0)
            tokens = flops / 6.0 / params
            for arm, surface in surfaces.items():
                loss = surface.loss(float(params), float(tokens)) * float(np.exp(noise * generator.standard_normal()))
                rows.append((arm, params, tokens, flops, loss))
    return pd.DataFrame(rows, columns=["arm", "params", "tokens", "flops", "loss"])
