"""Leases of runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from waiting import status_of, until

from sweeps.slurm import exit_codes, lease
from sweeps.slurm.lease import Lease, hold, is_held


def test_a_lease_has_one_holder(tmp_path: Path) -> None:
    with hold(tmp_path, beat_seconds=0.5) as held:
        assert held
        with hold(tmp_path, beat_seconds=0.5) as second:
            assert not second
    assert not is_held(tmp_path, beat_seconds=0.5)
    assert not (tmp_path / lease.FILE).exists()


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_silent_lease_is_taken_over_with_any_clock(tmp_path: Path, skew: float) -> None:
    elsewhere = Lease(owner="gone", host="another-node", pid=1, beat=7)
    (tmp_path / lease.FILE).write_bytes(msgspec.json.encode(elsewhere))
    os.utime(tmp_path / lease.FILE, (time.time() + skew,) * 2)
    with hold(tmp_path, beat_seconds=0.05) as held:
        assert held


def test_a_renewed_lease_of_another_node_is_held(tmp_path: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            content = msgspec.json.encode(Lease(owner="alive", host="another-node", pid=1, beat=number))
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").rename(tmp_path / lease.FILE)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        until((tmp_path / lease.FILE).exists, "it does not beat")
        assert is_held(tmp_path, beat_seconds=1.0)
    finally:
        stop.set()
        beating.join()


def test_a_process_that_loses_its_lease_stops(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sweeps.slurm.lease import hold\n"
        "with hold(Path(sys.argv[1]), beat_seconds=0.05) as held:\n"
        "    print(held, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        thief = msgspec.json.encode(Lease(owner="thief", host="another-node", pid=1))
        (tmp_path / "new").write_bytes(thief)
        (tmp_path / "new").rename(tmp_path / lease.FILE)
        assert status_of(process) == exit_codes.LEASE_LOST
    assert msgspec.json.decode((tmp_path / lease.FILE).read_bytes(), type=Lease).owner == "thief"
