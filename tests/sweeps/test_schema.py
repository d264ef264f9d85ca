"""The JSON schema of the campaign file, and the line that an error names."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from scaling.errors import UserError
from sweeps.config.campaign import built_in, campaign_path, load_campaign
from sweeps.config.schema import campaign_schema, schema_text
from sweeps.config.toml_text import key_lines, nearest_line, toml_text
from sweeps.planning.plan import plan

FILE = Path(__file__).parents[2] / "sweeps" / "campaign.schema.json"
QUICK = campaign_path("quick").read_text()

WRONG = {
    "seeds = [0]\n\n[data]": "seeds = [-1]\n\n[data]",
    'name = "quick"': 'name = "../quick"',
    'source = "python-library"': 'source = "books"',
    "vocabulary = 256": 'vocabulary = "256"',
    "context = 128": "contextt = 128",
    "ffn_multiple = 8": "ffn_multiple = 0",
    "tokens_per_parameter = 20": "tokens_per_parameter = -20",
    "batch_tokens = 1_024": "batch_tokens = 1_024.5",
    'precision = "fp32"': 'precision = "fp8"',
    'kind = "cosine"': 'kind = "cosin"',
    "warmup = 0.05": "warmup = 1.5",
    "final_fraction = 0.1": "final_fraction = true",
    "tokens = 65_536": "tokens = 0",
    "times = 2": "times = -1",
    'optimizer = "adamw"': 'optimizer = "adamww"',
    "peak_lr = 1e-2": "peak_lr = [1e-2]",
    'name = "83k"\nlayers': 'name = "83 k"\nlayers',
    "layers = 3\nwidth = 24": "layers = 3\nwidths = 24",
    "threads = 1": 'threads = "one"',
    "checkpoint_seconds = 10": "checkpoint_second = 10",
    "utilisation = 0.3": "utilisation = 30",
}
"""Text of the built-in campaign and a wrong text in its place, each on the line that differs."""

FOUND_BY_PLAN = {"source", "optimizer", "threads", "checkpoint_seconds", "utilisation"}
"""Keys whose values are names of rows, or belong to ``[placement]``: `load_campaign` does not know their lines."""


def test_the_committed_schema_is_current() -> None:
    assert FILE.read_text() == schema_text(), "run: python -m sweeps.config.schema > sweeps/campaign.schema.json"


@pytest.mark.parametrize("name", built_in())
def test_built_in_campaigns_are_valid(name: str) -> None:
    tables = tomllib.loads(campaign_path(name).read_text())
    jsonschema.validate(tables, json.loads(FILE.read_text()), cls=jsonschema.Draft202012Validator)
    assert tomllib.loads(toml_text(tables)) == tables


@pytest.mark.parametrize(("right", "wrong"), WRONG.items())
def test_a_wrong_value_is_found_at_its_line(right: str, wrong: str, tmp_path: Path) -> None:
    assert QUICK.count(right) == 1
    text = QUICK.replace(right, wrong)
    line = next(n for n, (a, b) in enumerate(zip(text.split("\n"), QUICK.split("\n"), strict=True), 1) if a != b)
    errors = list(jsonschema.Draft202012Validator(campaign_schema()).iter_errors(tomllib.loads(text)))
    assert line in {_line(text, error) for error in errors}
    (file := tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(UserError, match="wrong.toml" if right.split()[0] in FOUND_BY_PLAN else rf"\(line {line}\)"):
        plan(load_campaign(file), tmp_path)


def _line(text: str, error: jsonschema.ValidationError) -> int | None:
    """The line that an editor marks: that of the key, also where the table around it is reported."""
    unknown = re.search(r"'(\w+)' was unexpected", error.message)
    return nearest_line(key_lines(text), [*error.absolute_path, *(unknown.groups() if unknown else ())])
