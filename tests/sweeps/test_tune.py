"""Studies against what happens to tuners: the same trials in the end, each run trained once, nothing lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from recorded import write_record
from tuned import CAMPAIGN, TUNE, bowl, loader, recorder, told

from scaling.errors import UserError
from scaling.io import read_lines
from scaling.run.directory import RunDirectory
from sweeps.config.campaign import Campaign, load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting.collect import collect
from sweeps.reporting.tuning_table import study_rows, study_table
from sweeps.tuning.study import ProposedTrial
from sweeps.tuning.trials import Journal, add_running, fix, tell
from sweeps.tuning.tuner import ExecutionResult, Tuner, budget_table, tune, tuning_status


@pytest.fixture
def campaign(tiny_text: Path, tmp_path: Path) -> Callable[..., Campaign]:
    """Variants of the tiny campaign."""
    return loader(tiny_text, tmp_path)


def test_every_arm_gets_the_same_number_of_trials_and_each_run_is_trained_once(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    trained: list[str] = []
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert tuning.complete
    assert max(Counter(trained).values()) == 1
    assert {study.told for study in tuning.studies} == {8}
    adamw, reused, muon = tuning.arms
    assert (adamw.trials, reused.trials, muon.trials) == (24, 0, 24)
    assert adamw.flops == muon.flops
    # ProposedTrial again, nothing is.
    assert told(tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)) == told(tuning)
    assert max(Counter(trained).values()) == 1


def test_the_plan_takes_best_trials_where_there_were_some_and_the_law_elsewhere(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
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
    assert tuning.sources["adamw"] == {"a": "best trial", "b": "best trial", "c": "best trial", "d": "law"}
    for rung in "abcd":
        taken, own = runs["muon-reused", rung].spec.optimizer, runs["adamw", rung].spec.optimizer
        assert (taken.name, taken.peak_lr, taken.weight_decay) == ("muon", own.peak_lr, own.weight_decay)


def test_settings_of_another_search_are_not_used(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    root = tmp_path / "root"
    tune(campaign(), root, execute=recorder(), progress=False)
    # A seed more, or a rung that the search did not see, changes nothing that was searched.
    file = tmp_path / "tiny-tuned.toml"
    assert not plan(load_campaign(file, settings=("seeds=[0, 1]",)), root).campaign.untuned
    for changed in (TUNE.replace("trials = 8", "trials = 9"), TUNE.replace("high = 1e-1", "high = 2e-1")):
        wider = plan(campaign(changed), root)
        assert wider.campaign.untuned
        for refused in (run_local, collect):
            with pytest.raises(UserError, match=r"not done with \[tune\] as it is now"):
                refused(wider)
    campaign()
    with pytest.raises(UserError, match=r"were searched with run \w+ at rung a, which tiny-tuned.toml as it is now"):
        plan(load_campaign(file, settings=("model.context=32",)), root)


def test_the_law_that_made_the_losses_is_found_and_its_transfer_is_scored(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    table = TUNE.replace("trials = 8", "trials = 16")
    tuning = tune(campaign(table), tmp_path / "root", execute=recorder(), progress=False)
    rate = {arm: next(law for law in laws if law.name == "peak_lr") for arm, laws in tuning.laws.items()}
    # Exact parabolas, so that only the rounding of settings to four digits stands between.
    assert rate["adamw"].exponent == pytest.approx(-0.25, abs=0.02)
    assert rate["muon"].exponent == pytest.approx(0.0, abs=0.02)
    assert {row.rung for row in tuning.transfer} == {"c"}
    assert all(row.regret is not None and row.regret < 0.01 for row in tuning.transfer)


def test_two_studies_that_meet_at_one_spec_train_it_once(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    trained: list[str] = []
    first = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    second = tune(campaign(name="other"), tmp_path / "root", execute=recorder(log=trained), progress=False)
    assert told(second) == told(first)
    assert max(Counter(trained).values()) == 1


def test_a_journal_that_is_gone_or_torn_is_rebuilt_from_the_ledger_and_the_records(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    trained: list[str] = []
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)
    journal = tmp_path / "root" / "results" / "tiny-tuned" / "tuning" / "journal.log"
    content = journal.read_bytes()
    for left in (b"", content[: len(content) // 2], content[:-7]):
        journal.write_bytes(left)
        assert told(tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)) == told(tuning)
    journal.unlink()
    assert told(tune(campaign(), tmp_path / "root", execute=recorder(log=trained), progress=False)) == told(tuning)
    assert max(Counter(trained).values()) == 1


def test_a_diverged_run_is_told_as_a_uniform_guess_and_never_wins(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    tuning = tune(
        campaign(),
        tmp_path / "root",
        execute=recorder(lambda spec: None if spec.optimizer.peak_lr > 0.02 else bowl(spec)),
        progress=False,
    )
    for study in tuning.studies:
        assert study.told == 8
        assert study.best_values["peak_lr"] <= 0.02
        assert all((trial.values["peak_lr"] > 0.02) == (trial.state == "diverged") for trial in study.trials)
    assert sum(study.diverged for study in tuning.studies) > 0


def test_a_trial_whose_run_cannot_be_run_is_failed_and_another_is_asked(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
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
    assert (adamw.told, adamw.failed, muon.told, muon.failed) == (8, 0, 8, 1)
    assert [trial.run for trial in muon.trials if trial.state == "failed"] == broken


def test_a_campaign_that_was_changed_under_its_trials_is_refused(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    changed = CAMPAIGN.replace("tokens = 3840", "tokens = 4096")
    file = tmp_path / "tiny-tuned.toml"
    file.write_text(changed.format(text=campaign().data.path, tune=TUNE))
    with pytest.raises(UserError, match="Give the campaign another name"):
        tune(load_campaign(file), tmp_path / "root", execute=recorder(), progress=False)


# Kills.


def _slow_worker(path: str, loss: float) -> None:
    """A run that takes a moment, holds its claim, and writes its start and its record as a training run does."""
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
                workers.append(fork.Process(target=_slow_worker, args=args))
                workers[-1].start()
            for worker in workers:
                worker.join()
        return ExecutionResult(failed={}, waiting=False)

    tune(campaign, root, execute=execute, progress=False)


def test_kill_9_of_tuner_and_workers_ten_times_ends_in_the_same_trials_and_no_run_twice(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
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
    assert kills == 10, "the machine was so quick that there was nothing left to kill"
    assert child.exitcode == 0
    tuning = tuning_status(campaign(), root)
    assert told(tuning) == told(whole)
    records = list((root / "runs").glob("*/record.json"))
    assert len(records) == len({trial.run for study in tuning.studies for trial in study.trials}) + len(tuning.transfer)
    for record in records:
        # Every attempt but the last was killed before it wrote anything down.
        starts = [a for a in RunDirectory(record.parent).attempts() if a.event == "start"]
        assert starts
        assert record.stat().st_mtime >= starts[-1].time - 1e-3


# The journal itself.


def _ask_and_tell(path: Path, process: int, count: int) -> None:
    from optuna.distributions import FloatDistribution

    journal = Journal(path)
    for number in range(count):
        with journal.held():
            study = journal.study("shared")
            run = f"{process}-{number}"
            asked = add_running(study, {"x": 0.5}, {"x": FloatDistribution(0.0, 1.0)}, run)
        with journal.held():
            tell(journal.study("shared"), asked, float(process * 1000 + number))


def test_four_processes_ask_and_tell_at_once_on_one_journal_and_nothing_is_lost(tmp_path: Path) -> None:
    path, count = tmp_path / "journal.log", 25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=_ask_and_tell, args=(path, n, count)) for n in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    trials = Journal(path).study("shared").get_trials()
    assert [trial.number for trial in trials] == list(range(4 * count))
    found = {trial.user_attrs["run"]: trial.value for trial in trials}
    assert found == {f"{p}-{n}": float(p * 1000 + n) for p in range(4) for n in range(count)}


def test_a_torn_last_line_costs_nothing_that_was_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    _ask_and_tell(path, 0, 3)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"cut')
    _ask_and_tell(path, 1, 2)
    runs = [trial.user_attrs["run"] for trial in Journal(path).study("shared").get_trials()]
    assert runs == ["0-0", "0-1", "0-2", "1-0", "1-1"]
    assert fix(path) == 0


def test_the_ledger_has_every_trial_before_its_run_exists(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    tuner = Tuner(campaign(), tmp_path / "root", progress=False)
    wanted = tuner.step()
    assert {run.id for run in wanted} == {line.run for line in read_lines(tuner.ledger, ProposedTrial)}
    assert not any(tuner.template.directory(run).path.exists() for run in wanted)
    assert [run.id for run in tuner.step()] == [run.id for run in wanted]


def test_the_study_is_shown_while_it_runs_and_the_budget_curve_when_it_is_done(
    campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    from rich.console import Console

    tuner = Tuner(campaign(), tmp_path / "root", progress=False)
    recorder()(tuner.runs(tuner.step()))
    rows = study_rows(tuning_status(campaign(), tmp_path / "root"))
    assert [(row["told"], row["left"]) for row in rows] == [(2, 6)] * 6
    tuning = tune(campaign(), tmp_path / "root", execute=recorder(), progress=False)
    console = Console(width=160)
    with console.capture() as shown:
        console.print(study_table(tuning))
    text = shown.get()
    assert "muon-reused: no trials of its own; takes over what was found for adamw" in text
    equal = [row for row in budget_table(tuning) if row["against"] == "equal"]
    assert [row["trials"] for row in equal] == list(range(1, 9))
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in equal)
    assert equal[-1]["low"] == equal[-1]["high"]  # with all trials, their order does not matter
    # Muon's gain of 0.1 nats at equal tuning, and a baseline with one trial flatters it.
    full = [row for row in budget_table(tuning) if row["against"] == "full"]
    assert full[0]["ratio"] < full[-1]["ratio"] == equal[-1]["ratio"] < 1
