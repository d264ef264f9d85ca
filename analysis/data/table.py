"""Tables of runs, whoever made them: read, checked, and refused in sentences where they cannot carry a fit.

A table has one row a run (or a checkpoint of a run) with columns ``arm, params, tokens, flops, loss``. It may also
have ``cell`` (what pairs the arms: same size, tokens, data order, seed), ``seed``, ``run``, ``step``, ``status``,
``reason``, ``convention``, ``seconds``, ``schedule_tokens`` (where the schedule would have ended), and the settings that
the audit looks at (``peak_lr``, ``batch_tokens``, ``manifest``); other columns are kept and ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.errors import UserError
from scaling.units import FLOPS_PER_PFLOPS_DAY

if TYPE_CHECKING:
    import pandas as pd


REQUIRED = ("arm", "params", "tokens", "flops", "loss")
COUNTS = ("params", "tokens", "flops")
NUMBERS = ("peak_lr", "batch_tokens", "schedule_tokens", "step", "train_loss", "seconds", "cpu_seconds", "gpu_hours")
"""Other columns that hold numbers where they are present; a cell may be empty."""
NAMES = ("arm", "rung", "cell", "seed", "run", "status", "convention", "manifest", "loss_kind")
"""Columns whose text reaches terminals, figures, file names and reports."""
MAX_NAME = 120
"""Letters of a name."""
MAX_ROWS = 2_000_000
"""Rows of a table. A fit of one million rows takes a good minute of CPU time and 1.1 GB of memory."""
LOSSES = (1e-6, 1e6)
"""Losses in nats per token that the numerics of the fits are made for; a loss beyond is in another unit."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, changes of writing direction and halves of characters: a terminal obeys them."""

FINISHED = frozenset({"", "finished", "done", "ok", "completed", "complete", "success"})
"""Values of `status` that mean the loss is that of a whole run."""

ANY = "any"
"""Convention: take `flops` as counted by whoever made the table, but refuse rows that break their own pattern."""

UNIT = 1e-6
"""Times 6 * params * tokens, below which `flops` are in another unit."""
UNITS = {
    "PFLOP/s-days": FLOPS_PER_PFLOPS_DAY,
    "GFLOPs": 1e9,
    "TFLOPs": 1e12,
    "PFLOPs": 1e15,
    "EFLOPs": 1e18,
    "ZFLOPs": 1e21,
}
"""FLOPs in each unit that tables have been seen to use."""

SYNONYMS = {
    "arm": ("optimizer", "method", "model_type", "variant", "architecture"),
    "params": ("n", "model size", "parameters", "num_params", "n_params", "active_params"),
    "tokens": ("d", "num_tokens", "training_tokens", "train_tokens", "data"),
    "flops": ("c", "compute", "training flop", "training flops", "compute_flops", "train_flops"),
    "loss": ("validation_loss", "val_loss", "eval_loss", "final_loss", "l"),
}
"""Names that published tables use for a column; named in the error, never taken silently."""

TOLERANCE = 0.01
"""How far `flops` may lie from 6 * params * tokens, relative."""


class TableError(UserError):
    """A table of runs that cannot be used."""


def read_table(path: Path | str, *, convention: str | None = ANY) -> pd.DataFrame:
    """A table of runs from a CSV or Parquet file, checked.

    Args:
        path: Ends in .csv, .csv.gz, .tsv or .parquet.
        convention: As in `check_table`.

    Returns:
        The rows as they stand in the file, counts and losses as floats, with a last column `left_out`: why a row is
        not to be used, or an empty string.

    Raises:
        TableError: The file is missing, is neither format, or its content cannot be used.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: there is no such file. Give a CSV or Parquet file with columns {_listed(REQUIRED)}.")
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif any(path.name.endswith(end) for end in (".csv", ".csv.gz", ".tsv", ".txt")):
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        else:
            raise TableError(f'{path}: the ending "{path.suffix}" is not known. Use .csv, .tsv or .parquet.')
    except TableError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(
            f"{path}: cannot be read as a table ({first}). Write a CSV with one header line of column names, or Parquet."
        ) from None
    return check_table(frame, str(path), convention=convention)


def check_table(frame: pd.DataFrame, name: str = "table", *, convention: str | None = ANY) -> pd.DataFrame:
    """The table with its numbers checked; see `read_table` for what comes back. Checking twice changes nothing.

    Args:
        frame: One row a run.
        name: How refusals call the table.
        convention: ``"6nd"``: `flops` must be 6 * params * tokens within 1 %. ``"any"``: an arm whose rows all follow
            another count (attention and head counted, sparse models with their total parameters) is taken as it
            is, but single rows that break their arm's pattern are refused. None checks nothing. A column
            `convention` with ``6nd`` in it asks for the strict check by itself.

    Raises:
        TableError: A column is missing; a value is not a number, not finite, not positive; `flops` contradict
            `params` and `tokens`.
    """
    frame = frame.rename(columns={column: str(column).strip() for column in frame.columns})
    _check_columns(frame, name)
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
    _check_arms(frame, name)
    for column in COUNTS:
        frame[column] = _numbers(frame, column, name, used)
        _refuse(frame, name, column, used & ~(frame[column].to_numpy() > 0), "a number above zero")
    frame["loss"] = _numbers(frame, "loss", name, used)
    losses = frame["loss"].to_numpy()
    _refuse(
        frame,
        name,
        "loss",
        used & ~np.isfinite(losses),
        "a finite loss in nats per token",
        "If the run diverged, say so in a column status (diverged); it is then left out and named.",
    )
    _refuse(frame, name, "loss", used & ~(losses > 0), "a loss above zero")
    outside = used & ((losses < LOSSES[0]) | (losses > LOSSES[1]))
    _refuse(frame, name, "loss", outside, f"a loss in nats per token, between {LOSSES[0]:g} and {LOSSES[1]:g},")
    for column in NUMBERS:
        if column in frame:
            frame[column] = _numbers(frame, column, name, used)
    _check_flops(frame, name, used, convention)
    frame.attrs["name"] = name
    return frame


def _check_columns(frame: pd.DataFrame, name: str) -> None:
    import difflib

    if CONTROL.search("".join(map(str, frame.columns))):
        bad = next(str(column) for column in frame.columns if CONTROL.search(str(column)))
        raise TableError(f"{name}: the column name {_shown(bad)} holds control characters. Rename the column.")
    twice = sorted({str(column) for column in frame.columns[frame.columns.duplicated()]})
    # pandas renames the second column of one name in a CSV file.
    twice = twice or [column for column in REQUIRED if column in frame and f"{column}.1" in frame]
    if twice:
        raise TableError(f"{name}: column {_listed(twice)} stands there twice. Keep one.")
    missing = [column for column in REQUIRED if column not in frame.columns]
    if missing:
        hints = []
        spare = {str(column).lower(): str(column) for column in frame.columns if column not in REQUIRED}
        for column in missing:
            known = [name for name in SYNONYMS[column] if name in spare]
            near = known or difflib.get_close_matches(column, spare, n=1, cutoff=0.7)
            hints += [f'"{spare[near[0]]}" looks like {column}'] if near else []
        hint = f" ({'; '.join(hints)})" if hints else ""
        raise TableError(
            f"{name}: column {_listed(missing)} is missing{hint}. A table of runs has the columns {_listed(REQUIRED)}; "
            "rename or add."
        )


def _check_names(frame: pd.DataFrame, name: str) -> None:
    """Refuse text that a terminal, a figure or a file system would take for more than text."""
    import pandas as pd

    for column in NAMES:
        if column not in frame or pd.api.types.is_numeric_dtype(frame[column]):
            continue
        texts = frame[column].dropna().astype(str).str.strip()
        if CONTROL.search("".join(texts)):
            bad = texts.map(lambda text: CONTROL.search(text) is not None)
            rows = frame.index.isin(texts.index[bad.to_numpy()])
            _refuse(frame, name, column, rows, "text without control characters")
        if column in ("arm", "rung"):
            rows = frame.index.isin(texts.index[(texts.str.len() > MAX_NAME).to_numpy()])
            _refuse(frame, name, column, rows, f"a name of at most {MAX_NAME} letters")


def _left_out(frame: pd.DataFrame) -> Any:
    import pandas as pd

    reasons = np.full(len(frame), "", dtype=object)
    if "status" in frame:
        status = frame["status"].astype(object).fillna("").astype(str).str.strip().str.lower()
        open_ = ~status.isin(FINISHED)
        told = status[open_]
        if "reason" in frame:
            # A reason may be the message of an exception, line breaks included.
            given = frame.loc[open_, "reason"].astype(object).fillna("").astype(str)
            given = given.str.replace(CONTROL, " ", regex=True)
            told = told.where(given == "", told + ": " + given)
        reasons[open_.to_numpy()] = told.to_numpy()
    # pandas compares NaN with NaN as equal here, so a row of a diverged run that stands twice is found as well.
    # Cells of Parquet may be lists, which cannot be hashed.
    lists = [column for column in frame if pd.api.types.is_object_dtype(frame[column])]
    flat = frame.astype(dict.fromkeys(lists, str))
    again = flat.duplicated(keep="first").to_numpy() & (reasons == "")
    reasons[again] = "the same row stands in the table before"
    return reasons


def _check_arms(frame: pd.DataFrame, name: str) -> None:
    empty = frame["arm"].isna().to_numpy() | (frame["arm"].astype(str).str.strip() == "").to_numpy()
    _refuse(frame, name, "arm", empty, "the name of the arm that the run belongs to")
    frame["arm"] = frame["arm"].astype(str).str.strip()


def _numbers(frame: pd.DataFrame, column: str, name: str, used: Any) -> Any:
    import pandas as pd

    values = frame[column]
    if pd.api.types.is_bool_dtype(values):
        raise TableError(f"{name}, column {column}: found true and false; a number is wanted.")
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    text = values.notna().to_numpy() & numbers.isna().to_numpy() & used
    text[text] = values[text].astype(str).str.strip().str.lower().ne("nan").to_numpy()
    _refuse(frame, name, column, text, "a number such as 339700000 or 3.397e8")
    if column != "loss":
        bad = np.isinf(numbers.to_numpy()) if column in NUMBERS else ~np.isfinite(numbers.to_numpy())
        missing = used & bad
        _refuse(frame, name, column, missing, "a finite number")
    return numbers


def _refuse(frame: pd.DataFrame, name: str, column: str, bad: Any, wanted: str, remedy: str = "") -> None:
    rows = np.flatnonzero(bad)
    if not len(rows):
        return
    found = frame[column].iloc[rows[0]]
    others = f" (and {len(rows) - 1:,} more rows)" if len(rows) > 1 else ""
    raise TableError(
        f"{name}, column {column}, row {rows[0] + 1}{others}: found {_shown(found)}; {wanted} is wanted. "
        f"{remedy or 'Correct the table, or take the row out.'}"
    )


def _check_flops(frame: pd.DataFrame, name: str, used: Any, convention: str | None) -> None:
    if convention is None:
        return
    if convention not in ("6nd", ANY):
        raise TableError(
            f'{name}: convention "{convention}" cannot be checked from params and tokens. Use 6nd, any, or none.'
        )
    named = frame["convention"].astype(object).fillna("").astype(str).str.lower() if "convention" in frame else None
    _check_unit(frame[used], name)
    for arm, group in frame[used].groupby("arm", sort=True):
        ratio = (group["flops"] / (6.0 * group["params"] * group["tokens"])).to_numpy()
        off = np.abs(ratio - 1.0) > TOLERANCE
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
            f"gives {counted:.4g}; what was found is {worst['flops'] / counted:.3g} times that. Where params is a label (399M for "
            f"{worst['flops'] / (6.0 * worst['tokens']) / 1e6:.4g}M), write the true count; where flops count more than 6ND or "
            "params count more than is active, name the count in a column convention, or pass the convention none."
        )


def _check_unit(used: pd.DataFrame, name: str) -> None:
    """Refuse FLOPs in a larger unit: no count of a training run lies a million times below 6 * params * tokens."""
    for arm, group in used.groupby("arm", sort=True):
        ratio = float((group["flops"] / (6.0 * group["params"] * group["tokens"])).median())
        if ratio > UNIT:
            continue
        near = [unit for unit, size in UNITS.items() if 1.0 / 3.0 < ratio * size < 3.0]
        raise TableError(
            f"{name}, column flops, arm {arm}: what was found is {ratio:.3g} times 6 * params * tokens"
            f"{f', so it is in {near[0]}' if near else ''}. The column holds FLOPs: multiply by the number of FLOPs in its unit"
            f"{f' ({UNITS[near[0]]:.4g})' if near else ', or correct params and tokens'}."
        )


def _is_a_pattern(group: pd.DataFrame, ratio: Any) -> bool:
    """Whether an arm's FLOPs follow another count: a smooth function of size, whatever it counts."""
    logs = np.log(ratio)
    if np.ptp(logs) <= 2 * TOLERANCE:
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
