"""Training dynamics and QK-clip: measuring changes no number, and a resumed run measures and clips the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
import torch
from running import at_step, finish, numbers, place
from tiny import TINY_MOONLIGHT, make_spec

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.optim.diagnostics import parameter_class
from scaling.optim.registry import complete
from scaling.run.directory import RunDirectory
from scaling.run.record import DynamicsRow
from scaling.spec import OptimizerSpec, Placement, RunSpec
from scaling.training.loop import train

STEPS, TIMES = 12, 3


def a_spec(shards: Path, *, times: int | None = TIMES, optimizer: str = "muon", **options: float | str) -> RunSpec:
    spec = make_spec(shape=TINY_MOONLIGHT, steps=STEPS, manifest=manifest_hash(read_manifest(shards)))
    return msgspec.structs.replace(
        spec,
        optimizer=complete(OptimizerSpec(name=optimizer, peak_lr=2e-2, options=options)),
        evaluation=msgspec.structs.replace(spec.evaluation, dynamics=times),
    )


def measured(path: Path) -> list[DynamicsRow]:
    return RunDirectory(path).dynamics()


def test_measuring_changes_no_number(tiny_shards: Path, tmp_path: Path) -> None:
    watched = place(a_spec(tiny_shards, update_rms="exact"), tmp_path, tiny_shards)
    alone = place(a_spec(tiny_shards, times=None, update_rms="exact"), tmp_path, tiny_shards)
    record = finish(watched)
    finish(alone)
    assert numbers(watched) == numbers(alone)
    assert not RunDirectory(alone).dynamics_file.exists()
    rows = measured(watched)
    assert [row.step for row in rows] == [4, 8, 12]
    for row in rows:
        assert set(row.update_rms) == {parameter_class(name) for names in record.groups.values() for name in names}
        assert set(row.largest_logit) == {"blocks.0.attention", "blocks.1.attention"}
        matrices = {parameter_class(name) for name in record.groups["muon"]}
        assert set(row.svd_entropy) == matrices
        assert all(0 < entropy <= 1 for entropy in row.svd_entropy.values())
        assert all(row.update_rms[name] == pytest.approx(0.2, rel=0.01) for name in matrices)  # exact mode


@pytest.mark.parametrize("bound", [None, 0.1])
def test_a_stopped_run_measures_and_clips_the_same(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float | None
) -> None:
    spec = a_spec(tiny_shards, **({} if bound is None else {"qk_clip": bound}))
    whole, stopped = (place(spec, tmp_path / name, tiny_shards, every=1e9) for name in ("whole", "stopped"))
    finish(whole)
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(stopped, progress=False) is None
    finish(stopped)
    assert numbers(stopped) == numbers(whole)
    assert measured(stopped) == measured(whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_qk_clip_bounds_the_logits(tiny_shards: Path, tmp_path: Path, optimizer: str) -> None:
    free, bound = (
        place(a_spec(tiny_shards, optimizer=optimizer, **options), tmp_path, tiny_shards, micro_batch=4)
        for options in ({}, {"qk_clip": 0.1})
    )
    finish(free)
    finish(bound)
    before, after = (max(measured(path)[-1].largest_logit.values()) for path in (free, bound))
    assert before > 0.3
    assert after < 0.2  # 0.1 on the batch before the step; on other sequences and after it, a little more
    assert measured(free)[-1].clipped_heads is None
    assert STEPS < measured(bound)[-1].clipped_heads <= 4 * STEPS  # two heads in each of two layers


def test_a_compiled_model_cannot_be_clipped(tiny_shards: Path, tmp_path: Path) -> None:
    spec = a_spec(tiny_shards, qk_clip=100.0)
    directory = RunDirectory(tmp_path / spec.id)
    directory.create(spec, Placement(data=str(tiny_shards), device="cpu", compile=True))
    with pytest.raises(UserError, match=r"qk_clip = 100.* Set compile = false"):
        train(directory.path, progress=False)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_measure_and_clip_the_same(tiny_shards: Path, tmp_path: Path, strategy: str) -> None:
    spec = a_spec(tiny_shards, qk_clip=0.1)
    one = place(spec, tmp_path / "one", tiny_shards, every=1e9)
    two = RunDirectory(tmp_path / "two" / spec.id)
    two.create(
        spec, Placement(data=str(tiny_shards), device="cpu", checkpoint_seconds=1e9, devices=2, strategy=strategy)
    )
    finish(one)
    finish(two.path)
    ours, theirs = measured(two.path)[0], measured(one)[0]
    assert ours.clipped_heads == theirs.clipped_heads
    for kind in ("update_rms", "largest_logit", "svd_entropy"):
        assert getattr(ours, kind) == pytest.approx(getattr(theirs, kind), rel=2e-2)
    assert not torch.distributed.is_initialized()
