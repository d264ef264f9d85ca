"""Tuners that are killed, run at once or find torn files: the same trials in the end, each run trained once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from recorded import write_record
from tuned import CAMPAIGN, TUNE, Load, bowl, recorder, trial_outcomes

from scaling.errors import UserError
from scaling.io import read_lines
from scaling.run.directory import RunDirectory
from sweeps.config.campaign import Campaign, load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting.collect import collect
from sweeps.reporting.tuning_table import study_rows, study_table
from sweeps.tuning.trials import TrialLine
from sweeps.tuning.tuner import ExecutionResult, Tuner, tune


def test_arms_get_equal_trials_and_each_run_is_trained_once(campaign: Load, tmp_path: Path) -> None:
    trained: list[str] = []
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert tuning.complete
    assert max(Counter(trained).values()) == 1
    assert {study.completed for study in tuning.studies} == {8}
    adamw, reused, muon = tuning.arms
    assert (adamw.trials, reused.trials, muon.trials) == (24, 0, 24)
    assert adamw.flops == muon.flops
    again = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert trial_outcomes(again) == trial_outcomes(tuning)
    assert max(Counter(trained).values()) == 1


def test_plan_takes_best_trials_at_tuned_rungs_and_rules_elsewhere(campaign: Load, tmp_path: Path) -> None:
    root = tmp_path / "root"
    untuned = plan(campaign(), root)
    assert untuned.campaign.untuned
    with pytest.raises(UserError, match="Run: scaling tune tiny-tuned"):
        run_local(untuned, progress=False)
    tuning = tune(campaign(), root, execute=recorder(), progress=False)
    tuned = plan(campaign(), root)
    assert not tuned.campaign.untuned
    runs = {(run.arm, run.rung): run for run in tuned.runs}
    best = {(study.arm, study.rung): study.best_run for study in tuning.studies}
    assert all(runs[key].id == run for key, run in best.items())
    assert tuning.sources["adamw"] == {"a": "best trial", "b": "best trial", "c": "best trial", "d": "rule"}
    for rung in "abcd":
        reused, own = runs["muon-reused", rung].spec.optimizer, runs["adamw", rung].spec.optimizer
        assert (reused.name, reused.peak_lr, reused.weight_decay) == ("muon", own.peak_lr, own.weight_decay)


def test_settings_of_another_search_are_not_used(campaign: Load, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tune(campaign(), root, execute=recorder(), progress=False)
    # A seed more, or a rung that the search did not see, changes nothing that was searched.
    file = tmp_path / "tiny-tuned.toml"
    assert not plan(load_campaign(file, settings=("seeds=[0, 1]",)), root).campaign.untuned
    for changed in (TUNE.replace("trials = 8", "trials = 9"), TUNE.replace("high = 1e-1", "high = 2e-1")):
        wider = plan(campaign(changed), root)
        assert wider.campaign.untuned
        for refused in (run_local, collect):
            with pytest.raises(UserError, match=r"not complete for the present \[tune\] table"):
                refused(wider)
    campaign()
    with pytest.raises(UserError, match=r"were searched with run \w+ at rung a, which the present tiny-tuned.toml"):
        plan(load_campaign(file, settings=("model.context=32",)), root)


def test_fitted_rules_match_the_bowl_and_their_transfer_is_scored(campaign: Load, tmp_path: Path) -> None:
    table = TUNE.replace("trials = 8", "trials = 16")
    tuning = tune(campaign(table), tmp_path / "root", execute=recorder(), progress=False)
    # The bowls are exact parabolas, so the only error is that settings are rounded to four digits.
    assert tuning.rules["adamw"]["peak_lr"].exponent == pytest.approx(-0.25, abs=0.02)
    assert tuning.rules["muon"]["peak_lr"].exponent == pytest.approx(0.0, abs=0.02)
    assert {row.rung for row in tuning.transfer} == {"c"}
    assert all(row.regret is not None and row.regret < 0.01 for row in tuning.transfer)


def test_constant_transfer_fits_no_exponent(campaign: Load, tmp_path: Path) -> None:
    table = TUNE.replace("trials = 8", 'trials = 8\ntransfer = "constant"')
    tuning = tune(campaign(table), tmp_path / "root", execute=recorder(), progress=False)
    assert all(rule.constant and rule.rungs == ("a", "b") for rules in tuning.rules.values() for rule in rules.values())


def test_two_campaigns_with_the_same_trials_train_them_once(campaign: Load, tmp_path: Path) -> None:
    trained: list[str] = []
    first = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    second = tune(campaign(name="other"), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert trial_outcomes(second) == trial_outcomes(first)
    assert max(Counter(trained).values()) == 1


def test_lost_or_torn_trials_are_proposed_again_and_not_trained(campaign: Load, tmp_path: Path) -> None:
    trained: list[str] = []

    def again() -> list[tuple[object, ...]]:
        tuning = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
        return trial_outcomes(tuning)

    whole = again()
    file = tmp_path / "root" / "results" / "tiny-tuned" / "tuning" / "trials.jsonl"
    content = file.read_bytes()
    for left in (b"", content[: len(content) // 2], content[:-7], content + b'{"study":"muon/c","num'):
        file.write_bytes(left)
        assert again() == whole
    file.unlink()
    assert again() == whole
    assert max(Counter(trained).values()) == 1


def test_a_diverged_run_counts_as_a_uniform_guess(campaign: Load, tmp_path: Path) -> None:
    tuning = tune(
        campaign(),
        tmp_path / "root",
        execute=recorder(lambda spec: None if spec.optimizer.peak_lr > 0.02 else bowl(spec)),
        progress=False,
    )
    for study in tuning.studies:
        assert study.completed == 8
        assert study.best_values["peak_lr"] <= 0.02
        assert all((trial.values["peak_lr"] > 0.02) == (trial.state == "diverged") for trial in study.trials)
    assert sum(study.diverged for study in tuning.studies) > 0


def test_a_failed_trial_is_replaced_by_another(campaign: Load, tmp_path: Path) -> None:
    table = TUNE.replace('rungs = ["a", "b"]\nheld_out = ["c"]', 'rungs = ["a"]')
    record = recorder()
    broken: list[str] = []

    def execute(trials: CampaignPlan) -> ExecutionResult:
        victim = next(run for run in trials.runs if run.arm == "muon")
        if not broken:
            broken.append(victim.id)
            rest = tuple(run for run in trials.runs if run.id not in broken)
            record(msgspec.structs.replace(trials, runs=rest))
            return ExecutionResult(failed={victim.id: "its process was killed three times"}, waiting=False)
        return record(trials)

    tuning = tune(campaign(table), tmp_path / "root", execute=execute, progress=False)
    adamw, muon = tuning.studies
    assert (adamw.completed, adamw.failed, muon.completed, muon.failed) == (8, 0, 8, 1)
    assert [trial.run for trial in muon.trials if trial.state == "failed"] == broken
    again = Tuner(campaign(table), tmp_path / "root", progress=False)
    assert again.step() == []
    lines = again.store.read()["muon/a"]
    assert [line.failed for line in lines if line.failed] == ["its process was killed three times"]


def test_a_failed_point_of_a_grid_is_tried_again(campaign: Load, tmp_path: Path) -> None:
    table = 'sampler = "grid"\nrungs = ["a"]\n[tune.search.peak_lr]\nvalues = [1e-3, 1e-2, 3e-2]\n'
    record, failed = recorder(), dict[str, str]()

    def execute(trials: CampaignPlan) -> ExecutionResult:
        if failed:
            return record(trials)
        failed[trials.runs[1].id] = "no memory"
        record(msgspec.structs.replace(trials, runs=tuple(run for run in trials.runs if run.id not in failed)))
        return ExecutionResult(failed=failed, waiting=False)

    tuning = tune(campaign(table), tmp_path / "root", execute=execute, progress=False)
    assert [(study.completed, study.failed) for study in tuning.studies] == [(3, 1), (3, 0)]
    for study in tuning.studies:
        tried = sorted(trial.values["peak_lr"] for trial in study.trials if trial.state == "finished")
        assert tried == [1e-3, 1e-2, 3e-2]


def test_a_failed_run_at_a_predicted_setting_is_an_error(campaign: Load, tmp_path: Path) -> None:
    record = recorder()

    def execute(trials: CampaignPlan) -> ExecutionResult:
        if {run.rung for run in trials.runs} != {"c"} or len(trials.runs) > 2 or not sizes_done(trials):
            return record(trials)
        return ExecutionResult(failed={run.id: "no memory" for run in trials.runs}, waiting=False)

    def sizes_done(trials: CampaignPlan) -> bool:
        return len(list((trials.root / "runs").glob("*/record.json"))) == 48

    with pytest.raises(UserError, match="at the setting that the rules predict, failed: no memory"):
        tune(campaign(), tmp_path / "root", execute=execute, progress=False)


def test_trials_of_a_changed_campaign_are_refused(campaign: Load, tmp_path: Path) -> None:
    tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    changed = CAMPAIGN.replace("tokens = 3840", "tokens = 4096")
    file = tmp_path / "tiny-tuned.toml"
    file.write_text(changed.format(text=campaign().data.path, tune=TUNE))
    with pytest.raises(UserError, match="Give the campaign another name"):
        tune(load_campaign(file), tmp_path / "root", execute=recorder(), progress=False)


def _train_slowly(path: str, loss: float) -> None:
    """A run of a moment that holds its lock, and writes its start and its record as training does."""
    directory = RunDirectory(path)
    with directory.claim() as held:
        if not held or directory.record() is not None:
            return
        directory.note("start", step=0)
        time.sleep(0.1)
        write_record(directory, directory.spec(), loss)


def _tune_slowly(campaign: Campaign, root: Path) -> None:
    os.setsid()
    fork = multiprocessing.get_context("fork")

    def execute(trials: CampaignPlan) -> ExecutionResult:
        for pair in zip(*[iter([*trials.distinct(), None])] * 2, strict=False):
            workers = []
            for run in filter(None, pair):
                trials.directory(run).create(run.spec, run.placement)
                args = (str(trials.directory(run).path), bowl(run.spec))
                workers.append(fork.Process(target=_train_slowly, args=args))
                workers[-1].start()
            for worker in workers:
                worker.join()
        return ExecutionResult(failed={}, waiting=False)

    tune(campaign, root, execute=execute, progress=False)


def test_ten_kills_of_tuner_and_runs_change_no_trial(campaign: Load, tmp_path: Path) -> None:
    whole = tune(campaign(), tmp_path / "whole", execute=recorder(), progress=False)
    root = tmp_path / "killed"
    with_data(Tuner(campaign(), root, progress=False).template, progress=False)
    rng, kills = random.Random(7), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: these children compute nothing
        for _ in range(60):
            child = multiprocessing.get_context("fork").Process(target=_tune_slowly, args=(campaign(), root))
            child.start()
            child.join(None if kills == 10 else rng.uniform(0.05, 0.35))
            if child.exitcode == 0:
                break
            os.killpg(child.pid or 0, signal.SIGKILL)
            child.join()
            kills += 1
    assert kills == 10, "the machine was so quick that nothing was left to kill"
    assert child.exitcode == 0
    tuning = Tuner(campaign(), root).gather()
    assert trial_outcomes(tuning) == trial_outcomes(whole)
    records = list((root / "runs").glob("*/record.json"))
    assert len(records) == len({trial.run for study in tuning.studies for trial in study.trials}) + len(tuning.transfer)
    for record in records:
        # Every attempt but the last was killed before it wrote a record.
        starts = [a for a in RunDirectory(record.parent).attempts() if a.event == "start"]
        assert starts
        assert record.stat().st_mtime >= starts[-1].time - 1e-3


def test_four_tuners_at_once_propose_each_trial_once(campaign: Load, tmp_path: Path) -> None:
    whole = tune(campaign(), tmp_path / "whole", execute=recorder(), progress=False)
    root = tmp_path / "shared"
    tuner = Tuner(campaign(), root, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=_tune_slowly, args=(campaign(), root)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
    assert [child.exitcode for child in children] == [0] * 4
    assert trial_outcomes(Tuner(campaign(), root).gather()) == trial_outcomes(whole)
    lines = read_lines(tuner.store.file, TrialLine)
    assert len(lines) == len({(line.study, line.number) for line in lines}) == 48
    for record in (root / "runs").glob("*/record.json"):
        assert [a.event for a in RunDirectory(record.parent).attempts()] == ["start"]


def test_every_trial_is_stored_before_its_run_exists(campaign: Load, tmp_path: Path) -> None:
    tuner = Tuner(campaign(), tmp_path / "root", progress=False)
    runs = tuner.step()
    assert {run.id for run in runs} == {line.run for line in read_lines(tuner.store.file, TrialLine)}
    assert not any(tuner.template.directory(run).path.exists() for run in runs)
    assert [run.id for run in tuner.step()] == [run.id for run in runs]


def test_optuna_reads_the_exported_studies(campaign: Load, tmp_path: Path) -> None:
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    tuner = Tuner(campaign(), tmp_path / "root", progress=False)
    recorder(lambda spec: None if spec.optimizer.name == "muon" else bowl(spec))(tuner.runs(tuner.step()))
    tuner.step()
    for _ in range(2):  # a second export replaces the first
        tuner.export(tmp_path / "studies.log")
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "studies.log")))
    for study, trials in tuner.trials():
        exported = load_study(study_name=study.name, storage=storage).get_trials()
        assert [t.state.name for t in exported] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
        assert [(t.params, t.value, t.user_attrs["run"]) for t in exported] == [
            (trial.values, trial.loss, trial.run) for trial in trials
        ]


def test_table_of_studies_and_budget_curve(campaign: Load, tmp_path: Path) -> None:
    from rich.console import Console

    tuner = Tuner(campaign(), tmp_path / "root", progress=False)
    recorder()(tuner.runs(tuner.step()))
    rows = study_rows(tuner.gather())
    assert [(row["completed"], row["left"]) for row in rows] == [(2, 6)] * 6
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(study_table(tuning))
    assert "muon-reused: no trials of its own; uses the settings of adamw" in shown.get()
    equal = [row for row in tuning.budget if row.against == "equal"]
    assert [row.trials for row in equal] == list(range(1, 9))
    assert all(row.low <= row.ratio <= row.high for row in equal)
    assert equal[-1].low == equal[-1].high  # with all trials, their order does not matter
    # Muon's gain is 0.1 nats at equal tuning; a baseline with one trial makes it look larger.
    full = [row for row in tuning.budget if row.against == "full"]
    assert full[0].ratio < full[-1].ratio == equal[-1].ratio < 1
