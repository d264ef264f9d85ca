"""What is kept under results/ is what its committed records give today, and what the README says of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling import cli

HOUSE = Path(__file__).parents[1]
KEPT = sorted(folder for folder in (HOUSE / "results").iterdir() if (folder / "runs.csv").exists())
KINDS = (".json", ".md", ".tex", ".svg", ".html")
RECORDS = ("runs.csv", "curves.parquet", "dynamics.parquet", "tuning.json", "trials.csv")


def same(found: Any, kept: Any, where: str) -> None:
    """Equal, numbers within what another processor's rounding leaves of a converged fit."""
    if isinstance(kept, dict):
        assert found.keys() == kept.keys(), where
        for key, value in kept.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(kept, list):
        assert len(found) == len(kept), where
        for number, (one, other) in enumerate(zip(found, kept, strict=True)):
            same(one, other, f"{where}[{number}]")
    elif isinstance(kept, float) and isinstance(found, float):
        assert found == pytest.approx(kept, rel=1e-4, abs=1e-7, nan_ok=True), where
    else:
        assert found == kept, where


@pytest.mark.parametrize("folder", KEPT, ids=[folder.name for folder in KEPT])
def test_kept_results_come_back_from_their_records(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / folder.name
    again.mkdir()
    for name in RECORDS:
        if (folder / name).exists():
            shutil.copyfile(folder / name, again / name)
    verb = "compare" if (folder / "compare.md").exists() else "report"
    monkeypatch.setattr(sys, "argv", ["scaling", verb, str(again)])
    cli.main()
    written = [path for path in folder.rglob("*") if path.suffix in KINDS and path.name not in ("README.md", *RECORDS)]
    assert written
    for path in written:
        made = again / path.relative_to(folder)
        assert made.exists(), path
        if path.suffix == ".json":
            same(json.loads(made.read_bytes()), json.loads(path.read_bytes()), str(path.relative_to(HOUSE)))
        elif path.suffix in (".md", ".tex"):
            assert made.read_text() == path.read_text(), path
        elif path.suffix == ".svg":
            # A picture is the same where its text and its parts are; coordinates may differ in the last digit.
            assert re.sub(r"-?\d+\.\d+", "#", made.read_text()) == re.sub(r"-?\d+\.\d+", "#", path.read_text()), path


@pytest.mark.parametrize(
    ("campaign", "challenger", "told"),
    [
        ("cpu-hour", "muon-reused", "{0} times AdamW's FLOPs (95 % interval {1} to {2}; other laws {3} to {4};"),
        ("cpu-hour", "muon", "as many trials, {0} ({1} to {2}; other laws {3} to {4})"),
        ("demo", "muon", "rates set by hand, {0} ({1} to {2})"),
    ],
)
def test_the_readme_says_what_the_fits_say(campaign: str, challenger: str, told: str) -> None:
    fits = json.loads((HOUSE / "results" / campaign / "fits.json").read_bytes())
    comparison = next(item for item in fits["comparisons"] if item["challenger"] == challenger)
    head = comparison["headline"]
    others = [model["ratio"] for model in comparison["models"] if model["ratio"] is not None]
    numbers = [f"{value:.3f}" for value in (head["ratio"], head["low"], head["high"], min(others), max(others))]
    assert told.format(*numbers) in re.sub(r"\s+", " ", (HOUSE / "README.md").read_text())
