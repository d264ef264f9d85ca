"""Rule files, halving, the content of tuning.json and trials.csv, and errors in a ``[tune]`` table."""

from __future__ import annotations

import math
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pandas as pd
import pytest
from tuned import CAMPAIGN, TUNE, Load, bowl, recorder, trial_outcomes

from scaling.errors import UserError
from scaling.io import read_json
from sweeps.config.campaign import Campaign, load_campaign
from sweeps.config.hyperparameter_rules import read_rule_file, rule_set, write_rule_file
from sweeps.config.tuning_results import Tuning, tuning_file
from sweeps.planning.cost import plan_costs, tuning_hours
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.tuning.tuner import ExecutionResult, Tuner, tune

HALVED = TUNE.replace("in_flight = 2", "in_flight = 4") + "\n[tune.halving]\nshare = 0.25\nkeep = 0.5\n"
GRID = 'sampler = "grid"\nrungs = ["a"]\n[tune.search.peak_lr]\nvalues = [1e-3, 1e-2, 3e-2]\n'


def tuned(campaign: Campaign, root: Path) -> Tuning:
    """The tuning.json of a campaign that is tuned to the end."""
    tune(campaign, root, execute=recorder(), progress=False)
    return read_json(tuning_file(root, campaign.name), Tuning)


def test_a_rule_file_gives_another_campaign_every_setting(campaign: Load, tmp_path: Path) -> None:
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    written = write_rule_file(tuning, "adamw", tmp_path / "rules" / "ours.toml")
    rules = tuning.rules["adamw"]
    assert read_rule_file(written).rules == rules
    assert rule_set(str(written)).value("peak_lr", compute=1e9) == pytest.approx(
        rules["peak_lr"].coefficient * 1e9 ** rules["peak_lr"].exponent
    )
    # Another campaign in the same folder names the file, and gets rate and decay at each of its rungs.
    text = CAMPAIGN.format(text=campaign().data.path, tune="").replace("[tune]", "").replace("tiny-tuned", "user")
    text = text.replace("tuned = true", 'rule = "rules/ours.toml"', 1).replace('reuse = "adamw"', "peak_lr = 1e-2")
    file = tmp_path / "user.toml"
    file.write_text(text.replace("tuned = true", "peak_lr = 1e-2"))
    runs = {(run.arm, run.rung): run.spec for run in plan(load_campaign(file), tmp_path / "root").runs}
    for rung in "abcd":
        spec = runs["adamw", rung]
        for name in ("peak_lr", "weight_decay"):
            predicted = rules[name].value(compute=float(spec.budget.flops))
            assert getattr(spec.optimizer, name) == pytest.approx(predicted, rel=1e-3)
    assert runs["muon", "a"].optimizer.peak_lr == 1e-2


def test_rule_files_are_plain_toml(campaign: Load, tmp_path: Path) -> None:
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    tables = tomllib.loads(write_rule_file(tuning, "muon", tmp_path / "muon.toml").read_text())
    assert set(tables["rules"]) == {"peak_lr", "weight_decay"}
    assert tables["rules"]["peak_lr"]["rungs"] == ["a", "b"]
    assert tables["optimizer"] == "muon"


def test_a_hand_written_rule_file_needs_no_tuning(campaign: Load, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'label = "mine"\nsource = "a notebook"\n[rules.peak_lr]\ncoefficient = 2.0\nparameters_exponent = -0.5\n'
        "[rules.parameters]\ncoefficient = 0.1\nexponent = 0.5\n"
    )
    rules = rule_set(str(file))
    assert rules.value("peak_lr", compute=1e20, parameters=1e8) == pytest.approx(2e-4)
    assert rules.compute_for(rules.value("parameters", compute=1e20)) == pytest.approx(1e20)
    setting = rules.setting(optimizer="muon", context=128, compute=1e20, parameters=1e8, tokens=1e9)
    assert setting == {"peak_lr": pytest.approx(2e-4)}


def test_unusable_rule_files_are_refused(campaign: Load, tmp_path: Path) -> None:
    tuning = Tuner(campaign(), tmp_path / "root", progress=False).gather()
    file = tmp_path / "x.toml"
    with pytest.raises(UserError, match="there are no rules for arm adamw"):
        write_rule_file(tuning, "adamw", file)
    with pytest.raises(UserError, match="there is no such rule file"):
        rule_set(str(file))
    file.write_text("label = 3\n")
    with pytest.raises(UserError, match="label is 3"):
        rule_set(str(file))
    file.write_text('label = "x"\nsource = "y"\n[rules.parameters]\ncoefficient = 1e8\n')
    with pytest.raises(UserError, match="must be a power of compute alone"):
        rule_set(str(file)).compute_for(1e8)
    with pytest.raises(UserError, match=r"Step Law have none for tokens.*Rules with tokens: chinchilla, moonlight"):
        rule_set("step-law").value("tokens", compute=1e20)


def test_halving_promotes_the_better_half_of_whole_short_runs(campaign: Load, tmp_path: Path) -> None:
    trained: list[str] = []
    tuning = tune(campaign(HALVED), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert tuning.complete
    assert len(trained) == len(set(trained))
    tuner = Tuner(campaign(HALVED), tmp_path / "root", progress=False)
    for result, (study, trials) in zip(tuning.studies, tuner.trials(), strict=True):
        assert (result.completed, result.pruned) == (8, 4)
        for first in (0, 4):
            peers = result.trials[first : first + 4]
            promoted = [t for t in peers if t.state == "finished"]
            pruned = [t for t in peers if t.state == "pruned"]
            assert len(promoted) == len(pruned) == 2
            assert max(t.short_loss or math.inf for t in promoted) <= min(t.short_loss or 0.0 for t in pruned)
        for trial in trials:
            full, short = study.spec(trial.values), study.short_spec(trial.values)
            assert short is not None
            assert short.budget.tokens == round(full.budget.tokens / 4)
            # The short run has a complete schedule of its own: the same shares of fewer tokens.
            assert short.schedule.warmup_tokens == pytest.approx(full.schedule.warmup_tokens / 4, abs=1)
        # Only full runs count for the best trial.
        assert result.best_loss == min(t.loss for t in result.trials if t.loss is not None)
        assert all(t.loss is None for t in result.trials if t.state == "pruned")
    adamw, _, muon = tuning.arms
    assert adamw.flops == muon.flops
    whole = 8 * sum(study.flops for study in tuning.studies if study.arm == "adamw")
    assert 0.7 * whole < adamw.flops < 0.8 * whole  # half of the trials at a quarter, half at five quarters


def test_interrupted_halving_ends_in_the_same_trials(campaign: Load, tmp_path: Path) -> None:
    whole = tune(campaign(HALVED), tmp_path / "whole", execute=recorder(), progress=False)
    record = recorder()

    def second_half(trials: CampaignPlan) -> ExecutionResult:
        record(msgspec.structs.replace(trials, runs=trials.runs[len(trials.runs) // 2 :]))
        return ExecutionResult(failed={}, waiting=True)

    for _ in range(200):
        tuning = tune(campaign(HALVED), tmp_path / "parts", execute=second_half, progress=False)
        if tuning.complete:
            break
    assert trial_outcomes(tuning) == trial_outcomes(whole)


def test_an_optimum_on_the_edge_is_recorded(campaign: Load, tmp_path: Path) -> None:
    table = TUNE.replace("low = 1e-3\nhigh = 1e-1", "low = 1e-4\nhigh = 1e-3")
    found = tuned(campaign(table.replace("trials = 8", "trials = 8\nwiden = 0")), tmp_path)
    rates = [b for study in found.studies for b in study.brackets if b.name == "peak_lr"]
    assert [b.verdict for b in rates] == ["high edge"] * 6
    assert all(b.note for b in rates)


def test_trials_csv_has_every_setting_and_reads_as_a_table_of_runs(campaign: Load, tmp_path: Path) -> None:
    found = tuned(campaign(), tmp_path)
    table = pd.read_csv(tmp_path / "results" / "tiny-tuned" / "trials.csv")
    assert len(table) == sum(study.completed for study in found.studies) == 48
    columns = "arm params tokens flops loss cell seed run peak_lr status"
    assert set(table.columns) >= set(columns.split())
    assert table["loss"].notna().all()
    best = table.loc[table.groupby(["arm", "rung"])["loss"].idxmin()].set_index(["arm", "rung"])["run"]
    assert best.to_dict() == {(study.arm, study.rung): study.best_run for study in found.studies}


def test_unequal_trials_settle_nothing(campaign: Load, tmp_path: Path) -> None:
    def adamw_only(trials: CampaignPlan) -> ExecutionResult:
        runs = tuple(run for run in trials.runs if run.arm == "adamw")
        recorder()(msgspec.structs.replace(trials, runs=runs))
        return ExecutionResult(failed={}, waiting=not runs)

    tune(campaign(), tmp_path, execute=adamw_only, progress=False)
    found = read_json(tuning_file(tmp_path, "tiny-tuned"), Tuning)
    assert [arm.trials for arm in found.arms] == [24, 0, 0]
    assert (found.complete, found.settings, found.rules) == (False, {}, {})
    assert plan(campaign(), tmp_path).campaign.untuned


def test_tuned_range_data_order_and_schedule_are_recorded(campaign: Load, tmp_path: Path) -> None:
    found = tuned(campaign(), tmp_path)
    flops = {study.rung: study.flops for study in found.studies}
    for arm in found.arms:
        assert (arm.tuned_from, arm.tuned_to) == (flops["a"], flops["c"])
    planned = plan(campaign(), tmp_path)
    outside = [run for run in planned.runs if run.spec.budget.flops > (found.arms[0].tuned_to or 0)]
    assert {run.rung for run in outside} == {"d"}
    assert {(row.arm, row.rung) for row in found.outside} == {(arm.arm, "d") for arm in found.arms}
    assert found.outside[0].times == pytest.approx(outside[0].spec.budget.flops / (found.arms[0].tuned_to or 0))
    manifests = {study.manifest for study in found.studies}
    assert manifests == {run.spec.data.manifest for run in planned.runs}
    assert {study.data_seed for study in found.studies} == {0}
    assert {study.schedule for study in found.studies} == {"cosine"}


def test_spread_over_seeds_is_measured_where_rungs_are_repeated(campaign: Load, tmp_path: Path) -> None:
    campaign()
    file = tmp_path / "tiny-tuned.toml"
    file.write_text(file.read_text().replace('name = "a"', 'name = "a"\nseeds = [0, 1, 2]'))
    repeated = load_campaign(file)
    execute = recorder(lambda spec: bowl(spec) + 0.01 * spec.seed)
    tune(repeated, tmp_path, execute=execute, progress=False)
    execute(plan(repeated, tmp_path))
    rows = {(row.arm, row.rung): row for row in Tuner(repeated, tmp_path, progress=False).write().noise}
    assert set(rows) == {("adamw", "a"), ("muon-reused", "a"), ("muon", "a")}
    assert all(row.seeds == 3 and row.sd == pytest.approx(0.01) for row in rows.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("peak_lr]", "peak_rl]"), 'hyper-parameter "peak_rl" is not known; did you mean "peak_lr"'),
        (('held_out = ["c"]', 'held_out = ["b"]'), 'rung "b" is in rungs and in held_out'),
        (('held_out = ["c"]', 'held_out = ["z"]'), 'rung "z" is not known'),
        (("low = 1e-3\n", ""), "low and high come together"),
        (("low = 1e-3", "low = 1e-3\nvalues = [1e-3, 1e-2]"), "Keep one of the three"),
        (("low = 1e-3\nhigh = 1e-1", 'rule = "chinchilla"'), 'rule "chinchilla" has no rule for peak_lr'),
        (("trials = 8", 'trials = 8\nsampler = "grid"'), "a grid needs listed values"),
        (("high = 1e-1", "high = 1e-4"), "is not in order"),
        (("low = 1e-3\nhigh = 1e-1", "values = [-1.0, 1.0]"), "the scale log does not reach"),
    ],
)
def test_impossible_tune_tables_are_refused(
    campaign: Load, tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        Tuner(campaign(TUNE.replace(*change, 1)), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("coefficient", "exponent", "sentence"),
    [
        ("1e300", "1e29", "no finite value"),
        ("1e300", "1e300", "exponent is 1e\\+300"),
        ("nan", "1.0", "is nan"),
        ("-1.0", "1.0", "coefficient is -1.0"),
    ],
)
def test_rule_files_without_usable_values_are_refused(
    coefficient: str, exponent: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "rule.toml"
    head = 'label = "a"\nsource = "b"\narm = "c"\noptimizer = "adamw"\ncomputes = [1e15]\n[rules.peak_lr]\n'
    file.write_text(f"{head}coefficient = {coefficient}\nexponent = {exponent}\n")
    with pytest.raises(UserError, match=sentence):
        read_rule_file(file).setting(optimizer="adamw", context=16, compute=1e15, parameters=1e6, tokens=1e8)


@pytest.mark.parametrize("exponent", ["5e-324", "-5e-324", "1e-3"])
def test_sizes_without_a_usable_compute_are_refused(exponent: str, tmp_path: Path) -> None:
    file = tmp_path / "rule.toml"
    file.write_text(f'label = "a"\nsource = "b"\n[rules.parameters]\ncoefficient = 1e-3\nexponent = {exponent}\n')
    with pytest.raises(UserError, match="compute must lie above 0"):
        read_rule_file(file).compute_for(1e8)


@pytest.mark.parametrize("exponent", ["-1e29", "3.0"])
def test_values_outside_the_numbers_of_a_file_are_refused(exponent: str, tmp_path: Path) -> None:
    file = tmp_path / "rule.toml"
    file.write_text(f'label = "a"\nsource = "b"\n[rules.tokens]\ncoefficient = 1.0\nexponent = {exponent}\n')
    with pytest.raises(UserError, match=r"the rules of a give .* for tokens at .*Use another rule"):
        read_rule_file(file).value("tokens", compute=1e15)


def test_trials_of_a_campaign_with_branches_have_none(campaign: Load, tmp_path: Path) -> None:
    campaign()
    file = tmp_path / "tiny-tuned.toml"
    wsd = '[schedule]\nkind = "wsd"\ndecay = 0.2\nbranches = true\n[[arms]]\nname = "adamw"'
    text = file.read_text().replace('[[arms]]\nname = "adamw"', wsd, 1).replace("layers = 2", "layers = 1")
    file.write_text(text)
    tuner = Tuner(load_campaign(file), tmp_path / "root", progress=False)
    assert any(run.spec.branch_of for run in tuner.template.runs)
    runs = tuner.step()
    assert runs
    assert all(run.spec.branch_of is None and run.placement.keep_tokens == () for run in runs)


@pytest.mark.parametrize(("table", "trials", "rungs"), [(TUNE, 8, "abc"), (GRID, 3, "a")], ids=["tpe", "grid"])
def test_planned_cost_of_tuning_counts_every_trial(
    campaign: Load, tmp_path: Path, table: str, trials: int, rungs: str
) -> None:
    planned = plan(campaign(table), tmp_path)
    costs = plan_costs(planned)
    expected = [
        trials * costs[run.id].gpu_hours for run in planned.runs if run.rung in rungs and run.arm != "muon-reused"
    ]
    assert [hours for hours, _ in tuning_hours(planned, costs)] == pytest.approx(expected)


def test_planning_loads_no_optuna() -> None:
    code = "import sys, sweeps.planning.cost, sweeps.planning.plan, sweeps.reporting.plan_table; print(*sys.modules)"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"optuna", "sweeps.tuning"} & set(loaded.stdout.split())
