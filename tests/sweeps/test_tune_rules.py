"""What tuning writes down for others: rule files that campaigns use, halving over budgets, facts for the audit."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tuned import CAMPAIGN, TUNE, bowl, loader, recorder, told

from scaling.errors import UserError
from scaling.io import read_json
from sweeps.config.campaign import Campaign, load_campaign
from sweeps.config.hyperparameter_rules import read_rule_file, rule, write_rule_file
from sweeps.config.tuning_results import Tuning, facts_file
from sweeps.planning.plan import CampaignPlan, plan
from sweeps.tuning.tuner import ExecutionResult, Tuner, read_tuning, tune

HALVED = TUNE.replace("in_flight = 2", "in_flight = 4") + "\n[tune.halving]\nshare = 0.25\nkeep = 0.5\n"


@pytest.fixture
def campaign(tiny_text: Path, tmp_path: Path) -> Callable[..., Campaign]:
    """Variants of the tiny campaign."""
    return loader(tiny_text, tmp_path)


def test_a_rule_file_gives_other_campaigns_every_setting_that_was_found(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    written = write_rule_file(tuning, "adamw", tmp_path / "rules" / "ours.toml")
    found = {law.name: law for law in tuning.laws["adamw"]}
    read = read_rule_file(written)
    assert {name: (law.coefficient, law.exponent) for name, law in read.laws.items()} == {
        name: (law.coefficient, law.exponent) for name, law in found.items()
    }
    peak = rule(str(written)).peak_lr
    assert peak is not None
    assert peak.at(compute=1e9, parameters=1.0, tokens=1.0) == pytest.approx(
        found["peak_lr"].coefficient * 1e9 ** found["peak_lr"].exponent
    )
    # Another campaign names the file, beside its own, and gets rate and decay at each of its rungs.
    text = CAMPAIGN.format(text=campaign().data.path, tune="").replace("[tune]", "").replace("tiny-tuned", "user")
    text = text.replace("tuned = true", 'rule = "rules/ours.toml"', 1).replace('reuse = "adamw"', "peak_lr = 1e-2")
    file = tmp_path / "user.toml"
    file.write_text(text.replace("tuned = true", "peak_lr = 1e-2"))
    runs = {(run.arm, run.rung): run.spec for run in plan(load_campaign(file), tmp_path / "root").runs}
    for rung in "abcd":
        spec = runs["adamw", rung]
        expected = {name: law.coefficient * spec.budget.flops**law.exponent for name, law in found.items()}
        assert spec.optimizer.peak_lr == pytest.approx(expected["peak_lr"], rel=1e-3)
        assert spec.optimizer.weight_decay == pytest.approx(expected["weight_decay"], rel=1e-3)
    assert runs["muon", "a"].optimizer.peak_lr == 1e-2


def test_a_rule_file_that_is_none_is_refused(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    tuning = Tuner(campaign(), tmp_path / "root", progress=False).gather()
    with pytest.raises(UserError, match="there is no law for arm adamw"):
        write_rule_file(tuning, "adamw", tmp_path / "x.toml")
    with pytest.raises(UserError, match="there is no such rule file"):
        rule(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_text("label = 3\n")
    with pytest.raises(UserError, match="label is 3"):
        rule(str(tmp_path / "x.toml"))


# Halving.


def test_halving_compares_whole_runs_of_one_budget_and_gives_the_better_half_a_full_one(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    trained: list[str] = []
    tuning = tune(campaign(HALVED), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert tuning.complete
    assert len(trained) == len(set(trained))
    tuner = Tuner(campaign(HALVED), tmp_path / "root", progress=False)
    for study, (made, trials) in zip(tuning.studies, tuner.told(), strict=True):
        assert (study.told, study.pruned) == (8, 4)
        for first in (0, 4):
            peers = study.trials[first : first + 4]
            went_on = [t for t in peers if t.state == "finished"]
            left = [t for t in peers if t.state == "pruned"]
            assert len(went_on) == len(left) == 2
            assert max(t.short_loss or math.inf for t in went_on) <= min(t.short_loss or 0.0 for t in left)
        for trial in trials:
            full, short = made.spec(trial.values), made.short_spec(trial.values)
            assert short is not None
            assert short.budget.tokens == round(full.budget.tokens / 4)
            # Its own schedule, complete: the same shares of a shorter run.
            assert short.schedule.warmup_tokens == pytest.approx(full.schedule.warmup_tokens / 4, abs=1)
        # The best and the brackets are of full runs alone.
        assert study.best_loss == min(t.loss for t in study.trials if t.loss is not None)
        assert all(t.loss is None for t in study.trials if t.state == "pruned")
    adamw, _, muon = tuning.arms
    assert adamw.flops == muon.flops
    whole = 8 * sum(study.flops for study in tuning.studies if study.arm == "adamw")
    assert 0.7 * whole < adamw.flops < 0.8 * whole  # half of the trials at a quarter, half at five quarters


def test_halving_that_is_interrupted_goes_on_as_if_it_had_not_been(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    whole = tune(campaign(HALVED), tmp_path / "whole", execute=recorder(), progress=False)
    record = recorder()

    def half_of_them(trials: CampaignPlan) -> ExecutionResult:
        import msgspec

        record(msgspec.structs.replace(trials, runs=trials.runs[len(trials.runs) // 2 :]))
        return ExecutionResult(failed={}, waiting=True)

    for _ in range(200):
        tuning = tune(campaign(HALVED), tmp_path / "parts", execute=half_of_them, progress=False)
        if tuning.complete:
            break
    assert told(tuning) == told(whole)


# Facts: each way in which a campaign can be unfair is visible in tuning.json.


def facts(campaign: Campaign, root: Path) -> Tuning:
    tune(campaign, root, execute=recorder(), progress=False)
    return read_json(facts_file(root, campaign.name), Tuning)


def test_an_optimum_on_the_edge_is_in_the_facts(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    table = TUNE.replace("low = 1e-3\nhigh = 1e-1", "low = 1e-4\nhigh = 1e-3").replace(
        "trials = 8", "trials = 8\nwiden = 0"
    )
    found = facts(campaign(table), tmp_path)
    verdicts = [b.verdict for study in found.studies for b in study.brackets if b.name == "peak_lr"]
    assert verdicts == ["high edge"] * 6
    assert all(b.note for study in found.studies for b in study.brackets if b.name == "peak_lr")


def test_every_setting_that_was_tried_is_in_a_table_that_the_audit_reads(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    found = facts(campaign(), tmp_path)
    table = pd.read_csv(tmp_path / "results" / "tiny-tuned" / "trials.csv")
    assert len(table) == sum(study.told for study in found.studies) == 48
    assert set(table.columns) >= {
        "arm",
        "params",
        "tokens",
        "flops",
        "loss",
        "cell",
        "seed",
        "run",
        "peak_lr",
        "status",
    }
    assert table["loss"].notna().all()
    best = table.loc[table.groupby(["arm", "rung"])["loss"].idxmin()].set_index(["arm", "rung"])["run"]
    assert best.to_dict() == {(study.arm, study.rung): study.best_run for study in found.studies}


def test_unequal_trials_are_in_the_facts_and_settle_nothing(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    def adamw_only(trials: CampaignPlan) -> ExecutionResult:
        import msgspec

        kept = tuple(run for run in trials.runs if run.arm == "adamw")
        recorder()(msgspec.structs.replace(trials, runs=kept))
        return ExecutionResult(failed={}, waiting=not kept)

    tune(campaign(), tmp_path, execute=adamw_only, progress=False)
    found = read_tuning(tmp_path, "tiny-tuned")
    assert [arm.trials for arm in found.arms] == [24, 0, 0]
    assert (found.complete, found.settings, found.laws) == (False, {}, {})
    assert plan(campaign(), tmp_path).campaign.untuned


def test_the_tuned_range_the_data_order_and_the_schedule_are_in_the_facts(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    found = facts(campaign(), tmp_path)
    flops = {study.rung: study.flops for study in found.studies}
    for arm in found.arms:
        assert (arm.tuned_from, arm.tuned_to) == (flops["a"], flops["c"])
    made = plan(campaign(), tmp_path)
    outside = [run for run in made.runs if run.spec.budget.flops > (found.arms[0].tuned_to or 0)]
    assert {run.rung for run in outside} == {"d"}
    assert {(row.arm, row.rung) for row in found.outside} == {(arm.arm, "d") for arm in found.arms}
    assert found.outside[0].times == pytest.approx(outside[0].spec.budget.flops / (found.arms[0].tuned_to or 0))
    manifests = {study.manifest for study in found.studies}
    assert manifests == {run.spec.data.manifest for run in made.runs}
    assert {study.data_seed for study in found.studies} == {0}
    assert {study.schedule for study in found.studies} == {"cosine"}


def test_the_noise_over_seeds_is_measured_where_rungs_are_repeated(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    file = tmp_path / "tiny-tuned.toml"
    campaign()
    file.write_text(file.read_text().replace('name = "a"', 'name = "a"\nseeds = [0, 1, 2]'))
    load = lambda: load_campaign(file)  # noqa: E731
    execute = recorder(lambda spec: bowl(spec) + 0.01 * spec.seed)
    tune(load(), tmp_path, execute=execute, progress=False)
    execute(plan(load(), tmp_path))
    rows = {(row.arm, row.rung): row for row in Tuner(load(), tmp_path, progress=False).write().noise}
    assert set(rows) == {("adamw", "a"), ("muon-reused", "a"), ("muon", "a")}
    assert all(row.seeds == 3 and row.sd == pytest.approx(0.01) for row in rows.values())


# The table itself.


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("peak_lr]", "peak_rl]"), 'hyper-parameter "peak_rl" is not known; did you mean "peak_lr"'),
        (('held_out = ["c"]', 'held_out = ["b"]'), 'rung "b" is in rungs and in held_out'),
        (('held_out = ["c"]', 'held_out = ["z"]'), 'rung "z" is not known'),
        (("low = 1e-3\n", ""), "low and high come together"),
        (("low = 1e-3", "low = 1e-3\nvalues = [1e-3, 1e-2]"), "not two of them"),
        (("trials = 8", 'trials = 8\nsampler = "grid"'), "a grid needs listed values"),
        (("high = 1e-1", "high = 1e-4"), "is not in order"),
        (("low = 1e-3\nhigh = 1e-1", "values = [-1.0, 1.0]"), "the scale log does not reach"),
    ],
)
def test_a_tune_table_that_cannot_be_is_refused_before_anything_is_trained(
    campaign: Callable[..., Campaign], tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        Tuner(campaign(TUNE.replace(*change, 1)), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("coefficient", "exponent", "sentence"),
    [("1e300", "1e299", "no finite value"), ("nan", "1.0", "is nan"), ("-1.0", "1.0", "coefficient is -1.0")],
)
def test_a_rule_file_without_finite_values_is_refused(
    coefficient: str, exponent: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "rule.toml"
    head = 'label = "a"\nsource = "b"\narm = "c"\noptimizer = "adamw"\ncomputes = [1e15]\n[laws.peak_lr]\n'
    file.write_text(f"{head}coefficient = {coefficient}\nexponent = {exponent}\n")
    with pytest.raises(UserError, match=sentence):
        read_rule_file(file).values(1e15, optimizer="adamw", context=16)


def test_the_rule_file_is_plain_toml(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    tables = tomllib.loads(write_rule_file(tuning, "muon", tmp_path / "muon.toml").read_text())
    assert set(tables["laws"]) == {"peak_lr", "weight_decay"}
    assert tables["optimizer"] == "muon"


def test_trials_of_a_branched_campaign_are_no_branches(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    file = tmp_path / "tiny-tuned.toml"
    campaign()
    wsd = '[schedule]\nkind = "wsd"\ndecay = 0.2\nbranches = true\n[[arms]]\nname = "adamw"'
    text = file.read_text().replace('[[arms]]\nname = "adamw"', wsd, 1).replace("layers = 2", "layers = 1")
    file.write_text(text)
    tuner = Tuner(load_campaign(file), tmp_path / "root", progress=False)
    assert any(run.spec.branch_of for run in tuner.template.runs)
    wanted = tuner.step()
    assert wanted
    assert all(run.spec.branch_of is None and run.placement.keep_tokens == () for run in wanted)
