"""Submission with fake SLURM commands."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scaling.errors import UserError
from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting.status import status
from sweeps.slurm import array_records, requeue
from sweeps.slurm.submit import submit_slurm

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
"""The controller's answer about a job that it does not know."""


def test_a_dry_run_works_without_slurm(campaigns: Any, commands: Any, no_profile: Path) -> None:
    submission = submit_slurm(campaigns.plan(), dry_run=True)
    assert len(submission.missing) == 4
    (script,) = submission.scripts()
    assert "#SBATCH --array=0-3%4" in script
    assert not (campaigns.folder / "root" / "submissions").exists()


def test_too_many_gpu_hours_are_refused(campaigns: Any, commands: Any, no_profile: Path) -> None:
    no_profile.write_text("gpus_per_node = 8\n")
    with pytest.raises(UserError, match=re.escape("--max-gpu-hours allows 0.0. Nothing was submitted")):
        submit_slurm(campaigns.plan(), dry_run=True, max_gpu_hours=0.0)


@pytest.mark.parametrize("limit", [0.0, float("nan")])
def test_a_limit_of_zero_or_nan_submits_nothing(limit: float, no_profile: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing was submitted"):
        submit_slurm(plan(load_campaign("moonlight"), tmp_path), dry_run=True, max_gpu_hours=limit)


@pytest.mark.parametrize(
    "error",
    [
        "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; echo 'Batch job submission failed' >&2; exit 1",
        "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2; sleep 600",
    ],
    ids=["refused", "retried in silence"],
)
def test_a_full_queue_takes_parts_of_an_array(ready: CampaignPlan, commands: Any, error: str) -> None:
    commands.idle(
        squeue='[[ "$*" == *" -n "* ]] || cat "$(dirname "$0")/queue" 2>/dev/null; exit 0',
        # takes two jobs in all
        sbatch=f"""
        taken=$(ls $(dirname $0)/taken-* 2>/dev/null | wc -l)
        name=$(sed -n 's/^#SBATCH --job-name=//p' "$1")
        wanted=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
        if [ $((taken + wanted + 1)) -gt 2 ]; then
            {error}
        fi
        for task in $(seq 0 "$wanted"); do
            touch $(dirname $0)/taken-$taken-$task; echo "$((50 + taken))_$task|$name|PENDING|None" >> $(dirname $0)/queue
        done
        echo "Submitted batch job $((50 + taken))"
        """,
    )
    first = submit_slurm(ready)
    assert (len(first.queued), len(first.rejected)) == (2, 2)
    assert any("the same command submits the rest later" in note for note in first.notes)
    again = submit_slurm(ready)
    assert (len(again.already_active), len(again.queued), len(again.rejected)) == (2, 0, 2)
    assert sum(len(array.runs) for array in array_records.all_arrays(ready.root)) == 2


def test_runs_with_jobs_of_unknown_state_are_left_alone(ready: CampaignPlan, commands: Any) -> None:
    commands.idle(sbatch="echo Submitted batch job 5")
    assert len(submit_slurm(ready).queued) == 4
    commands(squeue="exit 1", sbatch="touch $(dirname $0)/called; exit 1")
    blind = submit_slurm(ready)
    assert (len(blind.unknown), blind.queued) == (4, [])
    assert not (commands.folder / "called").exists()


@pytest.mark.parametrize("folder", ["root/code", "root/runs", "root", "."])
def test_folders_of_the_root_are_private(ready: CampaignPlan, commands: Any, folder: str) -> None:
    commands.idle(sbatch="echo Submitted batch job 5")
    submit_slurm(ready)
    made = [ready.root / "code", ready.root / array_records.FOLDER, *(ready.directory(run).path for run in ready.runs)]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in made} == {0o700}
    assert not [file for folder in made for file in folder.rglob("*") if file.stat().st_mode & 0o077]
    exposed = ready.root.parent / folder
    exposed.chmod(0o777)
    with pytest.raises(UserError, match=re.escape(f"chmod go-w {exposed.resolve()}")):
        submit_slurm(ready)
    if folder == ".":
        exposed.chmod(0o1777)  # as /tmp: others cannot rename what is the user's
        submit_slurm(ready)


@pytest.mark.parametrize(
    ("sacct", "scontrol", "outcome"),
    [
        ("exit 0", FORGOTTEN, "queued"),
        ("echo '5_[0-3]|allocation|CANCELLED|0|'", FORGOTTEN, "queued"),
        ("echo '5_[0-3]|allocation|PENDING|0|'", FORGOTTEN, "queued"),
        ("echo '5_[0-3]|allocation|PENDING|0|'", "echo 'slurm_load_jobs error: timed out' >&2; exit 1", "unknown"),
        ("echo '5_[0-3]|allocation|CANCELLED by 7|0|'", FORGOTTEN, "cancelled"),
        ("exit 1", FORGOTTEN, "cancelled"),
    ],
    ids=["never accounted", "closed by the accounting", "still accounted", "no answer", "by a person", "no accounting"],
)
def test_lost_jobs_are_resubmitted_and_cancelled_ones_are_not(
    ready: CampaignPlan, commands: Any, monkeypatch: pytest.MonkeyPatch, sacct: str, scontrol: str, outcome: str
) -> None:
    monkeypatch.setattr("sweeps.slurm.queue_state.NEW_SECONDS", 0.0)
    commands.idle(sbatch="echo Submitted batch job 5")
    first = submit_slurm(ready).queued
    assert len(first) == 4
    commands(
        sacct=sacct,
        scontrol=f"[[ $* == *config* ]] && {{ echo 'MaxArraySize = 1001'; exit; }}; {scontrol}",
        sbatch="echo Submitted batch job 6",
    )
    again = submit_slurm(ready)
    runs = {"queued": again.queued, "cancelled": again.cancelled, "unknown": again.unknown}
    assert runs == {"queued": [], "cancelled": [], "unknown": [], outcome: first}
    if outcome == "cancelled":
        commands(sacct="exit 0")  # the accounting forgets; the run does not
        assert submit_slurm(ready).cancelled == first
        assert {"--retry cancelled" in (row.reason or "") for row in status(ready)} == {True}


def test_jobs_killed_by_slurm_count_as_attempts(campaigns: Any, commands: Any, no_profile: Path) -> None:
    no_profile.write_text("max_kills = 2\n")
    ready = with_data(campaigns.plan(), progress=False)
    victim = ready.runs[0]
    ready = msgspec.structs.replace(ready, runs=(victim,))
    directory = ready.directory(victim)

    def times_out(job: int) -> None:
        """The job begins, trains, and is killed at its time limit before it can note anything."""
        (array,) = [array for array in array_records.all_arrays(ready.root) if array.job == str(job)]
        array_records.note_began(ready.root, victim.id, array)
        directory.note("start", step=0)
        commands(sacct=f"echo '{job}_0|allocation|TIMEOUT|60|'", sbatch=f"echo Submitted batch job {job + 1}")

    commands.idle(sbatch="echo Submitted batch job 5")
    assert submit_slurm(ready).queued == [victim.id]
    times_out(5)
    assert submit_slurm(ready).queued == [victim.id]
    times_out(6)
    for _ in range(2):  # what is noted is noted once
        assert submit_slurm(ready).failed == [victim.id]
    assert "2 attempts were killed without a step of progress, by the time limit; raise time_minutes" in (
        directory.attempts()[-1].reason or ""
    )
    assert [line.slurm_state for line in requeue.exits(directory)] == ["TIMEOUT", "TIMEOUT"]
    assert submit_slurm(ready, retry="failed").queued == [victim.id]


def test_a_full_disk_is_a_user_error(ready: CampaignPlan, commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.idle(sbatch="exit 1")

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_records, "write_json", no_room)
    with pytest.raises(UserError, match="No space left on device"):
        submit_slurm(ready)


def test_a_branch_depends_on_the_job_of_its_trunk(ready: CampaignPlan, commands: Any) -> None:
    trunk, branch = ready.runs[0], ready.runs[2]
    branch = msgspec.structs.replace(branch, spec=msgspec.structs.replace(branch.spec, branch_of=trunk.id))
    folder = commands.folder
    commands.idle(
        sbatch='cat "$1" >> $(dirname $0)/scripts; echo Submitted batch job $(ls $(dirname $0)/*.sh 2>/dev/null | wc -l)7',
    )
    both = msgspec.structs.replace(ready, runs=(trunk, branch))
    assert submit_slurm(both).queued == [trunk.id, branch.id]
    first, second = (folder / "scripts").read_text().split("#!/bin/bash")[1:]
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterok:07_0" in second
    assert "#SBATCH --kill-on-invalid-dep=yes" in second


def test_a_branch_without_a_trunk_is_rejected(ready: CampaignPlan, commands: Any) -> None:
    branch = msgspec.structs.replace(
        ready.runs[2], spec=msgspec.structs.replace(ready.runs[2].spec, branch_of="0" * 12)
    )
    commands.idle(sbatch="exit 1")
    alone = submit_slurm(msgspec.structs.replace(ready, runs=(branch,)))
    assert alone.rejected == [branch.id]
    assert any("is not done and has no job" in note for note in alone.notes)
