"""Run ids: equal for equal specifications, different after any change of a number; contradictions are refused."""

import msgspec
import pytest
from tiny import make_spec

from scaling.errors import UserError
from scaling.model_config import ModelConfig
from scaling.spec import Placement, RunSpec, canonical_json


def test_id_survives_a_round_trip_through_json() -> None:
    spec = make_spec()
    again = msgspec.json.decode(msgspec.json.encode(spec), type=RunSpec)
    assert again == spec
    assert again.id == spec.id


def test_stating_a_default_does_not_change_the_id() -> None:
    spec = make_spec()
    stated = msgspec.to_builtins(spec)
    bare = {name: value for name, value in stated.items() if name not in ("precision", "clip_norm")}
    assert msgspec.convert(bare, RunSpec).id == spec.id
    assert b'"precision":"fp32"' in canonical_json(spec)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"clip_norm": None}, {"precision": "bf16"}, {"evaluation": {"tokens": 512, "times": 0}}]
)
def test_a_change_of_any_number_changes_the_id(change: dict[str, object]) -> None:
    spec = make_spec()
    changed = msgspec.convert({**msgspec.to_builtins(spec), **change}, RunSpec)
    assert changed.id != spec.id


def test_placement_has_no_way_into_the_id() -> None:
    assert not set(Placement.__struct_fields__) - {"data"} & set(RunSpec.__struct_fields__)


def test_unknown_field_is_refused() -> None:
    built = msgspec.to_builtins(make_spec())
    with pytest.raises(msgspec.ValidationError, match="lr_peak"):
        msgspec.convert({**built, "lr_peak": 1.0}, RunSpec)


def test_a_count_written_as_a_float_is_refused() -> None:
    built = msgspec.to_builtins(make_spec())
    with pytest.raises(msgspec.ValidationError, match="int"):
        msgspec.convert({**built, "batch_tokens": 1e3 + 0.5}, RunSpec)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(
        (UserError, msgspec.ValidationError), match=r"2304 is not a multiple of heads 20\. Use 18 heads"
    ):
        ModelConfig(layers=18, width=2304, heads=20, vocabulary=256, context=128)


def test_flops_that_do_not_fit_shape_and_tokens_are_refused() -> None:
    built = msgspec.to_builtins(make_spec())
    built["budget"]["flops"] += 1
    with pytest.raises((UserError, msgspec.ValidationError), match="convention"):
        msgspec.convert(built, RunSpec)
