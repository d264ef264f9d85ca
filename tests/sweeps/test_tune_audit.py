"""The audit finds every kind of unfair search in the trials of a campaign."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tuned import TUNE, Load, recorder

from analysis.audit import audit
from analysis.data.table import read_table
from analysis.ratio.study import fit_table
from scaling.spec import RunSpec
from sweeps.config.campaign import Campaign
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.reporting.collect import collect
from sweeps.tuning.tuner import ExecutionResult, tune

RATE_ONLY = TUNE.split("[tune.search.weight_decay]")[0]


def verdicts(table: Path) -> dict[str, str]:
    frame = read_table(table).frame
    return {check.name: check.verdict for check in audit(frame, fit_table(frame))}


def finished(campaign: Campaign, root: Path) -> CampaignPlan:
    """The plan of a campaign that is tuned, trained and collected."""
    tune(campaign, root, execute=recorder(), progress=False)
    planned = plan(campaign, root)
    recorder()(planned)
    collect(planned)
    return planned


def trials_of(campaign: Campaign, root: Path) -> Path:
    tune(campaign, root, execute=recorder(), progress=False)
    return root / "results" / campaign.name / "trials.csv"


def test_a_fair_search_passes(campaign: Load, tmp_path: Path) -> None:
    found = verdicts(trials_of(campaign(RATE_ONLY), tmp_path))
    assert [found[name] for name in ("search-edge", "equal-tuning", "pairs", "finished")] == ["pass"] * 4


def test_an_optimum_on_the_edge_fails(campaign: Load, tmp_path: Path) -> None:
    table = "widen = 0" + RATE_ONLY.replace("low = 1e-3\nhigh = 1e-1", "low = 1e-4\nhigh = 1e-3")
    assert verdicts(trials_of(campaign(table), tmp_path))["search-edge"] == "fail"


def test_unequal_trials_fail(campaign: Load, tmp_path: Path) -> None:
    given: list[str] = []

    def one_generation_of_adamw(trials: CampaignPlan) -> ExecutionResult:
        # The baseline's smallest rung gets its first generation only.
        runs = [run for run in trials.runs if (run.arm, run.rung) != ("adamw", "a") or not given or run.id in given]
        given.extend(run.id for run in runs if (run.arm, run.rung) == ("adamw", "a"))
        recorder()(msgspec.structs.replace(trials, runs=tuple(runs)))
        return ExecutionResult(failed={}, waiting=not runs)

    tune(campaign(RATE_ONLY), tmp_path, execute=one_generation_of_adamw, progress=False)
    assert verdicts(tmp_path / "results" / "tiny-tuned" / "trials.csv")["equal-tuning"] == "fail"


def test_another_token_order_fails(campaign: Load, tmp_path: Path) -> None:
    # Muon's runs read differently prepared tokens.
    planned = finished(campaign(RATE_ONLY), tmp_path)
    file = planned.results / "runs.csv"
    assert verdicts(file)["pairs"] == "pass"
    lines = file.read_text().splitlines(keepends=True)
    manifest = str(planned.runs[0].spec.data.manifest)
    file.write_text("".join(line.replace(manifest, "f" * 64) if ",muon," in line else line for line in lines))
    assert verdicts(file)["pairs"] == "fail"


def test_unfinished_runs_are_not_compared(campaign: Load, tmp_path: Path) -> None:
    def unfinished(spec: RunSpec) -> bool:
        return spec.optimizer.name == "muon" and spec.model.layers == 4

    tune(campaign(RATE_ONLY), tmp_path, execute=recorder(), progress=False)
    planned = plan(campaign(RATE_ONLY), tmp_path)
    done = tuple(run for run in planned.runs if not unfinished(run.spec))
    recorder()(msgspec.structs.replace(planned, runs=done))
    table = collect(planned)
    untrained = table["status"] == "planned"
    assert untrained.sum() == 2  # both of Muon's arms at the largest rung
    assert table.loc[untrained, "loss"].isna().all()
    assert verdicts(planned.results / "runs.csv")["finished"] == "warn"


@pytest.mark.parametrize(("factor", "verdict"), [(1, "pass"), (64, "fail")], ids=["near", "far"])
def test_a_setting_extrapolated_far_beyond_the_tuned_sizes_fails(
    campaign: Load, tmp_path: Path, factor: int, verdict: str
) -> None:
    table = RATE_ONLY.replace('rungs = ["a", "b"]\nheld_out = ["c"]', 'rungs = ["a", "b", "c"]')
    extended = campaign(table)
    last = extended.rungs[-1]
    rungs = (*extended.rungs[:-1], msgspec.structs.replace(last, tokens=factor * last.tokens))
    extended = msgspec.structs.replace(extended, rungs=rungs)
    planned = finished(extended, tmp_path)
    frame, trials = (read_table(planned.results / name).frame for name in ("runs.csv", "trials.csv"))
    found = {check.name: check for check in audit(frame, fit_table(frame), trials)}
    assert found["tuned-range"].verdict == verdict, found["tuned-range"].evidence
    assert found["search-edge"].verdict == "pass"  # judged from the trials, which the table of runs lacks
    assert found["equal-tuning"].verdict == "warn"  # the arm that reuses another's settings had no search


def test_runs_stopped_in_their_schedule_fail(campaign: Load, tmp_path: Path) -> None:
    planned = finished(campaign(RATE_ONLY), tmp_path)
    frame = read_table(planned.results / "runs.csv").frame
    frame["schedule_tokens"] = frame["tokens"]
    assert {c.name: c.verdict for c in audit(frame, fit_table(frame))}["finished"] == "pass"
    frame.loc[frame["arm"] == "muon", "schedule_tokens"] *= 5  # the paper's 1.2T of 5.7T tokens
    assert {c.name: c.verdict for c in audit(frame, fit_table(frame))}["finished"] == "fail"
