"""Properties that hold for every table."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ladder

from analysis.fitting.laws import PowerLaw
from analysis.ratio.compare import Comparison
from analysis.ratio.study import fit_table

LAWS = st.builds(
    PowerLaw, scale=st.floats(1.0, 4.0), exponent=st.floats(0.03, 0.12), floor=st.sampled_from([0.0, 0.0, 0.8])
)
SPEND = settings(max_examples=4, deadline=None)


def table(law: PowerLaw, gain: float, seed: int) -> pd.DataFrame:
    """Two arms whose ratio is `gain` everywhere."""
    scale = law.scale * gain**law.exponent
    better = PowerLaw(scale=scale, exponent=law.exponent, floor=law.floor)
    return ladder({"adamw": law, "muon": better}, rungs=5, shared=0.004, own=0.001, seed=seed)


def compared(frame: pd.DataFrame, **options: str) -> Comparison:
    return fit_table(frame, family="lines", **options).comparisons[0]  # type: ignore[arg-type]


@SPEND
@given(law=LAWS, seed=st.integers(0, 99))
def test_a_law_against_itself_is_one(law: PowerLaw, seed: int) -> None:
    frame = table(law, 1.0, seed)
    same = frame[frame["arm"] == "adamw"]
    comparison = compared(pd.concat([same, same.assign(arm="copy")], ignore_index=True))
    assert [point.ratio for point in comparison.curve] == pytest.approx([1.0] * len(comparison.curve), rel=1e-9)


@SPEND
@given(law=LAWS, gain=st.floats(0.4, 1.6), seed=st.integers(0, 99))
def test_swapped_arms_invert_ratio_and_interval(law: PowerLaw, gain: float, seed: int) -> None:
    frame = table(law, gain, seed)
    one = compared(frame, baseline="adamw").headline
    two = compared(frame, baseline="muon").headline
    assert one.low is not None
    assert one.high is not None
    assert (two.ratio, two.low, two.high) == pytest.approx((1 / one.ratio, 1 / one.high, 1 / one.low), rel=1e-6)
    assert two.loss == pytest.approx(one.loss)


@SPEND
@given(law=LAWS, factor=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_units_of_compute_do_not_matter(law: PowerLaw, factor: float, seed: int) -> None:
    frame = table(law, 0.6, seed)
    one = compared(frame).headline
    two = compared(frame.assign(flops=frame["flops"] * factor, tokens=frame["tokens"] * factor)).headline
    assert (two.ratio, two.low, two.high) == pytest.approx((one.ratio, one.low, one.high), rel=1e-6)


@SPEND
@given(law=LAWS, seed=st.integers(0, 99))
def test_order_of_rows_does_not_matter(law: PowerLaw, seed: int) -> None:
    frame = table(law, 0.6, seed)
    shuffled = frame.sample(frac=1.0, random_state=seed).reset_index(drop=True)
    one, two = compared(frame).headline, compared(shuffled, baseline="adamw").headline
    assert (two.ratio, two.low, two.high) == pytest.approx((one.ratio, one.low, one.high), rel=1e-6)


@pytest.mark.parametrize("cells", [5, 15])
def test_a_table_twice_is_no_narrower(cells: int) -> None:
    frame = ladder({"adamw": PowerLaw(scale=2.6, exponent=0.054), "muon": PowerLaw(scale=2.5, exponent=0.054)},
                   rungs=cells, shared=0.004, own=0.001)  # fmt: skip
    one = fit_table(frame, resamples=200).comparisons[0].headline
    two = fit_table(pd.concat([frame, frame], ignore_index=True), resamples=200).comparisons[0].headline
    assert two == one


def test_checkpoints_twice_as_often_are_no_narrower() -> None:
    frame = checkpoints(20)
    narrow = fit_table(frame, resamples=100).comparisons[0]
    assert narrow.cells == len(set(frame["cell"]))


def checkpoints(every: int) -> pd.DataFrame:
    ends = ladder({"adamw": PowerLaw(scale=2.6, exponent=0.054), "muon": PowerLaw(scale=2.5, exponent=0.054)},
                  rungs=6, shared=0.004, own=0.001)  # fmt: skip
    rows = []
    for number, end in enumerate(ends.to_dict("records")):
        for part in np.linspace(0.2, 1.0, every):
            rows.append({**end, "run": number, "tokens": end["tokens"] * part, "flops": end["flops"] * part,
                         "loss": end["loss"] * (1.3 - 0.3 * part)})  # fmt: skip
    return pd.DataFrame(rows)


def test_checkpoints_never_enter_the_ratio() -> None:
    frame = checkpoints(10)
    ends = frame.sort_values("tokens").groupby("run").tail(1).sort_index().reset_index(drop=True)
    assert fit_table(frame).comparisons[0].headline == fit_table(ends).comparisons[0].headline
