"""A model family from outside the package is one row: counted, laid out on a ladder, trained, refused where it is wrong."""

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

from scaling.data.shards import manifest_hash, read_manifest
from scaling.data.sources.registry import DataConfig
from scaling.errors import UserError
from scaling.export.huggingface import export_hf
from scaling.flops import count_parameters, depth_line, train_flops
from scaling.model_config import ModelConfig
from scaling.models.registry import FAMILIES, build_model, build_model_on_meta
from scaling.models.weights import decoder_weights
from scaling.optim.optimizer_flops import update_flops
from scaling.optim.registry import assign
from scaling.run.directory import RunDirectory
from scaling.spec import OptimizerSpec, RunSpec, canonical_json
from sweeps.config.campaign import ArmConfig, Campaign, LadderConfig, SharedModelConfig, TrainingConfig
from sweeps.planning.ladder import rungs_of
from tests.running import finish, place
from tests.scaling.models.grouped_query import ROW, weights
from tests.scaling.test_flops import counted_flops
from tests.tiny import TINY, make_spec

SHAPE = ModelConfig(
    layers=3, width=32, heads=4, vocabulary=256, context=16, ffn_multiple=8,
    family="grouped-query", family_options={"num_kv_heads": 2},
)  # fmt: skip


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "grouped-query", ROW)


def test_parameters_and_flops_are_what_torch_counts() -> None:
    model = build_model_on_meta(SHAPE)
    blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim > 1)
    assert count_parameters(SHAPE).blocks == depth_line(SHAPE).blocks(SHAPE.layers) == blocks
    assert count_parameters(SHAPE).total == sum(p.numel() for p in model.parameters())
    assert counted_flops(SHAPE) == train_flops(SHAPE, 2 * SHAPE.context, "attention-full")


def test_muon_takes_its_matrices() -> None:
    muon = OptimizerSpec(name="muon", peak_lr=1e-3)
    taken = [a.name for a in assign(muon, weights(SHAPE)) if a.algorithm.is_matrix]
    assert len(taken) == 6 * SHAPE.layers
    assert update_flops(muon, weights(SHAPE)) > 0


def test_its_options_are_part_of_the_id() -> None:
    spec = make_spec(shape=SHAPE)
    other = make_spec(shape=msgspec.structs.replace(SHAPE, family_options={"num_kv_heads": 1}))
    assert spec.id != other.id
    assert b"family_options" not in canonical_json(make_spec(shape=TINY))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=RunSpec) == spec


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_heads": 2}, 'option of the family grouped-query "kv_heads" is not known; did you mean "num_kv_heads"'),
        ({"num_kv_heads": 0}, "option num_kv_heads of the family grouped-query is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide the 4 heads"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        count_parameters(msgspec.structs.replace(SHAPE, family_options=options))


def test_options_of_a_family_without_any_are_refused() -> None:
    with pytest.raises(UserError, match="option of the family decoder"):
        build_model(msgspec.structs.replace(TINY, family_options={"num_kv_heads": 1}))


def test_a_row_that_declares_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "grouped-query", dataclasses.replace(ROW, weights=decoder_weights))
    with pytest.raises(UserError, match=r"declares the shape 32x32 for the parameter blocks\.0\.attention\.key"):
        build_model(SHAPE)


def test_a_ladder_finds_its_sizes() -> None:
    campaign = Campaign(
        file="test.toml",
        name="test",
        data=DataConfig(),
        model=SharedModelConfig(
            vocabulary=256, context=128, ffn_multiple=16, family="grouped-query", family_options={"num_kv_heads": 2}
        ),
        arms=(ArmConfig(name="adamw", optimizer="adamw", peak_lr=1e-3),),
        training=TrainingConfig(batch_tokens=2048),
        ladder=LadderConfig(rule="chinchilla", head_size=16, width_per_layer=32.0, sizes=(200_000, 1_000_000)),
    )
    for rung, wanted in zip(rungs_of(campaign), (200_000, 1_000_000), strict=True):
        assert rung.parameters == pytest.approx(wanted, rel=0.15)
        assert rung.shape.heads % 2 == 0


def test_a_run_learns_and_is_not_exported(tiny_shards: Path, tmp_path: Path) -> None:
    spec = make_spec(shape=SHAPE, optimizer="muon", manifest=manifest_hash(read_manifest(tiny_shards)))
    path = place(spec, tmp_path, tiny_shards, every=1e9)
    record, rows = finish(path), RunDirectory(path).metrics()
    assert record.parameters["blocks"] == count_parameters(SHAPE).blocks
    assert rows[-1].train_loss < rows[0].train_loss
    assert torch.isfinite(torch.tensor(rows[-1].train_loss))
    with pytest.raises(UserError, match="grouped-query has no format on the Hugging Face Hub"):
        export_hf(path, tmp_path / "hub")
