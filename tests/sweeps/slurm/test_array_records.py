"""Records of arrays and claims of runs."""

from __future__ import annotations

from pathlib import Path

from scaling.run.directory import RunDirectory
from sweeps.slurm import array_records
from sweeps.slurm.array_records import ArrayRecord


def test_a_claim_moves_from_its_owner_or_a_dropped_array(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "runs" / "r").path.mkdir(parents=True)
    first = array_records.save(tmp_path, ArrayRecord(token="first", name="n", runs=("r",), code="c"))
    array_records.save(tmp_path, ArrayRecord(token="third", name="n", runs=("r",), code="c"))
    assert array_records.claim(tmp_path, "r", "first")
    assert not array_records.claim(tmp_path, "r", "second")
    assert not array_records.claim(tmp_path, "r", "second", instead_of="another")
    assert array_records.claim(tmp_path, "r", "third", instead_of="first")
    array_records.drop(tmp_path, first)
    assert not array_records.claim(tmp_path, "r", "second")
    (tmp_path / array_records.FOLDER / "third.json").unlink()
    assert array_records.claim(tmp_path, "r", "second")
