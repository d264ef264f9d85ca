"""A search that was made unfair on purpose is caught by the audit of the trials that it wrote down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tuned import TUNE, loader, recorder

from analysis.audit import audit
from analysis.data.table import read_table
from analysis.ratio.study import fit_table
from scaling.spec import RunSpec
from sweeps.config.campaign import Campaign
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.reporting.collect import collect
from sweeps.tuning.tuner import ExecutionResult, tune


@pytest.fixture
def campaign(tiny_text: Path, tmp_path: Path) -> Callable[..., Campaign]:
    """Variants of the tiny campaign."""
    return loader(tiny_text, tmp_path)


RATE_ONLY = TUNE.split("[tune.search.weight_decay]")[0]


def verdicts(table: Path) -> dict[str, str]:
    frame = read_table(table).frame
    return {check.name: check.verdict for check in audit(frame, fit_table(frame))}


def trials_of(campaign: Campaign, root: Path) -> Path:
    tune(campaign, root, execute=recorder(), progress=False)
    return root / "results" / campaign.name / "trials.csv"


def test_a_fair_search_passes(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    found = verdicts(trials_of(campaign(RATE_ONLY), tmp_path))
    assert {name: found[name] for name in ("search-edge", "equal-tuning", "pairs", "finished")} == {
        "search-edge": "pass", "equal-tuning": "pass", "pairs": "pass", "finished": "pass",
    }  # fmt: skip


def test_an_optimum_on_the_edge_fails(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    table = RATE_ONLY.replace("low = 1e-3\nhigh = 1e-1", "low = 1e-4\nhigh = 1e-3").replace(
        "trials", "widen = 0\ntrials"
    )
    assert verdicts(trials_of(campaign(table), tmp_path))["search-edge"] == "fail"


def test_unequal_trials_fail(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    given: list[str] = []

    def grudging(trials: CampaignPlan) -> ExecutionResult:
        # The baseline's smallest rung gets its first generation and no other.
        runs = [run for run in trials.runs if (run.arm, run.rung) != ("adamw", "a") or not given or run.id in given]
        given.extend(run.id for run in runs if (run.arm, run.rung) == ("adamw", "a"))
        recorder()(msgspec.structs.replace(trials, runs=tuple(runs)))
        return ExecutionResult(failed={}, waiting=not runs)

    tune(campaign(RATE_ONLY), tmp_path, execute=grudging, progress=False)
    assert verdicts(tmp_path / "results" / "tiny-tuned" / "trials.csv")["equal-tuning"] == "fail"


def test_another_token_order_fails(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    # Muon's runs see the tokens of another preparation.
    tune(campaign(RATE_ONLY), tmp_path, execute=recorder(), progress=False)
    made = plan(campaign(RATE_ONLY), tmp_path)
    recorder()(made)
    collect(made)
    file = made.results / "runs.csv"
    assert verdicts(file)["pairs"] == "pass"
    lines = file.read_text().splitlines(keepends=True)
    manifest = str(made.runs[0].spec.data.manifest)
    file.write_text("".join(line.replace(manifest, "f" * 64) if ",muon," in line else line for line in lines))
    assert verdicts(file)["pairs"] == "fail"


def test_runs_in_the_middle_of_their_schedule_are_never_compared(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    def slow_challenger(spec: RunSpec) -> bool:
        return spec.optimizer.name == "muon" and spec.model.layers == 4

    tune(campaign(RATE_ONLY), tmp_path, execute=recorder(), progress=False)
    made = plan(campaign(RATE_ONLY), tmp_path)
    done = tuple(run for run in made.runs if not slow_challenger(run.spec))
    recorder()(msgspec.structs.replace(made, runs=done))
    table = collect(made)
    unfinished = table["status"] == "planned"
    assert unfinished.sum() == 2  # both of Muon's arms at the largest rung
    assert table.loc[unfinished, "loss"].isna().all()
    assert verdicts(made.results / "runs.csv")["finished"] == "warn"


@pytest.mark.parametrize(("carried", "verdict"), [(1, "pass"), (64, "fail")], ids=["near", "far"])
def test_a_setting_carried_far_beyond_the_tuned_sizes_fails(
    campaign: Callable[..., Campaign], tmp_path: Path, carried: int, verdict: str
) -> None:
    table = RATE_ONLY.replace('rungs = ["a", "b"]\nheld_out = ["c"]', 'rungs = ["a", "b", "c"]')
    wished = campaign(table)
    last = wished.rungs[-1]
    rungs = (*wished.rungs[:-1], msgspec.structs.replace(last, tokens=carried * last.tokens))
    wished = msgspec.structs.replace(wished, rungs=rungs)
    tune(wished, tmp_path, execute=recorder(), progress=False)
    made = plan(wished, tmp_path)
    recorder()(made)
    collect(made)
    frame, trials = (read_table(made.results / name).frame for name in ("runs.csv", "trials.csv"))
    found = {check.name: check for check in audit(frame, fit_table(frame), trials)}
    assert found["tuned-range"].verdict == verdict, found["tuned-range"].evidence
    assert found["search-edge"].verdict == "pass"  # of the trials, which the table of runs does not have
    assert found["equal-tuning"].verdict == "warn"  # the arm that reuses another's settings had no search


def test_the_middle_of_a_schedule_fails(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    tune(campaign(RATE_ONLY), tmp_path, execute=recorder(), progress=False)
    made = plan(campaign(RATE_ONLY), tmp_path)
    recorder()(made)
    collect(made)
    frame = read_table(made.results / "runs.csv").frame
    frame["schedule_tokens"] = frame["tokens"]
    assert {c.name: c.verdict for c in audit(frame, fit_table(frame))}["finished"] == "pass"
    frame.loc[frame["arm"] == "muon", "schedule_tokens"] *= 5  # the paper's 1.2T of 5.7T tokens
    assert {c.name: c.verdict for c in audit(frame, fit_table(frame))}["finished"] == "fail"
