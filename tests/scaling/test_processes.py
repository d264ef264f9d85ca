"""One run in several processes: the same numbers as in one process, and errors with a remedy."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
from running import finish
from safetensors.torch import load_file
from tiny import TINY, TINY_MOONLIGHT, make_spec

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.models.decoder import Decoder
from scaling.optim.registry import OPTIMIZERS
from scaling.run.directory import RunDirectory
from scaling.run.record import RunRecord
from scaling.spec import Evaluation, Placement, RunSpec
from scaling.training.launch import share_of_batch


@pytest.fixture
def spec(tiny_shards: Path) -> RunSpec:
    manifest = manifest_hash(read_manifest(tiny_shards))
    return make_spec(shape=TINY_MOONLIGHT, steps=10, optimizer="muon", manifest=manifest)


def directory_for(spec: RunSpec, folder: Path, shards: Path, **placement: object) -> Path:
    directory = RunDirectory(folder / spec.id)
    placed = Placement(data=str(shards), device="cpu", **{"checkpoint_seconds": 1e9, **placement})  # type: ignore[arg-type]
    directory.create(spec, placed)
    return directory.path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "weights.safetensors")


def same(several: Path, one: Path, record: RunRecord, reference: RunRecord) -> None:
    """Equal up to the order of summation; a router can choose differently between near equals, so losses are compared."""
    assert record.tokens == reference.tokens
    assert record.validation_loss == pytest.approx(reference.validation_loss, abs=2e-3)
    assert record.train_loss == pytest.approx(reference.train_loss, abs=2e-3)
    ours, theirs = weights(several), weights(one)
    assert ours.keys() == theirs.keys()
    first = RunDirectory(several).metrics()[0], RunDirectory(one).metrics()[0]
    assert first[0].train_loss == pytest.approx(first[1].train_loss, abs=1e-5)
    assert first[0].grad_norm == pytest.approx(first[1].grad_norm, rel=1e-4)
    assert first[0].load_imbalance == first[1].load_imbalance  # counted over all processes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_processes_match_one(spec: RunSpec, tiny_shards: Path, tmp_path: Path, strategy: str) -> None:
    one = directory_for(spec, tmp_path / "one", tiny_shards)
    four = directory_for(spec, tmp_path / "four", tiny_shards, devices=4, strategy=strategy)
    reference = finish(one)
    record = finish(four)
    same(four, one, record, reference)
    assert record.device.count == 4
    assert [attempt.event for attempt in RunDirectory(four).attempts()] == ["start", "end"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_rank_stops_the_run_which_then_continues(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, strategy: str
) -> None:
    from scaling.training.checkpoint import newest_checkpoint

    whole = directory_for(spec, tmp_path / "whole", tiny_shards, devices=2, strategy=strategy, checkpoint_seconds=0.0)
    stopped = directory_for(
        spec, tmp_path / "stopped", tiny_shards, devices=2, strategy=strategy, checkpoint_seconds=0.0
    )
    reference = finish(whole)
    killer = threading.Thread(target=_kill_a_worker, args=(stopped,), daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"process \d of 2 ended with code -9|process \d"):
        finish(stopped)
    killer.join()
    assert newest_checkpoint(RunDirectory(stopped).checkpoints) is not None
    assert RunDirectory(stopped).state() == "failed"
    record = finish(stopped)
    assert record.attempts == 2
    assert record.validation_loss == reference.validation_loss
    ours, theirs = weights(stopped), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


PLACES: dict[str, dict[str, object]] = {
    "one": {},
    "ddp": {"devices": 2, "strategy": "ddp"},
    "fsdp2": {"devices": 2, "strategy": "fsdp2"},
}
MOVES = ["one", "fsdp2", "ddp", "one", "ddp", "fsdp2", "one"]
"""Each place to each of the others."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_continues_under_another_strategy(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    shape = msgspec.structs.replace(
        TINY, layers=2
    )  # one layer's parameters have the same order in groups and in the model
    manifest = manifest_hash(read_manifest(tiny_shards))
    spec = make_spec(shape=shape, steps=len(MOVES), optimizer=name, manifest=manifest, times=0)
    for step, place in enumerate(MOVES):
        # Each stage trains from the checkpoint that the stage before kept to the end, and keeps one a step further on.
        keep = ((step + 1) * spec.batch_tokens,)
        path = directory_for(spec, tmp_path / str(step), tiny_shards, keep_tokens=keep, **PLACES[place])
        directory = RunDirectory(path)
        directory.checkpoints.mkdir()
        if step:
            kept = next((tmp_path / str(step - 1) / spec.id / "checkpoint").glob("branch-*"))
            shutil.copy(kept, directory.checkpoints / kept.name.replace("branch", "step"))
        record = finish(path)
        assert directory.attempts()[0].step == step
        if not step:
            reference, expected = record, weights(path)
        # Gradients of two processes are added in another order: rounding in fp32.
        assert record.validation_loss == pytest.approx(reference.validation_loss, abs=1e-5)
        for key, weight in weights(path).items():
            torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bf16_in_several_processes_matches_one(spec: RunSpec, tiny_shards: Path, tmp_path: Path, strategy: str) -> None:
    spec = msgspec.structs.replace(spec, precision="bf16", evaluation=Evaluation(tokens=512, times=0))
    rows = []
    for folder, placed in (("one", {}), ("two", {"devices": 2, "strategy": strategy, "recompute": True})):
        path = directory_for(spec, tmp_path / folder, tiny_shards, **placed)
        finish(path)
        rows.append(RunDirectory(path).metrics()[0])
    # The forward pass is equal but for the mean over processes; a bf16 residual stream moved this loss by 5e-4.
    assert rows[1].train_loss == pytest.approx(rows[0].train_loss, abs=1e-6)
    # Gradients of each process's share are rounded to bf16 before they are added.
    assert rows[1].grad_norm == pytest.approx(rows[0].grad_norm, rel=1e-2)


def _kill_a_worker(path: Path) -> None:
    """Kill one of the ranks once there are two checkpoints."""
    import multiprocessing
    import os
    import signal

    from scaling.training.checkpoint import checkpoint_files

    while len(checkpoint_files(RunDirectory(path).checkpoints)) < 2:
        time.sleep(0.005)
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(
        UserError, match=r"3 processes do not divide the 8 sequences .* Use 2 of them, or a batch of 144\."
    ):
        share_of_batch(make_spec(windows=8), Placement(data="x", devices=3))
    with pytest.raises(UserError, match=r"the 4 sequences that each of 2 processes trains on. Use one of 1, 2, 4"):
        share_of_batch(make_spec(windows=8), Placement(data="x", devices=2, micro_batch=3))
    assert share_of_batch(make_spec(windows=8), Placement(data="x", devices=4, micro_batch=1)) == (2, 1)


def test_several_nodes_need_a_launcher(spec: RunSpec, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Start one process per device with srun or torchrun"):
        finish(directory_for(spec, tmp_path, tiny_shards, devices=2, nodes=2))


def test_out_of_memory_names_a_smaller_micro_batch(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Decoder.loss

    def hungry(self: Decoder, sequences: torch.Tensor) -> torch.Tensor:
        if len(sequences) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss(self, sequences)

    monkeypatch.setattr(Decoder, "loss", hungry)
    path = directory_for(spec, tmp_path, tiny_shards)
    for micro_batch, remedy in ((None, 4), (4, 2)):
        placed = msgspec.structs.replace(RunDirectory(path).placement(), micro_batch=micro_batch)
        RunDirectory(path).create(spec, placed)
        with pytest.raises(UserError, match=rf"Set micro_batch = {remedy} in \[placement\]"):
            finish(path)
        assert RunDirectory(path).state() == "failed"
        assert "out of memory" in str(RunDirectory(path).attempts()[-1].reason)
    RunDirectory(path).create(spec, msgspec.structs.replace(placed, micro_batch=2))
    assert finish(path).status == "finished"


def test_recomputation_changes_no_number(spec: RunSpec, tiny_shards: Path, tmp_path: Path) -> None:
    kept = directory_for(spec, tmp_path / "kept", tiny_shards)
    again = directory_for(spec, tmp_path / "again", tiny_shards, recompute=True)
    assert finish(kept).validation_loss == finish(again).validation_loss
    ours, theirs = weights(again), weights(kept)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_optimizer_seconds_exclude_evaluation(
    spec: RunSpec, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scaling.training import metrics

    def slow(*_: object, **__: object) -> float:
        time.sleep(0.5)
        return 1.0

    monkeypatch.setattr(metrics, "held_out_loss", slow)
    record = finish(directory_for(spec, tmp_path, tiny_shards))
    assert record.optimizer_seconds is not None
    assert 0 < record.optimizer_seconds < 0.05  # two sleeps in ten steps would make 0.1
    assert record.peak_memory is not None
    assert record.peak_memory > 2**26
