"""Tables as other tools export them: file formats, column names, units and missing counts, made into a table of runs.

Nothing is guessed in silence: `translated` returns a sentence for everything that it assumed. Values stay as they are but for
units; `analysis.data.table.check_table` checks them afterwards.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.errors import UserError
from scaling.units import FLOPS_PER_PFLOPS_DAY

if TYPE_CHECKING:
    import pandas as pd


class TableError(UserError):
    """A table of runs that cannot be used."""


FLOPS_PER_UNIT = {
    "PFLOP/s-days": FLOPS_PER_PFLOPS_DAY,
    "GFLOPs": 1e9,
    "TFLOPs": 1e12,
    "PFLOPs": 1e15,
    "EFLOPs": 1e18,
    "ZFLOPs": 1e21,
}
"""FLOPs in each unit that tables use."""

ALIASES = {
    "arm": "optimizer optimizer_name optimizer_type optim method model_type variant architecture",
    "params": (
        "params_non_embedding non_embedding_params model_params_non_embedding num_scaling_params n active_params "
        "n_params num_params num_parameters parameters parameter_count total_params model_size size"
    ),
    "tokens": (
        "d tokens_trained total_tokens num_tokens n_tokens training_tokens train_tokens tokens_seen data_tokens "
        "throughput_total_tokens num_input_tokens_seen data"
    ),
    "flops": (
        "c compute training_flop training_flops train_flops compute_flops total_flops total_flos train_total_flos "
        "flops_budget throughput_total_gflops total_gflops throughput_total_training_gflops gflops tflops pflops eflops "
        "zflops pflop_s_days pf_days pflops_days"
    ),
    "loss": "val_loss validation_loss eval_loss valid_loss test_loss final_loss l val_bpb eval_bpb bits_per_byte",
    "run": "run_id run_name run_path",
    "step": "global_step steps num_iterations iteration iterations num_steps train_steps",
    "batch_tokens": "batch_size_in_tokens tokens_per_batch tokens_per_step global_batch_tokens total_batch_size",
    "peak_lr": "learning_rate_peak peak_learning_rate max_lr lr learning_rate",
    "seconds": "train_time_sec runtime train_runtime training_seconds",
    "seed": "random_seed data_seed",
    "status": "state run_state",
}
"""Names of each column in exports, best first, in the spelling of `plain_name`. None is a training loss."""

BATCH = ("train_batch_size", "global_batch_size", "global_train_batch_size", "batch_size")
CONTEXT = ("seq_len", "sequence_length", "max_seq_len", "max_sequence_length", "seqlen", "context", "block_size")

CURRENT = ("lr", "learning_rate")
"""Names of the peak learning rate in a table of settings; in rows of metrics they are the rate of the step."""
COUNT_COLUMNS = ("params", "tokens", "flops", "batch_tokens")
OPTIONAL_NUMBERS = ("step", "batch_tokens", "peak_lr", "seconds")
NUMBER = re.compile(r"([0-9][0-9,_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?) ?([kmbgt]?)", re.IGNORECASE)
SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
ENDINGS = (".csv", ".tsv", ".txt", ".parquet", *JSON_ENDINGS)


def stem(path: Path) -> str:
    """A file's name without the ending of its format and compression."""
    return Path(path.name.removesuffix(".gz")).stem


def read_frame(path: Path) -> pd.DataFrame:
    """The rows of a file, or of all files of a folder with the columns `file` and `folder`.

    Raises:
        TableError: The file is missing or is no table, or the folder has none.
    """
    import pandas as pd

    if path.is_dir():
        files = [*path.glob("*"), *path.glob("*/*")]
        files = sorted(file for file in files if file.name.removesuffix(".gz").endswith(ENDINGS) and file.is_file())
        if not files:
            raise TableError(
                f"{path}: the folder holds no table. Give a folder with files such as adamw.csv and muon.csv."
            )
        parts = [read_frame(file).assign(file=stem(file), folder=file.parent.name) for file in files]
        return pd.concat(parts, ignore_index=True)
    if not path.is_file():
        raise TableError(
            f"{path}: there is no such file. Give a table with columns arm, params, tokens, flops and loss."
        )
    name = path.name.removesuffix(".gz")
    if not name.endswith(ENDINGS):
        raise TableError(f'{path}: the ending "{path.suffix}" is not known. Use .csv, .tsv, .jsonl or .parquet.')
    try:
        if name.endswith(".parquet"):
            return pd.read_parquet(path)
        if name.endswith(JSON_ENDINGS):
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
            flat = pd.json_normalize(rows, sep="/")
            return flat.rename(columns=lambda column: str(column).removeprefix("summary/"))
        return pd.read_csv(path, sep="\t" if name.endswith(".tsv") else ",", low_memory=False)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(
            f"{path}: cannot be read as a table ({first}). Write a CSV with one header line of column names, or Parquet."
        ) from None


def plain_name(column: object) -> str:
    """A column's name without what exports differ in: ``val/loss``, ``Val Loss`` and ``config/val.loss`` are ``val_loss``."""
    name = re.sub(r"[^a-z0-9]+", "_", str(column).strip().lower()).strip("_")
    return name.removeprefix("config_").removeprefix("summary_").removesuffix("_value")


def translated(
    frame: pd.DataFrame, name: str, *, columns: Mapping[str, str] | None = None, last: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of an export with the columns of a table of runs, and what was assumed for it.

    Args:
        frame: The rows as they were read.
        name: Name of the table in errors.
        columns: The export's column for a column of the table: ``{"loss": "val/loss"}``.
        last: Column that names the run; of several rows of a run the last one with a loss stays.

    Raises:
        TableError: A named column is not there.
    """
    frame, notes = frame.copy(deep=False), list[str]()
    if frame.columns.has_duplicates:  # refused by `check_table`
        return frame, notes
    for target, column in (columns or {}).items():
        _check_column(frame, name, column, f"--map {target}={column}")
        frame[target] = frame[column]
        _convert(frame, target, column, notes, named=True)
    plain: dict[str, Any] = {}
    for column in frame.columns:
        if frame[column].notna().any():
            plain.setdefault(plain_name(column), column)
    for target, words in ALIASES.items():
        known = [word for word in (target, *words.split()) if word in plain and (last is None or word not in CURRENT)]
        if target in frame or not known:
            continue
        if target in OPTIONAL_NUMBERS and not _numbers(frame[plain[known[0]]]).notna().any():
            continue
        frame[target] = frame[plain[known[0]]]
        _convert(frame, target, plain[known[0]], notes)
    if "arm" not in frame:
        varied = [column for column in ("folder", "file") if column in frame and frame[column].nunique() > 1]
        frame["arm"] = frame[varied[0]] if varied else stem(Path(name))
        notes.append(f"arm is the {varied[0] if varied else 'name of the file'}")
    for column in COUNT_COLUMNS:
        if column in frame:
            frame[column] = _spelled_out(frame[column])
    if last is not None:
        frame = _last_rows(frame, name, last, notes)
    _derive(frame, plain, notes)
    return frame, notes


def _check_column(frame: pd.DataFrame, name: str, column: str, option: str) -> None:
    if column in frame:
        return
    near = difflib.get_close_matches(column, [str(known) for known in frame.columns], n=3, cutoff=0.4)
    hint = f"; near it: {', '.join(near)}" if near else f". Its columns: {', '.join(map(str, frame.columns[:20]))}"
    raise TableError(f'{name}: {option} names column "{column}", which the table does not have{hint}.')


def _convert(frame: pd.DataFrame, target: str, column: str, notes: list[str], *, named: bool = False) -> None:
    """Note the origin of a column, and convert FLOPs whose unit is in the column's name."""
    word, unit = plain_name(column), None
    if target == "flops":
        shown = {re.sub(r"[^a-z]+", "_", known.lower()): known for known in FLOPS_PER_UNIT}
        shown |= {"pf_days": "PFLOP/s-days", "pflops_days": "PFLOP/s-days"}
        unit = next((known for ending, known in shown.items() if word.endswith(ending)), None)
    if unit is not None:
        frame["flops"] = _numbers(frame["flops"]) * FLOPS_PER_UNIT[unit]
    bits = " in bits per byte" if target == "loss" and ("bpb" in word or "bits_per_byte" in word) else ""
    if unit or bits or not (named or word == target):
        notes.append(f"{target} is {column}{f' in {unit}' if unit else bits}")


def _spelled_out(values: pd.Series) -> pd.Series:
    """A column with ``125M`` as 1.25e8 and ``10,000`` as 1e4; cells that are no such number stay as they are."""
    import pandas as pd

    def number(value: Any) -> Any:
        found = NUMBER.fullmatch(str(value).strip())
        return float(re.sub("[,_]", "", found[1])) * SUFFIXES[found[2].lower()] if found else value

    return values if pd.api.types.is_numeric_dtype(values) else values.astype(object).map(number)


def _last_rows(frame: pd.DataFrame, name: str, last: str, notes: list[str]) -> pd.DataFrame:
    """The last row with a loss of each run. Exports log counts and losses in different rows, so counts are carried on."""
    _check_column(frame, name, last, f"--last {last}")
    keys = list(dict.fromkeys(column for column in (last, "arm", "folder", "file") if column in frame))
    order = next((column for column in ("step", "tokens") if column in frame), None)
    rows = frame if order is None else frame.sort_values(order, kind="stable")
    own = [column for column in rows.columns if column not in (*keys, "loss")]
    rows = rows.assign(**rows.groupby(keys, sort=False, dropna=False)[own].ffill())
    if "loss" in rows:
        rows = rows[rows["loss"].notna()]
    rows = rows.groupby(keys, sort=False, dropna=False).tail(1).sort_index()
    notes.append(f"{len(frame):,} rows are reduced to the last of {len(rows):,} runs")
    return rows.reset_index(drop=True)


def _derive(frame: pd.DataFrame, plain: Mapping[str, Any], notes: list[str]) -> None:
    """Counts that the export leaves out: tokens from steps, and one of N, D and C from the other two under C = 6ND."""
    batch, context = (next((plain[word] for word in words if word in plain), None) for words in (BATCH, CONTEXT))
    if "tokens" not in frame and "step" in frame:
        if "batch_tokens" not in frame and batch is not None and context is not None:
            frame["batch_tokens"] = _numbers(frame[batch]) * _numbers(frame[context])
            notes.append(f"batch_tokens = {batch} * {context}")
        if "batch_tokens" in frame:
            frame["tokens"] = _numbers(frame["step"]) * _numbers(frame["batch_tokens"])
            notes.append("tokens = step * batch_tokens")
    absent = [column for column in ("params", "tokens", "flops") if column not in frame]
    if len(absent) != 1:
        return
    first, second = (_numbers(frame[column]) for column in ("params", "tokens", "flops") if column != absent[0])
    frame[absent[0]] = 6.0 * first * second if absent == ["flops"] else second / (6.0 * first)
    formula = {"flops": "6 * params * tokens", "params": "flops / (6 * tokens)", "tokens": "flops / (6 * params)"}
    notes.append(f"{absent[0]} = {formula[absent[0]]}, the convention 6nd")
    if absent == ["flops"] and "convention" not in frame:
        frame["convention"] = "6nd"


def _numbers(values: pd.Series) -> pd.Series:
    """A column as floats, NaN where a cell is no number."""
    import pandas as pd

    return pd.to_numeric(_spelled_out(values), errors="coerce").astype(float)
