"""Runs side by side: a failed or killed run does not affect the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import msgspec
import pytest
from running import numbers, place
from tiny import make_spec
from waiting import until

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from scaling.training.loop import train
from scaling.training.pool import ProcessPool, device_slots, note_kill, side_by_side, train_in_process


def _kill(path: Path) -> None:
    directory = RunDirectory(path)
    while not directory.metrics():
        time.sleep(0.01)
    os.kill(directory.attempts()[-1].pid, signal.SIGKILL)


def test_runs_next_to_failed_and_killed_ones_are_unaffected(tiny_shards: Path, tmp_path: Path) -> None:
    manifest = manifest_hash(read_manifest(tiny_shards))
    good = make_spec(seed=1, manifest=manifest)
    alone = place(good, tmp_path / "alone", tiny_shards)
    train(alone, progress=False)
    endless = make_spec(seed=3, steps=4000, manifest=manifest)
    endless = msgspec.structs.replace(endless, data=msgspec.structs.replace(endless.data, repeat=True))
    paths = {
        "wrong data": place(make_spec(seed=2, manifest="0" * 64), tmp_path, tiny_shards),
        "killed": place(endless, tmp_path, tiny_shards, every=1e9),
        "good": place(good, tmp_path, tiny_shards),
        "another": place(make_spec(seed=4, manifest=manifest), tmp_path, tiny_shards),
    }
    killer = threading.Thread(target=_kill, args=(paths["killed"],), daemon=True)
    killer.start()
    codes: dict[str, int] = {}

    def ended(directory: RunDirectory, code: int) -> None:
        codes[next(name for name, path in paths.items() if path == directory.path)] = code

    side_by_side(paths.values(), at_once=2, work=train_in_process, ended=ended)
    killer.join(10)
    assert codes == {"wrong data": 2, "killed": -signal.SIGKILL, "good": 0, "another": 0}
    assert "the run was planned for" in str(RunDirectory(paths["wrong data"]).failure())
    assert "SIGKILL" in note_kill(RunDirectory(paths["killed"]), codes["killed"])
    states = {name: RunDirectory(path).state() for name, path in paths.items()}
    assert states == {"wrong data": "failed", "killed": "failed", "good": "finished", "another": "finished"}
    assert numbers(paths["good"]) == numbers(alone)


def test_slots_use_every_device_before_sharing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_slots(2) == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert device_slots(1) == ["3", "5"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert device_slots(4) == []


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_a_killed_fork_server_is_reported(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def start(self: object) -> None:
        raise error  # what multiprocessing raises when the server ends between the request and the fork

    monkeypatch.setattr(ForkServerProcess, "start", start)
    with pytest.raises(UserError, match="the server process that forks training processes was killed"):
        side_by_side(
            [place(make_spec(), tmp_path, tiny_shards)], at_once=1, work=train_in_process, ended=lambda *_: None
        )


def _sleep(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(path).touch()
    time.sleep(600)


def test_a_pool_kills_workers_after_the_grace_period(tmp_path: Path) -> None:
    with ProcessPool() as pool:
        pool.start("sleeper", _sleep, str(tmp_path / "started"))
        until((tmp_path / "started").exists, "the worker did not start")
        assert pool.active == ("sleeper",)
        assert [tuple(worker) for worker in pool.stop(0.5)] == [("sleeper", -signal.SIGKILL)]
        assert pool.active == ()
