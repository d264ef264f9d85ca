"""Fixtures that several test modules share."""

from __future__ import annotations

import os

# Before torch is imported anywhere: tests run two at a time on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text whose bytes follow a rule, so that a tiny model learns something in a dozen steps."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(40):
        lines = [f"{number} plus {part} is {number + part}, and so on.\n" for number in range(60)]
        (folder / f"sums-{part:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte shards of `tiny_text`."""
    from scaling.data.prepare import prepare
    from scaling.data.sources.registry import DataConfig

    folder = tmp_path_factory.mktemp("shards") / "text"
    prepare(DataConfig(source="text", path=str(tiny_text)), folder, progress=False)
    return folder
