"""Each check fails on the table that has its fault, and only there."""

import pandas as pd
import pytest
from synthetic import ADAMW, MUON, ladder

from analysis.audit import CHECKS, AuditCheck, Check, Finding, audit, audit_text
from analysis.data.table import check_table
from analysis.ratio.moonlight import moonlight_table
from analysis.ratio.study import fit_table


@pytest.fixture(scope="module")
def fair() -> pd.DataFrame:
    """A table with nothing to complain about: swept learning rates, seeds, held-out loss, time."""
    base = ladder({"adamw": ADAMW, "muon": MUON}, rungs=5, seeds=3, shared=0.002, own=0.0004)
    parts = []
    for lr, worse in ((1e-3, 0.02), (2e-3, 0.0), (4e-3, 0.015)):
        parts.append(base.assign(peak_lr=lr, loss=base["loss"] + worse, cell=base["cell"] + f"-{lr}"))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(
        status="finished",
        train_loss=frame["loss"] - 0.01,
        manifest="abc",
        code="c0de",
        convention="6nd",
        seconds=frame["flops"] / 1e14,
        batch_tokens=2**19,
        run=range(len(frame)),
    )


def checks(frame: pd.DataFrame) -> dict[str, AuditCheck]:
    table = check_table(frame)
    return {check.name: check for check in audit(table.frame, fit_table(table, resamples=100, extrapolate=True))}


def test_a_fair_table_passes(fair: pd.DataFrame) -> None:
    found = checks(fair)
    assert set(found) == set(CHECKS)
    assert {name: check.verdict for name, check in found.items() if check.verdict == "fail"} == {}
    for name in (
        "search-edge",
        "equal-tuning",
        "held-out",
        "seeds",
        "headline",
        "convention",
        "reach",
        "time",
        "pairs",
        "code",
    ):
        assert found[name].verdict == "pass", found[name]


def test_an_outside_check_runs(fair: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Check("Is it outside?", lambda case: Finding("warn", f"{len(case.used)} runs used", "None."))
    monkeypatch.setitem(CHECKS, "outside", row)
    assert checks(fair)["outside"].evidence == "30 runs used"


FAULTS = {
    "search-edge": lambda f: f[f["peak_lr"] >= 2e-3].pipe(
        lambda g: pd.concat([g, g.assign(peak_lr=8e-3, loss=g.loss + 0.1)])
    ),
    "equal-tuning": lambda f: f[(f["arm"] == "muon") | (f["peak_lr"] == 2e-3)],
    "held-out": lambda f: f.assign(train_loss=f["loss"]),
    "pairs": lambda f: f.assign(manifest=f["arm"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(fair: pd.DataFrame, name: str) -> None:
    found = checks(FAULTS[name](fair).reset_index(drop=True).assign(run=lambda g: range(len(g))))
    assert found[name].verdict == "fail"
    assert found[name].remedy


def test_one_odd_rung_is_found() -> None:
    frame = ladder({"adamw": ADAMW, "muon": MUON}, rungs=8, shared=0.002, own=0.0005)
    frame.loc[15, "loss"] *= 1.05
    found = checks(frame)["one-rung"]
    assert found.verdict == "warn"
    assert "without the rung at 4.63" in found.evidence


def test_a_diverged_run_is_reported(fair: pd.DataFrame) -> None:
    broken = fair.copy()
    broken.loc[broken.index[-1], ["status", "loss"]] = ["diverged", float("nan")]
    assert "1 of them diverged" in checks(broken)["missing-runs"].evidence


def test_no_common_loss_fails_the_headline(fair: pd.DataFrame) -> None:
    apart = fair.assign(loss=fair["loss"].where(fair["arm"] == "adamw", fair["loss"] * 0.2))
    assert checks(apart)["headline"].verdict == "fail"


def test_missing_evidence_is_no_pass() -> None:
    found = checks(ladder({"adamw": ADAMW, "muon": MUON}, shared=0.003, own=0.001))
    for name in ("search-edge", "equal-tuning", "held-out", "seeds", "missing-runs", "time"):
        assert found[name].verdict == "warn"


def test_moonlight() -> None:
    found = checks(moonlight_table().frame)
    assert found["held-out"].verdict == "fail"
    assert found["trend"].verdict == "warn"
    assert "FAIL" in audit_text(list(found.values()))


def test_the_best_learning_rate_alone_enters_the_fit(fair: pd.DataFrame) -> None:
    study = fit_table(check_table(fair), resamples=100)
    assert study.fits["adamw"].points == 15
    assert sum("did worse at this size" in out.reason for out in study.left_out) == 60
