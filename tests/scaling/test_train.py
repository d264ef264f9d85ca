"""Training of one run under signals, kills, damage and a full disk: the numbers are those of an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import warnings
from pathlib import Path

import msgspec
import pytest
import torch
from running import at_step, finish, numbers, place
from tiny import TINY, make_spec

from scaling.data.batches import Batches
from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.io import write_json
from scaling.models.decoder import Decoder
from scaling.optim.registry import OPTIMIZERS
from scaling.run.directory import RunDirectory
from scaling.spec import RunSpec
from scaling.training.checkpoint import AtomicCheckpointIO, checkpoint_files, newest_checkpoint
from scaling.training.diagnostics import Dynamics
from scaling.training.loop import train
from scaling.training.metrics import spread
from scaling.training.module import prefetch

STEPS = 24


@pytest.fixture
def spec(tiny_shards: Path) -> RunSpec:
    return make_spec(steps=STEPS, optimizer="muon", manifest=manifest_hash(read_manifest(tiny_shards)))


def test_a_folder_without_a_spec_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        train(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_numbers(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    whole = place(spec, tmp_path / "whole", tiny_shards)
    finish(whole)
    stopped = place(spec, tmp_path / "stopped", tiny_shards, every=1e9)
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), signum))
    assert train(stopped, progress=False) is None
    assert RunDirectory(stopped).state() == "preempted"
    assert finish(stopped).attempts == 2
    assert numbers(stopped) == numbers(whole)


def test_a_signal_before_the_first_step_stops_the_run(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(spec, tmp_path, tiny_shards, every=1e9)
    with monkeypatch.context() as patch:  # this hook runs between Lightning's signal handlers and those of the run
        patch.setattr(Dynamics, "on_train_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(path, progress=False) is None
    assert RunDirectory(path).state() == "preempted"
    assert finish(path).attempts == 2


def _train_quietly(path: Path) -> None:
    train(path, progress=False)


@pytest.mark.parametrize("step", [1, 13, STEPS])
def test_a_killed_run_ends_with_the_same_numbers(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = place(spec, tmp_path / "whole", tiny_shards)
    finish(whole)
    killed = place(spec, tmp_path / "killed", tiny_shards)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the child only trains
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = multiprocessing.get_context("fork").Process(target=_train_quietly, args=(killed,))
        child.start()
        child.join(60)
    assert child.exitcode == -signal.SIGKILL
    point = newest_checkpoint(RunDirectory(killed).checkpoints)
    assert (point is None) == (step == 1)
    finish(killed)
    assert numbers(killed) == numbers(whole)


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another run"])
def test_a_damaged_checkpoint_is_reported_and_skipped(
    damage: str,
    spec: RunSpec,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, hurt = (place(spec, tmp_path / name, tiny_shards) for name in ("whole", "hurt"))
    finish(whole)
    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(hurt, progress=False) is None
    newest, previous = checkpoint_files(RunDirectory(hurt).checkpoints)
    if damage == "of another run":
        other = place(msgspec.structs.replace(spec, seed=7), tmp_path / "other", tiny_shards)
        newest.unlink()
        at_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(other, progress=False) is None
        foreign = checkpoint_files(RunDirectory(other).checkpoints)[0]
        newest = foreign.rename(previous.parent / foreign.name)
    else:
        newest.write_bytes(newest.read_bytes()[:-100] if damage == "truncated" else b"")
    assert newest_checkpoint(newest.parent) == previous
    assert f"{newest.name}: damaged, or another run's" in capsys.readouterr().err
    finish(hurt)
    assert numbers(hurt) == numbers(whole)


def test_a_full_disk_keeps_the_previous_checkpoint(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = (place(spec, tmp_path / name, tiny_shards) for name in ("whole", "full"))
    finish(whole)
    save, saves = torch.save, []

    def fill_up(value: object, file: object) -> None:
        saves.append(1)
        if len(saves) == 5:
            file.write(b"half a checkpoint")  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        save(value, file)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_up)
        with pytest.raises(OSError, match="No space"):
            train(full, progress=False)
    directory = RunDirectory(full)
    assert directory.state() == "failed"
    assert "No space" in str(directory.attempts()[-1].reason)
    assert not list(directory.checkpoints.glob(".*")), "a temporary file was left"
    finish(full)
    assert numbers(full) == numbers(whole)


def test_a_loss_that_is_not_finite_is_recorded_as_divergence(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(spec, tmp_path, tiny_shards)
    calls: list[int] = []
    loss = Decoder.loss

    def poisoned(self: Decoder, sequences: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(self, sequences) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(Decoder, "loss", poisoned)
    record = finish(path)
    assert record.status == RunDirectory(path).state() == "diverged"
    assert record.validation_loss is None
    assert record.tokens < spec.budget.tokens
    assert "not finite" in str(record.reason)
    assert b"NaN" not in (path / "record.json").read_bytes()


def test_micro_batches_add_up_to_the_batch(spec: RunSpec, tiny_shards: Path, tmp_path: Path) -> None:
    whole = finish(place(spec, tmp_path / "whole", tiny_shards))
    parts = finish(place(spec, tmp_path / "parts", tiny_shards, micro_batch=2))
    # Equal mathematics, another order of summation in fp32.
    assert parts.validation_loss == pytest.approx(whole.validation_loss, abs=1e-4)
    assert parts.tokens == whole.tokens


def test_a_micro_batch_must_divide_the_batch(spec: RunSpec, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="micro_batch 3 does not divide the 8 sequences"):
        train(place(spec, tmp_path, tiny_shards, micro_batch=3), progress=False)


def test_other_data_than_planned_is_rejected(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run was planned for"):
        train(place(make_spec(manifest="0" * 64), tmp_path, tiny_shards), progress=False)
    with pytest.raises(UserError, match="before its data was prepared"):
        train(place(make_spec(manifest=None), tmp_path, tiny_shards), progress=False)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_hostile_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_Bomb(), tmp_path / "step-00000001.x.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step-00000001.x.ckpt", weights_only=False)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_records_its_groups(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    spec = make_spec(steps=40, optimizer=name, manifest=manifest_hash(read_manifest(tiny_shards)))
    record = finish(place(spec, tmp_path, tiny_shards))
    assert record.validation_loss is not None
    assert record.validation_loss < 3.0 < 5.5  # ln 256 = 5.5 before training
    claimed = [parameter for names in record.groups.values() for parameter in names]
    model = Decoder(spec.model)
    assert sorted(claimed) == sorted(dict(model.named_parameters()))
    assert record.parameters["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_arms_start_from_the_same_weights(tiny_shards: Path) -> None:
    states = []
    for name in ("adamw", "muon"):
        model = Decoder(make_spec(optimizer=name).model)
        model.initialise(0)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_run_can_use_the_whole_stream(tiny_shards: Path, tmp_path: Path) -> None:
    per_epoch = Batches(tiny_shards, context=TINY.context, sequences=1).steps
    sequences = max(n for n in range(1, per_epoch) if per_epoch % n == 0)
    spec = make_spec(
        steps=per_epoch // sequences, windows=sequences, manifest=manifest_hash(read_manifest(tiny_shards))
    )
    directory = place(spec, tmp_path / "all", tiny_shards)
    assert finish(directory).tokens == per_epoch * TINY.context


def test_prefetch_keeps_order_and_errors() -> None:
    def fetch(step: int) -> torch.Tensor:
        if step == 3:
            raise UserError("the disk is gone")
        return torch.tensor(step)

    read = prefetch(fetch, range(9))
    assert [int(next(read)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="the disk is gone"):
        next(read)
    assert [int(batch) for batch in prefetch(torch.tensor, range(5))] == [0, 1, 2, 3, 4]


def test_graphs_need_whole_batches(spec: RunSpec, tiny_shards: Path, tmp_path: Path) -> None:
    directory = place(spec, tmp_path / "graphs", tiny_shards)
    placement = RunDirectory(directory).placement()
    write_json(
        RunDirectory(directory).placement_file,
        msgspec.structs.replace(placement, compile=True, graphs=True, micro_batch=4),
    )
    with pytest.raises(UserError, match="micro_batch smaller than the batch"):
        train(directory, progress=False)


def test_the_compiler_cache_is_private(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.runtime.cache_dir_utils as torchs
    from torch._inductor import codecache

    monkeypatch.setattr(codecache, "_HEADER_DIR", codecache._HEADER_DIR)
    monkeypatch.setenv("LOGNAME", "me")  # part of torch's default
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", torchs.default_cache_dir())  # as importing torch leaves it
    monkeypatch.setattr(Decoder, "compile_in_place", lambda self, **_: None)
    directory = RunDirectory(place(spec, tmp_path / "runs", tiny_shards))
    placement = msgspec.structs.replace(directory.placement(), compile=True)
    write_json(directory.placement_file, placement)
    cache = tmp_path / "cache" / "inductor"
    with monkeypatch.context() as patch:
        cache.mkdir(parents=True)
        patch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
        with pytest.raises(UserError, match="belongs to another user"):
            train(directory.path, progress=False)
    finish(directory.path)
    assert torchs.cache_dir() == str(cache)
    assert str(cache / "precompiled_headers") == codecache._HEADER_DIR
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("count", [1, 5, STEPS - 1, STEPS, 10**30])
def test_measurements_are_spread_over_the_steps(count: int) -> None:
    steps = spread(count, STEPS)
    assert len(steps) == min(count, STEPS)
    assert max(steps) == STEPS


def test_too_many_threads_are_rejected(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    directory = RunDirectory(place(spec, tmp_path, tiny_shards))
    write_json(directory.placement_file, msgspec.structs.replace(directory.placement(), threads=1000))
    with pytest.raises(UserError, match="threads = 1,000, and this machine has"):
        train(directory.path, progress=False)
