"""A campaign file for the machine at hand, made from a built-in campaign with its comments."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from scaling.data.prepare import at_most
from scaling.data.sources.registry import DataConfig
from scaling.data.tokenizer import BYTES, open_tokenizer
from scaling.errors import UserError
from scaling.io import write_atomic
from scaling.spec import Evaluation
from sweeps.config.campaign import campaign_path, load_campaign
from sweeps.config.placement import PEAKS
from sweeps.config.schema import schema_text
from sweeps.config.toml_text import toml_key, toml_value
from sweeps.planning.ladder import rungs_of
from sweeps.planning.plan import plan

SCHEMA_NAME = "campaign.schema.json"
"""Name of the JSON schema beside the campaign, which its first line names."""


def write_starter(path: Path, *, template: str, data: str | None = None, tokenizer: Path | None = None) -> list[Path]:
    """Write a campaign file, named after its file, and the JSON schema beside it; their paths.

    Args:
        path: The new file, ``NAME.toml``.
        template: Name of a built-in campaign, or the path of a file.
        data: File, folder or glob of text to train on; None keeps the template's data.
        tokenizer: A tokenizers JSON file; None keeps bytes.

    Raises:
        UserError: The file exists, the template or the text cannot be read, or the text is too short for the campaign.
    """
    if path.exists():
        raise UserError(f"{path}: there is a file of this name. Give another NAME, or move it aside.")
    head = f'#:schema {SCHEMA_NAME}\n# Begun from "{template}". Change a number and submit again: only what changed is trained.\n'
    text = re.sub(r"\A(#.*\n)*", head, campaign_path(template).read_text())
    text = _with_value(text, (), "name", path.stem)
    text = _with_table(text, "placement", _placement())
    if data is not None:
        own = {"source": "text", "path": str(Path(data).absolute())}
        own |= {} if tokenizer is None else {"tokenizer": str(tokenizer.absolute())}
        text = _with_value(_with_table(text, "data", own), (), "title", f"{template}, trained on {Path(data).name}")
        text = _with_value(text, ("model",), "vocabulary", open_tokenizer(own.get("tokenizer", BYTES)).info.vocabulary)
        text = _fitted(text, msgspec.convert(own, DataConfig), path)
    schema = path.parent / SCHEMA_NAME
    write_atomic(path, text.encode())
    try:
        plan(load_campaign(path), path.parent)
    except UserError:
        path.unlink()
        raise
    write_atomic(schema, schema_text().encode())
    return [path, schema]


def _placement() -> dict[str, Any]:
    """``[placement]`` of this machine: its GPUs if it has some, else its processors."""
    found: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
    gpus = [line.strip() for line in found if line.strip()]
    if not gpus:
        return {"device": "cpu", "threads": 1, "accelerator": "cpu", "utilisation": 0.3}
    known = next((name for name in PEAKS if name.lower() in gpus[0].lower().replace(" ", "")), None)
    if known is None:
        raise UserError(
            f"the peak of this machine's GPU, {gpus[0]}, is not known. Add a row to PEAKS in sweeps/config/placement.py, or "
            "hide the GPU (CUDA_VISIBLE_DEVICES=) to write a campaign for the processors."
        )
    return {"device": "cuda", "accelerator": known, "utilisation": 0.4}


def _fitted(text: str, config: DataConfig, path: Path) -> str:
    """The campaign with as much evaluation as the text can hold out, and several epochs where it is too short for one."""
    if (bounds := at_most(config)) is None:
        return text
    tables = tomllib.loads(text)
    train, held = bounds
    context = tables["model"]["context"]
    fits = (held - 1) // context * context
    if fits < context:
        raise UserError(
            f"{config.path}: holds about {train + held:,} bytes, too few to hold out one sequence of {context:,} tokens. "
            "Name more text."
        )
    if tables.get("evaluation", {}).get("tokens", Evaluation().tokens) > fits:
        text = _with_value(text, ("evaluation",), "tokens", fits)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_text(_with_value(text, ("data",), "repeat", True))
        longest = max(rung.tokens for rung in rungs_of(load_campaign(file)))
    return _with_value(text, ("data",), "repeat", True) if longest > train else text


def _with_value(text: str, table: tuple[str, ...], key: str, value: Any) -> str:
    """The file with one value replaced, or added at the head of its table; comments after it are kept."""
    start, end = _table_span(text, table)
    line = re.compile(rf"^{re.escape(key)}[ \t]*=[ \t]*(\"[^\"\n]*\"|[^#\n]*?)([ \t]*(?:#.*)?)$", re.MULTILINE)
    written = f"{toml_key(key)} = {toml_value(value)}"
    body, count = line.subn(lambda found: written + found[2], text[start:end], count=1)
    return text[:start] + (body if count else f"{written}\n{body}") + text[end:]


def _with_table(text: str, table: str, values: dict[str, Any]) -> str:
    """The file with the content of a table replaced, its sub-tables and comments left out; a new table goes to the end."""
    written = "".join(f"{toml_key(key)} = {toml_value(value)}\n" for key, value in values.items())
    if f"\n[{table}]" not in text:
        return f"{text.rstrip()}\n\n[{table}]\n{written}"
    start, end = _table_span(text, (table,))
    return f"{text[:start]}{written}\n{text[end:]}".rstrip() + "\n"


def _table_span(text: str, table: tuple[str, ...]) -> tuple[int, int]:
    """Start and end of a table's lines, without its header, up to the comments of the next table."""
    start = 0
    if table:
        header = re.search(rf"^\[{re.escape('.'.join(table))}\].*\n", text, re.MULTILINE)
        if header is None:
            return len(text), len(text)
        start = header.end()
    following = re.compile(r"^(#.*\n)*\[", re.MULTILINE).search(text, start)
    return start, following.start() if following else len(text)
