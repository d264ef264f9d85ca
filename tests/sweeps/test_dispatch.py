"""The local executor under kills and stops: each run is trained once, with the numbers of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from waiting import status_of, until

from scaling.errors import UserError
from scaling.io import write_json
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt
from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, PlannedRun, recorded_plan, with_data
from sweeps.planning.retry import changed_code, set_aside
from sweeps.planning.run_state import redone_steps, run_status
from sweeps.reporting.collect import collect

LONG = 96_000
"""Tokens of a run that takes some seconds, so that there is time to disturb it."""

SUBMIT = """
import sys
from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import plan
if __name__ == "__main__":
    outcome = run_local(plan(load_campaign(sys.argv[1]), sys.argv[2]), workers=2, progress=False)
    sys.exit(0 if outcome.complete else 3)
"""


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[[CampaignPlan], subprocess.Popen[bytes]]]:
    """Submitters in processes of their own."""
    script = tmp_path / "submit.py"
    script.write_text(SUBMIT)
    begun: list[subprocess.Popen[bytes]] = []

    def start(planned: CampaignPlan) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(tmp_path / "tiny.toml"), str(planned.root)]
        begun.append(subprocess.Popen(command, start_new_session=True))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def under_way(planned: CampaignPlan, run: PlannedRun) -> bool:
    """True for a run that has trained some steps and is not done."""
    now = run_status(planned, run)
    return now.state == "running" and 0 < now.step < now.steps


def numbers(planned: CampaignPlan) -> list[tuple[object, ...]]:
    """Values that must be equal in every digit after any disturbance."""
    table = collect(planned)
    assert set(table["status"]) == {"finished"}
    return [tuple(row) for row in table[["arm", "cell", "run", "tokens", "flops", "loss", "train_loss"]].to_numpy()]


def starts(directory: RunDirectory) -> list[Attempt]:
    return [attempt for attempt in directory.attempts() if attempt.event == "start"]


def test_workers_below_one_are_refused(campaigns: Any) -> None:
    with pytest.raises(UserError, match="--workers is -1"):
        run_local(campaigns.plan(), workers=-1)


def test_finished_runs_are_never_trained_again(campaigns: Any, tmp_path: Path) -> None:
    first = run_local(campaigns.plan(), workers=2, progress=False)
    assert first.complete
    assert len(first.trained) == 4
    before = {file: file.stat().st_mtime_ns for file in (first.plan.root / "runs").glob("*/record.json")}
    again = run_local(campaigns.plan(), workers=2, progress=False)
    assert again.trained == ()
    assert set(again.present) == set(first.trained)
    assert before == {file: file.stat().st_mtime_ns for file in (first.plan.root / "runs").glob("*/record.json")}
    # A changed rung is trained, and only that.
    changed = run_local(campaigns.plan(tokens=12_800), workers=1, progress=False)
    assert (len(changed.trained), len(changed.present)) == (2, 2)


def test_a_killed_run_continues_without_effect_on_others(campaigns: Any) -> None:
    whole = run_local(campaigns.plan("whole", tokens=LONG), workers=2, progress=False)
    planned = with_data(campaigns.plan("killed", tokens=LONG), progress=False)
    victim, neighbour = (run for run in planned.runs if run.rung == "b")

    def kill() -> None:
        until(lambda: under_way(planned, victim), "it did not start", every=0.02)
        os.kill(starts(planned.directory(victim))[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run_local(planned, workers=2, progress=False)
    killer.join()
    assert outcome.complete
    assert [len(starts(planned.directory(run))) for run in (victim, neighbour)] == [2, 1]
    ends = [attempt for attempt in planned.directory(victim).attempts() if attempt.event == "end"]
    assert [end.outcome for end in ends] == ["failed", "finished"]
    assert "SIGKILL" in (ends[0].reason or "")
    assert numbers(planned) == numbers(whole.plan)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_submitter_is_continued_by_the_next(
    campaigns: Any, submit: Callable[[CampaignPlan], subprocess.Popen[bytes]], signum: int
) -> None:
    planned = with_data(campaigns.plan(tokens=LONG), progress=False)
    long = [run for run in planned.runs if run.rung == "b"]
    process = submit(planned)
    until(lambda: under_way(planned, long[0]), "it did not start", every=0.02)
    process.send_signal(signum)
    assert status_of(process) == (3 if signum == signal.SIGINT else -signum)
    until(lambda: not any(planned.directory(run).is_locked() for run in planned.runs), "a run still trains")
    assert not all(planned.state(run) == "finished" for run in long)
    assert run_local(planned, workers=2, progress=False).complete
    assert starts(planned.directory(long[0]))[-1].step > 0  # it went on from a checkpoint


def test_two_submitters_train_each_run_once(
    campaigns: Any, submit: Callable[[CampaignPlan], subprocess.Popen[bytes]]
) -> None:
    planned = with_data(campaigns.plan(), progress=False)
    other = submit(planned)
    assert run_local(planned, workers=2, progress=False).complete
    assert status_of(other) == 0
    assert [len(starts(planned.directory(run))) for run in planned.runs] == [1] * 4


def test_failed_runs_need_retry_or_another_placement(campaigns: Any) -> None:
    planned = with_data(campaigns.plan(), progress=False)
    manifest = planned.data / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"config_hash"', b'"hash"'))
    failing = run_local(planned, workers=2, progress=False)
    assert len(failing.failed) == 4
    assert "prepare the data again" in next(iter(failing.failed.values()))
    manifest.write_bytes(content)
    assert len(run_local(planned, workers=2, progress=False).failed) == 4
    first, *others = planned.runs
    alone = msgspec.structs.replace(planned, runs=(first,))
    assert run_local(alone, workers=1, retry="failed", progress=False).complete
    # A failed run is tried again under another placement without a request.
    placed = [
        msgspec.structs.replace(run, placement=msgspec.structs.replace(run.placement, micro_batch=4)) for run in others
    ]
    corrected = msgspec.structs.replace(planned, runs=(first, *placed))
    assert run_local(corrected, workers=2, progress=False).complete


def test_runs_of_other_code_are_replaced_and_kept(campaigns: Any) -> None:
    plan = run_local(campaigns.plan(), workers=2, progress=False).plan
    assert changed_code(plan) == []
    old = plan.directory(plan.runs[0])
    record = old.record()
    assert record is not None
    files = record.code.files | {"scaling/flops.py": "another"}
    write_json(old.record_file, msgspec.structs.replace(record, code=msgspec.structs.replace(record.code, files=files)))
    assert [run.id for run in changed_code(plan)] == [plan.runs[0].id]
    (kept,) = set_aside(plan, changed_code(plan))
    assert RunDirectory(kept).record_file.exists()
    again = run_local(plan, workers=1, progress=False)
    assert again.trained == (plan.runs[0].id,)
    assert changed_code(plan) == []


def test_a_diverged_run_is_a_result(campaigns: Any) -> None:
    outcome = run_local(campaigns.plan(peak_lr=1e20), workers=2, progress=False)
    table = collect(outcome.plan)
    assert dict(table.groupby("arm")["status"].first()) == {"adamw": "diverged", "muon": "finished"}
    assert table.loc[table["arm"] == "adamw", "loss"].isna().all()
    assert "not finite" in table["reason"][0]
    assert run_local(outcome.plan, workers=2, progress=False).trained == ()
    assert len(run_local(outcome.plan, workers=2, retry="diverged", progress=False).trained) == 2
    assert len(list((outcome.plan.root / "runs").glob("*/diverged-1.json"))) == 2


def test_unfinished_runs_have_a_row_without_loss(campaigns: Any) -> None:
    planned = with_data(campaigns.plan(), progress=False)
    table = collect(planned)
    assert list(table["status"]) == ["planned"] * 4
    assert table["loss"].isna().all()
    assert list(table["tokens"]) == [12_800, 12_800, 25_600, 25_600]


def test_submit_executes_the_recorded_plan(campaigns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = campaigns.plan()
    campaign, root = load_campaign(campaigns.folder / "tiny.toml"), planned.root
    assert "no recorded plan" in recorded_plan(campaign, root)[1]
    planned.write()
    with monkeypatch.context() as patched:
        patched.setattr("sweeps.planning.plan._run", None)  # no run is made: all are read
        assert recorded_plan(campaign, root) == (planned, "")
    threads = load_campaign(campaigns.folder / "tiny.toml", settings=["placement.threads=2"])
    assert "made from other placement than now" in recorded_plan(threads, root)[1]
    longer = campaigns.plan(tokens=51_200)
    found, why = recorded_plan(longer.campaign, root)
    assert found == longer
    assert "made from other campaign than now" in why
    prepared = with_data(longer, progress=False)
    assert "made from other campaign, data than now" in recorded_plan(prepared.campaign, root)[1]


def test_an_edited_plan_is_refused(campaigns: Any) -> None:
    planned = campaigns.plan()
    file = planned.write()
    file.write_bytes(file.read_bytes().replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(UserError, match=r"edited or damaged.*change tiny\.toml.*scaling plan"):
        recorded_plan(planned.campaign, planned.root)
    file.write_bytes(b"torn")
    assert "no header" in recorded_plan(planned.campaign, planned.root)[1]


def test_a_moved_root_continues(campaigns: Any, tmp_path: Path) -> None:
    first = run_local(campaigns.plan(checkpoint_seconds=0.001), workers=2, progress=False)
    unfinished = first.plan.runs[0]
    first.plan.directory(unfinished).record_file.unlink()
    (tmp_path / "root").rename(tmp_path / "moved")
    moved = run_local(campaigns.plan("moved", checkpoint_seconds=0.001), workers=1, progress=False)
    assert (moved.trained, len(moved.present)) == ((unfinished.id,), 3)
    assert starts(moved.plan.directory(unfinished))[-1].step > 0
    assert not (tmp_path / "root").exists()


def test_redone_steps_are_counted() -> None:
    def attempt(event: Literal["start", "end"], step: int) -> Attempt:
        return Attempt(event=event, time=0.0, host="h", pid=1, step=step)

    killed = [attempt("start", 0), attempt("end", 17), attempt("start", 10), attempt("end", 40)]
    assert redone_steps(killed) == 7
    assert redone_steps([attempt("start", 0), attempt("end", 20), attempt("start", 20), attempt("end", 40)]) == 0


def test_a_process_that_ends_without_a_reason_has_failed(campaigns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.local.train_in_process", os.chmod)  # called with other arguments, it raises
    planned = campaigns.plan()
    outcome = run_local(planned, workers=2, progress=False)
    assert outcome.failed.keys() == {run.id for run in outcome.plan.runs}
    for run in outcome.plan.runs:
        assert run_status(outcome.plan, run).reason == outcome.failed[run.id] == "it left no log"
