"""Cooldown branches: the numbers of a run trained whole, for the cost of its decay."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
from running import at_step
from safetensors.torch import load_file
from tiny import make_spec

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.run.directory import RunDirectory
from scaling.spec import Placement, RunSpec, Schedule
from scaling.training.loop import train
from scaling.training.warm_start import check_branch

BATCH = 128


def wsd(steps: int, decay: int, shards: Path, **changes: object) -> RunSpec:
    spec = make_spec(steps=steps, optimizer="muon", manifest=manifest_hash(read_manifest(shards)))
    schedule = Schedule(kind="wsd", warmup_tokens=2 * BATCH, decay_tokens=decay * BATCH)
    return msgspec.structs.replace(spec, schedule=schedule, **changes)


def run(spec: RunSpec, folder: Path, shards: Path, keep: tuple[int, ...] = ()) -> RunDirectory:
    directory = RunDirectory(folder / spec.id)
    placement = Placement(data=str(shards), device="cpu", checkpoint_seconds=1e9, keep_tokens=keep)
    directory.create(spec, placement)
    train(directory.path, progress=False)
    return directory


def numbers(directory: RunDirectory, *, after: int) -> tuple[object, ...]:
    record = directory.record()
    assert record is not None
    rows = [(row.step, row.train_loss, row.grad_norm) for row in directory.metrics() if row.step > after]
    weights = {name: value.numpy().tobytes() for name, value in load_file(directory.weights_file).items()}
    return record.validation_loss, record.train_loss, record.tokens, rows, weights


def first_steps(directory: RunDirectory) -> list[int]:
    return [attempt.step for attempt in directory.attempts() if attempt.event == "start"]


@pytest.fixture
def trunk(tiny_shards: Path, tmp_path: Path) -> RunDirectory:
    """A trunk of 30 steps that keeps checkpoints after 9 and after 15."""
    return run(wsd(30, 6, tiny_shards), tmp_path, tiny_shards, keep=(9 * BATCH, 15 * BATCH))


@pytest.mark.parametrize(("steps", "decay"), [(12, 3), (20, 5)])
def test_a_branch_has_the_numbers_of_the_whole_run(
    trunk: RunDirectory, tiny_shards: Path, tmp_path: Path, steps: int, decay: int
) -> None:
    whole = run(wsd(steps, decay, tiny_shards), tmp_path / "whole", tiny_shards)
    branch = run(wsd(steps, decay, tiny_shards, branch_of=trunk.path.name), tmp_path, tiny_shards)
    assert first_steps(branch) == [steps - decay]
    assert numbers(branch, after=steps - decay) == numbers(whole, after=steps - decay)


def test_a_stopped_branch_continues_from_its_own_checkpoint(
    trunk: RunDirectory, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(wsd(20, 5, tiny_shards), tmp_path / "whole", tiny_shards)
    at_step(monkeypatch, 17, lambda: os.kill(os.getpid(), signal.SIGTERM))
    branch = run(wsd(20, 5, tiny_shards, branch_of=trunk.path.name), tmp_path, tiny_shards)
    assert branch.record() is None
    train(branch.path, progress=False)
    assert first_steps(branch) == [15, 17]
    assert numbers(branch, after=15) == numbers(whole, after=15)


def test_a_branch_without_trunk_is_trained_whole(tiny_shards: Path, tmp_path: Path) -> None:
    whole = run(wsd(12, 3, tiny_shards), tmp_path / "whole", tiny_shards)
    branch = run(wsd(12, 3, tiny_shards, branch_of="0" * 12), tmp_path, tiny_shards)
    assert first_steps(branch) == [0]
    assert numbers(branch, after=0) == numbers(whole, after=0)


def test_kept_checkpoints_do_not_change_the_trunk(trunk: RunDirectory, tiny_shards: Path, tmp_path: Path) -> None:
    plain = run(wsd(30, 6, tiny_shards), tmp_path / "plain", tiny_shards)
    assert plain.path.name == trunk.path.name
    assert numbers(plain, after=0) == numbers(trunk, after=0)


def test_a_trunk_with_other_first_steps_is_rejected(tiny_shards: Path) -> None:
    trunk = wsd(30, 6, tiny_shards)
    with pytest.raises(UserError, match="they differ in seed"):
        check_branch(wsd(12, 3, tiny_shards, branch_of=trunk.id, seed=1), trunk)
    with pytest.raises(UserError, match="Make the trunk longer"):
        check_branch(wsd(29, 3, tiny_shards, branch_of=trunk.id), trunk)
    with pytest.raises(UserError, match='need the schedule "wsd"'):
        check_branch(make_spec(), trunk)


def test_branch_of_does_not_change_other_ids() -> None:
    assert make_spec().id == "40be2e997cfb"
