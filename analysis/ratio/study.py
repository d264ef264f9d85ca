"""The study of a table of runs: laws, ratios, intervals, and the rows left out.

`fit_table` makes a `Study` from a table. `write_study` writes it as fits.json with every digit, `read_study` reads the
same value back, and `load_or_fit` reuses a written study as long as table and options are those it was made from.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.data.cells import LeftOut, rungs, select
from analysis.data.table import RunsTable, check_table
from analysis.fitting.families import LAW_FAMILIES
from analysis.fitting.fit import Fit, fit_law
from analysis.fitting.laws import LAWS
from analysis.ratio.compare import DEFAULT_RESAMPLES, Comparison, StudyOptions, compare
from scaling.errors import UserError, unknown_name
from scaling.io import Strict, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd


MAX_ARMS = 50
"""Arms of one study; each has a figure and a comparison."""

FITS_FILE = "fits.json"


class Study(Strict, frozen=True):
    """Laws of the arms of a table of runs, and the ratios between them."""

    table: str
    """Name of the table."""
    design: str
    """``ladder``: one allocation at each compute, and laws of compute. ``grid``: several, and surfaces over N and D."""
    baseline: str
    arms: list[str]
    fits: dict[str, Fit]
    """The simplest law of the design, fitted to each arm by itself."""
    comparisons: list[Comparison]
    left_out: list[LeftOut]
    resamples: int
    seed: int
    table_sha256: str = ""
    """Hash of the table's rows (`analysis.data.table.RunsTable.sha256`); empty in files of older versions."""
    options: StudyOptions = StudyOptions()

    def __repr__(self) -> str:
        """One line: the ratios, not the numbers of every figure."""
        ratios = ", ".join(f"{c.challenger}/{c.baseline} {c.headline.ratio:.3f}" for c in self.comparisons)
        return f"Study({self.table!r}, {self.design}, FLOPs to match: {ratios})"


def fit_table(
    table: RunsTable | pd.DataFrame,
    *,
    baseline: str | None = None,
    challenger: str | None = None,
    family: str | None = None,
    extrapolate: bool = False,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Study:
    """The study of a table of runs.

    Args:
        table: A table that `analysis.data.table.read_table` returned, or any DataFrame with the required columns.
        baseline: The arm compared against; ``adamw`` where there is one.
        challenger: The arm compared; every other arm when not given.
        family: Row of ``analysis.fitting.families.LAW_FAMILIES``; chosen by the error at rungs left out when not given.
        extrapolate: Return a ratio, marked as extrapolated, even where the arms have no loss in common.
        resamples: Refits of the bootstrap, used for more than thirty cells.
        seed: Seed of the bootstrap.

    Raises:
        UserError: The table cannot be used, an arm is unknown or alone, an arm has fewer than three distinct computes, or
            the arms have no loss in common.
    """
    table = check_table(table)
    options = StudyOptions(
        baseline=baseline,
        challenger=challenger,
        family=family,
        extrapolate=extrapolate,
        resamples=resamples,
        seed=seed,
    )
    arms = choose_arms(table, baseline, challenger)
    for arm in arms:
        check_computes(table, arm)
    _check_conventions(table, arms)
    ladder = is_ladder(table, arms)
    if family is not None:
        ladder = LAW_FAMILIES.row(family).design == "ladder"
    alone = {arm: _alone(table, arm, ladder=ladder) for arm in arms}
    pairs = [select(table, (arms[0], other)) for other in arms[1:]]
    return Study(
        table=table.name,
        design="ladder" if ladder else "grid",
        baseline=arms[0],
        arms=list(arms),
        fits=alone,
        comparisons=[compare(cells, table, alone, options, ladder=ladder) for cells in pairs],
        left_out=sorted({out.row: out for cells in pairs for out in cells.left_out}.values(), key=lambda out: out.row),
        resamples=resamples,
        seed=seed,
        table_sha256=table.sha256,
        options=options,
    )


def choose_arms(table: RunsTable, baseline: str | None, challenger: str | None) -> tuple[str, ...]:
    """Baseline first, then the challengers in order of appearance.

    Raises:
        UserError: An arm is unknown or alone, or the baseline must be named.
    """
    name, known = table.name, table.arms
    for what, arm in (("baseline", baseline), ("challenger", challenger)):
        if arm is not None and arm not in known:
            raise UserError(f"{name}: {unknown_name(what, arm, known)}")
    if challenger is None and len(known) > MAX_ARMS:
        raise UserError(
            f"{name}, column arm: found {len(known):,} arms; at most {MAX_ARMS} are compared at once. Name one with "
            "--challenger, or check that the column holds names of arms and not of runs."
        )
    if len(known) < 2:
        raise UserError(
            f'{name}, column arm: found one arm alone, "{known[0]}"; a ratio needs two. Add the runs of another arm, '
            f"or fit this arm's law by itself (--law power --arm {known[0]})."
        )
    if baseline is None:
        near = [arm for arm in known if arm.lower() == "adamw"]
        rest = [arm for arm in known if arm != challenger]
        if not near and len(rest) > 1:
            raise UserError(
                f'{name}, column arm: none of {", ".join(known)} is called "adamw", so the baseline must be named. '
                f"Name the arm that the others are compared against, as in --baseline {known[0]}."
            )
        baseline = near[0] if near and near[0] != challenger else rest[0]
    if baseline == challenger:
        raise UserError(f'{name}: baseline and challenger are both "{baseline}". Name two arms.')
    return (baseline, challenger) if challenger else (baseline, *(arm for arm in known if arm != baseline))


def check_computes(table: RunsTable, arm: str) -> None:
    """Refuse an arm whose usable runs have fewer than three distinct computes, or one loss."""
    name, frame = table.name, table.frame
    used = frame[(frame["arm"] == arm) & (frame["left_out"] == "")]
    distinct = len(np.unique(rungs(used["flops"].to_numpy(dtype=np.float64)))) if len(used) else 0
    if distinct < 3:
        raise UserError(
            f"{name}, column flops: arm {arm} has {distinct} distinct compute{'s' if distinct != 1 else ''} among its "
            f"{usable_text(frame[frame['arm'] == arm])}; a power law and its error need at least 3. Train more sizes."
        )
    if float(np.ptp(np.log(used["loss"].to_numpy(dtype=np.float64)))) < 1e-9:
        raise UserError(
            f"{name}, column loss: all {len(used)} runs of arm {arm} have the loss {used['loss'].iloc[0]:g}; a law needs "
            "a loss that falls with compute. Check the column."
        )


def usable_text(rows: pd.DataFrame) -> str:
    """Number of usable rows, and of the others by reason: ``1 usable runs (2 diverged)``."""
    lost = rows.loc[rows["left_out"] != "", "left_out"].str.split(":").str[0].value_counts()
    others = f" ({', '.join(f'{count} {reason}' for reason, count in lost.items())})" if len(lost) else ""
    return f"{len(rows) - int(lost.sum())} usable runs{others}"


def _check_conventions(table: RunsTable, arms: tuple[str, ...]) -> None:
    """Refuse a column `convention` with several counts of FLOPs."""
    name, frame = table.name, table.frame
    if "convention" not in frame:
        return
    used = frame[frame["arm"].isin(arms) & (frame["left_out"] == "") & frame["convention"].notna()]
    words = used["convention"].astype(str).str.strip().str.lower()
    used = used[words != ""].assign(convention=words)
    counts = used.groupby("convention", sort=False)["arm"].unique()
    if len(counts) > 1:
        groups = "; ".join(f"{word} in rows of {', '.join(own)}" for word, own in counts.items())
        raise UserError(
            f"{name}, column convention: found {groups}. A ratio of FLOPs needs one count in all rows. Write the same count "
            "into the column flops of every row."
        )


def is_ladder(table: RunsTable, arms: tuple[str, ...]) -> bool:
    """True if tokens per parameter are a function of compute in every arm, so that loss is a law of compute.

    Where runs of equal compute split it differently (isoFLOP sweeps, over-training), a curve through all of them is no
    frontier, and the surface over N and D is fitted instead.
    """
    cells = select(table, arms)
    for number in range(len(arms)):
        own = cells.rows.take(cells.rows.arm == number)
        x = np.log(own.columns["flops"])
        y = np.log(own.columns["tokens"] / own.columns["params"])
        degree = min(2, len(np.unique(np.round(x, 2))) - 1)
        left = y - np.polyval(np.polyfit(x - x.mean(), y, degree), x - x.mean())
        varied = len(np.unique(np.round(np.log(own.columns["params"]), 2)))
        if float(np.std(left)) > 0.25 and len(x) >= 8 and varied >= 3:
            return False
    return True


def _alone(table: RunsTable, arm: str, *, ladder: bool) -> Fit:
    """One arm under the simplest law of the design."""
    design = "ladder" if ladder else "grid"
    law = next(name for name, form in LAWS.items() if form.design == design)
    cells = select(table, (arm,))
    fit = fit_law(law, cells.rows, arm=arm, numbers=cells.numbers.tolist())
    if ladder and not (exponent := fit.law.frontier().exponent) > 0.0:
        raise UserError(
            f"arm {arm}: loss does not fall with compute (exponent {exponent:.3g}), so no compute matches a lower "
            "loss. Check that loss and flops belong together, or leave out failed runs by a column status."
        )
    return fit


def load_or_fit(table: RunsTable | pd.DataFrame, folder: Path | str, **options: Any) -> Study:
    """The study in ``folder/fits.json`` if it was made from this table with these options, else a new fit.

    Writes nothing. The options are those of `fit_table`.
    """
    table = check_table(table)
    requested = StudyOptions(**options)
    file = Path(folder) / FITS_FILE
    if file.is_file():
        # A damaged file, or one of another version, is no error here: a new fit replaces it.
        with contextlib.suppress(UserError):
            study = read_study(file)
            if (study.table, study.table_sha256, study.options) == (table.name, table.sha256, requested):
                return study
    return fit_table(table, **options)


def write_study(study: Study, path: Path | str) -> None:
    """The study as JSON with every digit."""
    write_json(Path(path), study)


def read_study(path: Path | str) -> Study:
    """The study that `write_study` wrote, equal to what was written."""
    return read_json(Path(path), Study, remedy="Name a fits.json that scaling fit wrote.")
