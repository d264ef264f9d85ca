"""Tables of runs from any source: reading, checking, and errors that name table, column, row and remedy.

A table has one row a run (or a checkpoint of a run) with columns ``arm, params, tokens, flops, loss``. Optional columns:
``cell`` (pairs the arms: same size, tokens, data order, seed), ``seed``, ``run``, ``step``, ``status``, ``reason``,
``convention``, ``seconds``, ``schedule_tokens`` (where the schedule would have ended), and the settings that the audit
checks (``peak_lr``, ``batch_tokens``, ``manifest``). Other columns are kept and ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.data.foreign import ALIASES, FLOPS_PER_UNIT, TableError, plain_name, read_frame, translated
from scaling.errors import UserError, unknown_name

if TYPE_CHECKING:
    import pandas as pd


COUNTS = ("params", "tokens", "flops")
NUMBER_COLUMNS = (
    "peak_lr",
    "batch_tokens",
    "schedule_tokens",
    "step",
    "train_loss",
    "seconds",
    "cpu_seconds",
    "gpu_hours",
)
"""Optional columns of numbers; a cell may be empty."""
TEXT_COLUMNS = ("arm", "rung", "cell", "seed", "run", "status", "convention", "manifest", "loss_kind")
"""Columns whose text reaches terminals, figures, file names and reports."""
MAX_NAME_LENGTH = 120
MAX_ROWS = 2_000_000
"""Rows of a table. A fit of one million rows takes a good minute of CPU time and 1.1 GB of memory."""
LOSS_RANGE = (1e-6, 1e6)
"""Losses in nats per token for which the numerics of the fits are made; a loss beyond is in another unit."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, changes of writing direction and lone surrogates: a terminal executes them."""

FINISHED_STATUS = frozenset({"", "finished", "done", "ok", "completed", "complete", "success"})
"""Values of `status` of a run that was trained to its end."""

ANY = "any"
"""Convention: accept any count of `flops`, but not single rows that break the pattern of their arm."""

MIN_SHARE_OF_6ND = 1e-6
"""Share of 6 * params * tokens below which `flops` are in another unit."""
FLOPS_TOLERANCE = 0.01
"""Relative distance of `flops` from 6 * params * tokens that the convention 6nd accepts."""


@dataclass(frozen=True, eq=False)
class RunsTable:
    """A checked table of runs; `read_table` and `check_table` make it."""

    frame: pd.DataFrame
    """The rows of the file in its order, counts and losses as floats. The last column `left_out` holds why a row is
    not used, or an empty string."""
    name: str
    """Name in errors and reports."""
    assumed: str = ""
    """Assumptions about the columns and units of an export; empty if there are none."""

    def __repr__(self) -> str:
        """Name, number of rows and arms."""
        return f"RunsTable({self.name!r}, {len(self.frame):,} rows, arms {', '.join(self.arms)})"

    @property
    def arms(self) -> list[str]:
        """Arms in order of appearance."""
        return [str(arm) for arm in dict.fromkeys(self.frame["arm"])]

    def only_arm(self, arm: str | None) -> str:
        """The named arm, or the single arm of the table; a `UserError` without either."""
        known = self.arms
        if arm is None and len(known) > 1:
            raise UserError(
                f"{self.name}, column arm: found {', '.join(known)}; a law is fitted to one arm. Name it, as in "
                f"--arm {known[0]}."
            )
        if arm is not None and arm not in known:
            raise UserError(f"{self.name}: {unknown_name('arm', arm, known)}")
        return known[0] if arm is None else arm

    @property
    def sha256(self) -> str:
        """Hash of the rows: equal for equal content, in all file formats."""
        import pandas as pd

        rows = pd.util.hash_pandas_object(_hashable(self.frame), index=False)
        names = "\0".join(map(str, self.frame.columns))
        return hashlib.sha256(names.encode() + rows.to_numpy().tobytes()).hexdigest()


def read_table(
    path: Path | str,
    *,
    convention: str | None = ANY,
    columns: tuple[str, ...] = COUNTS,
    names: Mapping[str, str] | None = None,
    last: str | None = None,
) -> RunsTable:
    """A checked table of runs from a file that this or another tool wrote, or from a folder of such files.

    Args:
        path: Ends in .csv, .tsv, .jsonl, .json or .parquet, but for Parquet also with .gz behind it.
        convention: As in `check_table`.
        columns: As in `check_table`.
        names: The file's column for a column of the table, such as ``{"loss": "val/loss"}``, where the name is not among
            `analysis.data.foreign.ALIASES`.
        last: Column that names the run; of several rows of a run the last one with a loss is used.

    Raises:
        TableError: The file is missing or has another format, or its content cannot be used.
    """
    path = Path(path)
    frame, notes = translated(read_frame(path), str(path), columns=names, last=last)
    return replace(check_table(frame, str(path), convention=convention, columns=columns), assumed="; ".join(notes))


def check_table(
    frame: pd.DataFrame | RunsTable,
    name: str = "table",
    *,
    convention: str | None = ANY,
    columns: tuple[str, ...] = COUNTS,
) -> RunsTable:
    """A table of runs with its columns checked; a table that is checked already comes back as it is.

    Args:
        frame: One row a run.
        name: Name of the table in errors and reports.
        convention: ``"6nd"``: `flops` must be 6 * params * tokens within 1 %. ``"any"``: an arm whose rows all follow
            another count (with attention and head, or with the total parameters of sparse models) is accepted, but
            single rows that break their arm's pattern are errors. None checks nothing. A row with ``6nd`` in the column
            `convention` is always checked strictly.
        columns: Counts that must be there, besides `arm`, `loss` and `flops`: a law of compute alone needs no others.

    Raises:
        TableError: A column is missing; a value is not a number, not finite, not positive; `flops` contradict
            `params` and `tokens`.
    """
    if isinstance(frame, RunsTable):
        _check_columns(frame.frame, frame.name, columns)
        return frame
    frame = frame.rename(columns={column: str(column).strip() for column in frame.columns})
    _check_columns(frame, name, columns)
    frame = frame.drop(columns="left_out", errors="ignore").reset_index(drop=True)
    if not len(frame):
        raise TableError(f"{name}: the table has no rows. Collect finished runs first.")
    if len(frame) > MAX_ROWS:
        raise TableError(
            f"{name}: found {len(frame):,} rows; at most {MAX_ROWS:,} are fitted. Keep the last row of each run, or the "
            "mean of runs that share a size."
        )
    _check_names(frame, name)
    frame["left_out"] = _left_out(frame)
    used = (frame["left_out"] == "").to_numpy()
    empty = frame["arm"].isna().to_numpy() | (frame["arm"].astype(str).str.strip() == "").to_numpy()
    _check_rows(frame, name, "arm", empty, "the name of the arm that the run belongs to")
    frame["arm"] = frame["arm"].astype(str).str.strip()
    for column in (column for column in COUNTS if column in frame):
        frame[column] = _numbers(frame, column, name, used)
        _check_rows(frame, name, column, used & ~(frame[column].to_numpy() > 0), "a number above zero")
    frame["loss"] = _numbers(frame, "loss", name, used)
    losses = frame["loss"].to_numpy()
    remedy = "If the run diverged, write diverged into a column status; the run is then left out and listed."
    _check_rows(frame, name, "loss", used & ~np.isfinite(losses), "a finite loss in nats per token", remedy)
    _check_rows(frame, name, "loss", used & ~(losses > 0), "a loss above zero")
    low, high = LOSS_RANGE
    outside = used & ((losses < low) | (losses > high))
    _check_rows(frame, name, "loss", outside, f"a loss in nats per token, between {low:g} and {high:g},")
    for column in NUMBER_COLUMNS:
        if column in frame:
            frame[column] = _numbers(frame, column, name, used)
    if {"params", "tokens"} <= set(frame.columns):
        _check_flops(frame, name, used, convention)
    return RunsTable(frame, name)


def _required(columns: tuple[str, ...]) -> list[str]:
    return ["arm", *(column for column in COUNTS if column in columns or column == "flops"), "loss"]


def _check_columns(frame: pd.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    import difflib

    if CONTROL.search("".join(map(str, frame.columns))):
        bad = next(str(column) for column in frame.columns if CONTROL.search(str(column)))
        raise TableError(f"{name}: the column name {_shown(bad)} holds control characters. Rename the column.")
    required = _required(columns)
    twice = sorted({str(column) for column in frame.columns[frame.columns.duplicated()]})
    # pandas renames the second column of one name in a CSV file.
    twice = twice or [column for column in required if column in frame and f"{column}.1" in frame]
    if twice:
        raise TableError(f"{name}: found column {_listed(twice)} twice; each column needs a name of its own. Keep one.")
    missing = [column for column in required if column not in frame.columns]
    if missing:
        hints = []
        spare = {str(column).lower(): str(column) for column in frame.columns if column not in required}
        for column in missing:
            known = [name for name in spare if plain_name(name) in ALIASES[column].split()]
            near = known or difflib.get_close_matches(column, spare, n=1, cutoff=0.7)
            hints += [f'"{spare[near[0]]}" looks like {column}'] if near else []
        hint = f" ({'; '.join(hints)})" if hints else ""
        raise TableError(
            f"{name}: column {_listed(missing)} is missing{hint}. A table of runs has the columns {_listed(required)}; "
            f"rename it, add it, or name the file's column: --map {missing[0]}=COLUMN."
        )


def _check_names(frame: pd.DataFrame, name: str) -> None:
    """Refuse text that a terminal, a figure or a file system would interpret as commands."""
    import pandas as pd

    for column in TEXT_COLUMNS:
        if column not in frame or pd.api.types.is_numeric_dtype(frame[column]):
            continue
        texts = frame[column].dropna().astype(str).str.strip()
        if CONTROL.search("".join(texts)):
            bad = texts.map(lambda text: CONTROL.search(text) is not None)
            rows = frame.index.isin(texts.index[bad.to_numpy()])
            _check_rows(frame, name, column, rows, "text without control characters")
        if column in ("arm", "rung"):
            rows = frame.index.isin(texts.index[(texts.str.len() > MAX_NAME_LENGTH).to_numpy()])
            _check_rows(frame, name, column, rows, f"a name of at most {MAX_NAME_LENGTH} letters")


def _hashable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with objects as text: cells of Parquet may be lists, which cannot be hashed."""
    import pandas as pd

    objects = [column for column in frame if pd.api.types.is_object_dtype(frame[column])]
    return frame.astype(dict.fromkeys(objects, str))


def _left_out(frame: pd.DataFrame) -> Any:
    reasons = np.full(len(frame), "", dtype=object)
    if "status" in frame:
        status = frame["status"].astype(object).fillna("").astype(str).str.strip().str.lower()
        open_ = ~status.isin(FINISHED_STATUS)
        given_reasons = status[open_]
        if "reason" in frame:
            # A reason may be the message of an exception, line breaks included.
            given = frame.loc[open_, "reason"].astype(object).fillna("").astype(str)
            given = given.str.replace(CONTROL, " ", regex=True)
            given_reasons = given_reasons.where(given == "", given_reasons + ": " + given)
        reasons[open_.to_numpy()] = given_reasons.to_numpy()
    # pandas compares NaN with NaN as equal here, so a repeated row of a diverged run is found as well.
    again = _hashable(frame).duplicated(keep="first").to_numpy() & (reasons == "")
    reasons[again] = "a copy of an earlier row"
    return reasons


def _numbers(frame: pd.DataFrame, column: str, name: str, used: Any) -> Any:
    import pandas as pd

    values = frame[column]
    if pd.api.types.is_bool_dtype(values):
        raise TableError(f"{name}, column {column}: found true and false; a number is needed. Write the count itself.")
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    text = values.notna().to_numpy() & numbers.isna().to_numpy() & used
    text[text] = values[text].astype(str).str.strip().str.lower().ne("nan").to_numpy()
    _check_rows(frame, name, column, text, "a number such as 339700000 or 3.397e8")
    if column != "loss":
        bad = np.isinf(numbers.to_numpy()) if column in NUMBER_COLUMNS else ~np.isfinite(numbers.to_numpy())
        _check_rows(frame, name, column, used & bad, "a finite number")
    return numbers


def _check_rows(frame: pd.DataFrame, name: str, column: str, bad: Any, wanted: str, remedy: str = "") -> None:
    rows = np.flatnonzero(bad)
    if not len(rows):
        return
    found = frame[column].iloc[rows[0]]
    others = f" (and {len(rows) - 1:,} more rows)" if len(rows) > 1 else ""
    raise TableError(
        f"{name}, column {column}, row {rows[0] + 1}{others}: found {_shown(found)}; {wanted} is needed. "
        f"{remedy or 'Correct the table, or remove the row.'}"
    )


def _check_flops(frame: pd.DataFrame, name: str, used: Any, convention: str | None) -> None:
    if convention is None:
        return
    if convention not in ("6nd", ANY):
        raise TableError(f'{name}: convention "{convention}" is not known. Use 6nd, any or none.')
    named = frame["convention"].astype(object).fillna("").astype(str).str.lower() if "convention" in frame else None
    _check_unit(frame[used], name)
    for arm, group in frame[used].groupby("arm", sort=True):
        ratio = (group["flops"] / (6.0 * group["params"] * group["tokens"])).to_numpy()
        off = np.abs(ratio - 1.0) > FLOPS_TOLERANCE
        strict = convention == "6nd"
        if named is not None:
            words = named.loc[group.index].to_numpy()
            off &= (words == "6nd") | (words == "")
            strict = strict or bool(np.any(words == "6nd"))
        if not off.any() or (not strict and off.all() and _is_a_pattern(group, ratio)):
            continue
        worst = group[off].iloc[0]
        row, counted = int(group.index[off][0]) + 1, 6.0 * worst["params"] * worst["tokens"]
        others = f" (and {int(off.sum()) - 1:,} more rows of this arm)" if off.sum() > 1 else ""
        raise TableError(
            f"{name}, column flops, row {row}{others} of arm {arm}: found {worst['flops']:.4g}, and 6 * params * tokens "
            f"gives {counted:.4g}: the ratio is {worst['flops'] / counted:.3g}. Where params is a label (399M for "
            f"{worst['flops'] / (6.0 * worst['tokens']) / 1e6:.4g}M), write the true count; where flops count more than 6ND or "
            "params include inactive experts, name the count in a column convention, or pass the convention none."
        )


def _check_unit(used: pd.DataFrame, name: str) -> None:
    """Refuse FLOPs in a larger unit: no count of a training run lies a million times below 6 * params * tokens."""
    for arm, group in used.groupby("arm", sort=True):
        ratio = float((group["flops"] / (6.0 * group["params"] * group["tokens"])).median())
        if ratio > MIN_SHARE_OF_6ND:
            continue
        near = [unit for unit, size in FLOPS_PER_UNIT.items() if 1.0 / 3.0 < ratio * size < 3.0]
        raise TableError(
            f"{name}, column flops, arm {arm}: found {ratio:.3g} times 6 * params * tokens"
            f"{f', so it is in {near[0]}' if near else ''}. The column holds FLOPs: multiply by the number of FLOPs in its unit"
            f"{f' ({FLOPS_PER_UNIT[near[0]]:.4g})' if near else ', or correct params and tokens'}."
        )


def _is_a_pattern(group: pd.DataFrame, ratio: Any) -> bool:
    """True if an arm's FLOPs follow one other count: their ratio to 6ND is a smooth function of size and tokens."""
    logs = np.log(ratio)
    if np.ptp(logs) <= 2 * FLOPS_TOLERANCE:
        return True
    if len(logs) < 4 or np.ptp(logs) > np.log(10.0):
        return False
    sizes = np.log(group["params"].to_numpy())
    basis = np.stack([np.ones_like(sizes), sizes, sizes**2, np.log(group["tokens"].to_numpy())], axis=1)
    left = logs - basis @ np.linalg.lstsq(basis, logs, rcond=None)[0]
    return bool(np.sqrt(np.mean(left**2)) <= max(0.03, 0.25 * float(np.std(logs))))


def _shown(value: Any) -> str:
    try:
        text = "nothing" if value is None or value != value else f"{value:g}"
    except (TypeError, ValueError, OverflowError):
        text = ascii(value) if CONTROL.search(str(value)) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
