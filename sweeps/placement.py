"""The ``[placement]`` table of a campaign: where and how its runs execute, and what one expects of the device.

Nothing in it changes a run's numbers or its id. Every value that reaches SLURM is checked here, so that no text of a
campaign file can become a shell command or a line of its own in a batch script.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from scaling.errors import Refusal, unknown_name
from scaling.spec import Positive, Strict
from sweeps.tomlfile import as_value

Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
"""A name that may become a folder, a job name or an option: it cannot leave the root or end a line."""

PEAKS: dict[str, float] = {
    # Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
    "A100": 312e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "MI300X": 1307.4e12,
    # One core with 256-bit vectors in fp32; an order of magnitude, not a data sheet.
    "cpu": 60e9,
}
"""What `accelerator` can name."""


class PlacementTable(Strict, frozen=True):
    """Where and how runs execute; ``[placement.rungs."NAME"]`` replaces single fields for one rung.

    Raises:
        Refusal: The accelerator has no row in `PEAKS`.
    """

    data: str | None = None
    """Folder of prepared token shards; by default the one under the run root that belongs to ``[data]``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = 1
    """CPU threads of one run."""
    micro_batch: Positive | None = None
    """Most windows of one forward pass: the plan takes the largest part of a batch that divides it; else all at once."""
    compile: bool = False
    checkpoint_seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 30.0
    """Seconds between resume points: what a kill can cost."""
    accelerator: str = "cpu"
    """Row of `PEAKS`, for predicting hours before any run was measured."""
    utilisation: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.4
    """Share of that peak you expect to reach."""

    def __post_init__(self) -> None:
        """Refuse an accelerator nobody knows the peak of."""
        if self.accelerator not in PEAKS:
            raise Refusal(f"[placement] {unknown_name('accelerator', self.accelerator, PEAKS)}")

    @property
    def peak_flops(self) -> float:
        """FLOP/s of everything one run occupies."""
        return PEAKS[self.accelerator] * (self.threads if self.accelerator == "cpu" else 1)


def placements(table: dict[str, Any], rungs: list[str], *, where: str) -> dict[str, PlacementTable]:
    """The placement of every rung.

    Args:
        table: ``[placement]`` as it was read, its sub-table ``rungs`` included.
        rungs: Names of all rungs.
        where: The campaign file, for refusals.

    Raises:
        Refusal: A value cannot be used, or an override names a rung that is not there.
    """
    shared = {name: value for name, value in table.items() if name != "rungs"}
    base = as_value(shared, PlacementTable, where=f"{where}, [placement]")
    overrides = table.get("rungs", {})
    if not isinstance(overrides, dict) or not all(isinstance(value, dict) for value in overrides.values()):
        raise Refusal(f'{where}, [placement]: rungs is {overrides!r}. Write [placement.rungs."NAME"] and fields below.')
    for name in overrides:
        if name not in rungs:
            raise Refusal(f"{where}, [placement.rungs]: {unknown_name('rung', name, rungs)}")
    return {
        rung: as_value({**shared, **overrides[rung]}, PlacementTable, where=f'{where}, [placement.rungs."{rung}"]')
        if rung in overrides
        else base
        for rung in rungs
    }
