"""A dense model's weights in a model with experts: what it computes first, how it is loaded, and what it is charged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from running import finish, place
from safetensors.torch import load_file, save_file
from tiny import make_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from scaling.data.shards import manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.flops import CONVENTIONS, train_flops
from scaling.io import file_sha256, write_json
from scaling.model_config import ModelConfig, MoEConfig
from scaling.models.registry import build_model
from scaling.models.upcycle import load_weights
from scaling.run.directory import RunDirectory
from scaling.spec import RunSpec, WarmStart
from scaling.training.launch import shard
from tests.scaling.optim.processes import run

DENSE = ModelConfig(layers=2, width=16, heads=2, vocabulary=256, context=16, ffn_multiple=8)


def with_experts(experts: int = 8, active: int = 2, **options: object) -> ModelConfig:
    mixture = MoEConfig(num_experts=experts, top_k=active, **{"score": "topk-softmax", **options})  # type: ignore[arg-type]
    return msgspec.structs.replace(DENSE, family="mixtral-moe", moe=mixture)


def dense_model(seed: int = 0) -> torch.nn.Module:
    model = build_model(DENSE)
    model.initialise(seed)
    return model


def upcycled(dense: dict[str, torch.Tensor], shape: ModelConfig, *, seed: int) -> dict[str, torch.Tensor]:
    """Every expert a copy of the feed-forward, all else but the routers the dense model's."""
    model = build_model(shape)
    model.initialise(seed)
    state = model.state_dict()
    for name, value in state.items():
        if ".router." not in name:
            source = f"{name.replace('.experts.', '.')}.weight" if ".experts." in name else name
            value.copy_(dense[source].expand_as(value))
    return state


@pytest.mark.parametrize(("experts", "active"), [(8, 2), (4, 4), (3, 1)])
def test_the_first_logits_are_the_dense_models(experts: int, active: int) -> None:
    dense, model = dense_model(), build_model(with_experts(experts, active))
    model.load_state_dict(upcycled(dense.state_dict(), with_experts(experts, active), seed=1))
    tokens = torch.randint(0, 256, (4, 16))
    torch.testing.assert_close(model(tokens), dense(tokens), rtol=0, atol=2e-6)


def test_softmax_before_topk_starts_with_a_share() -> None:
    dense, model = dense_model(), build_model(with_experts(score="softmax-topk"))
    model.load_state_dict(upcycled(dense.state_dict(), with_experts(score="softmax-topk"), seed=1))
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        share = (model.blocks[0].feed_forward(x) / dense.blocks[0].feed_forward(x)).flatten(1)  # type: ignore[operator, index, union-attr]
    assert 2 / 8 < float(share.median()) < 1


def test_loading_from_a_file_is_the_same_as_in_memory(tmp_path: Path) -> None:
    dense = dense_model()
    save_file(dict(dense.named_parameters()), tmp_path / "weights.safetensors")
    model = build_model(with_experts())
    model.initialise(1)
    load_weights(model, tmp_path / "weights.safetensors", method="upcycle")
    expected = upcycled(dense.state_dict(), with_experts(), seed=1)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def _load_sharded(file: str) -> dict[str, torch.Tensor]:
    model = build_model(with_experts(experts=3))
    model.initialise(1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    shard(model, mesh, precision="fp32")
    load_weights(model, Path(file), method="upcycle")
    return {name: value.full_tensor() for name, value in model.named_parameters() if isinstance(value, DTensor)}


def test_a_sharded_model_loads_its_own_rows(tmp_path: Path) -> None:
    dense = dense_model()
    save_file(dict(dense.named_parameters()), tmp_path / "weights.safetensors")
    expected = upcycled(dense.state_dict(), with_experts(experts=3), seed=1)
    for gathered in run(2, _load_sharded, str(tmp_path / "weights.safetensors")):
        assert all(torch.equal(value, expected[name]) for name, value in gathered.items())


@pytest.fixture
def parent(tiny_shards: Path, tmp_path: Path) -> Path:
    manifest = manifest_hash(read_manifest(tiny_shards))
    path = place(make_spec(shape=DENSE, steps=20, manifest=manifest), tmp_path / "runs", tiny_shards)
    finish(path)
    return path


def child_of(path: Path, *, charged: bool = True, shape: ModelConfig | None = None) -> RunSpec:
    manifest = RunDirectory(path).spec().data.manifest
    spec = make_spec(shape=shape or with_experts(), steps=10, manifest=manifest, peak_lr=1e-3)
    return msgspec.structs.replace(spec, warm_start=WarmStart(run=path.name, method="upcycle", count_flops=charged))


@pytest.mark.parametrize("charged", [True, False])
def test_an_upcycled_run_starts_from_its_parent_and_records_its_flops(
    parent: Path, tiny_shards: Path, charged: bool
) -> None:
    before = RunDirectory(parent).record()
    assert before is not None
    assert before.validation_loss is not None
    spec = child_of(parent, charged=charged)
    record = finish(place(spec, parent.parent, tiny_shards))
    # Ten steps at a small rate from a trained model, where ten steps from nothing end far above.
    assert record.validation_loss is not None
    assert record.validation_loss < before.validation_loss + 0.05
    for name in CONVENTIONS:
        own = train_flops(spec.model, record.tokens, name)
        assert record.flops[name] == own + (before.flops[name] if charged else 0)
    assert record.initial_flops == (before.flops if charged else {})
    assert RunDirectory(parent.parent / spec.id).metrics()[-1].flops == record.flops["6nd"]


def test_a_stopped_upcycled_run_continues_from_its_checkpoint(
    parent: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from running import at_step, numbers

    from scaling.training.loop import train

    spec = child_of(parent)
    whole = place(spec, parent.parent, tiny_shards)
    finish(whole)
    expected = numbers(whole)
    for file in ("record.json", "weights.safetensors", "metrics.jsonl"):
        (whole / file).unlink()
    for point in (whole / "checkpoint").glob("*"):
        point.unlink()
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(whole, progress=False) is None
    finish(whole)
    assert numbers(whole) == expected


def test_a_missing_or_unlike_parent_is_refused(parent: Path, tiny_shards: Path) -> None:
    orphan = msgspec.structs.replace(child_of(parent), warm_start=WarmStart(run="0" * 12, method="upcycle"))
    with pytest.raises(UserError, match="there is no such directory, and the warm start of run"):
        finish(place(orphan, parent.parent, tiny_shards))
    wider = msgspec.structs.replace(with_experts(), width=32)
    with pytest.raises(UserError, match=r"weight embedding.weight is 256x16, and this run's shape makes it 256x32"):
        finish(place(child_of(parent, shape=wider), parent.parent, tiny_shards))
    deeper = msgspec.structs.replace(with_experts(), layers=3)
    with pytest.raises(UserError, match="is absent, and this run's shape makes it"):
        finish(place(child_of(parent, shape=deeper), parent.parent, tiny_shards))
    with pytest.raises(UserError, match="Set num_shared_experts = 0 and granularity = 1"):
        finish(place(child_of(parent, shape=with_experts(num_shared_experts=1)), parent.parent, tiny_shards))


def test_a_parents_weights_are_no_pickle(parent: Path, tiny_shards: Path) -> None:
    weights = parent / "weights.safetensors"
    weights.write_bytes(b"\x80\x04cos\nsystem\n")
    record = RunDirectory(parent).record()
    assert record is not None
    write_json(parent / "record.json", msgspec.structs.replace(record, weights_sha256=file_sha256(weights)))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        finish(place(child_of(parent), parent.parent, tiny_shards))


def test_a_copy_takes_every_weight_over(parent: Path, tiny_shards: Path) -> None:
    manifest = RunDirectory(parent).spec().data.manifest
    spec = make_spec(shape=DENSE, steps=2, manifest=manifest, peak_lr=1e-12)
    spec = msgspec.structs.replace(spec, warm_start=WarmStart(run=parent.name))
    path = place(spec, parent.parent, tiny_shards)
    finish(path)
    before, after = load_file(parent / "weights.safetensors"), load_file(path / "weights.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-9)
