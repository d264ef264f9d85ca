"""What is said to SLURM and heard from it, without a SLURM: quoting, parsing, leases, giving up, and asking in vain."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import status_of, until

from scaling.errors import UserError
from scaling.io import append_line
from scaling.run.directory import RunDirectory
from scaling.run.provenance import describe_code
from scaling.run.record import MetricsRow
from sweeps.config.campaign import load_campaign
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting.plan_table import plan_totals
from sweeps.reporting.status import planned_gpu_hours, status
from sweeps.slurm import array_records, bad_nodes, doctor, job, lease
from sweeps.slurm.array_records import ArrayRecord
from sweeps.slurm.bad_nodes import NodeFailure
from sweeps.slurm.client import (
    JobStates,
    SlurmTask,
    Unreachable,
    accounted,
    ask,
    clean_environment,
    expand,
    look_up,
    verdict,
)
from sweeps.slurm.job_exits import UNNOTED, JobExit, exits_without_progress, read_exits
from sweeps.slurm.lease import Lease, hold, is_held
from sweeps.slurm.queue_state import QueueSnapshot
from sweeps.slurm.requeue import _why_give_up
from sweeps.slurm.sbatch import SubmissionError, batch_script, launch
from sweeps.slurm.snapshot import code_digest, take_snapshot
from sweeps.slurm.submit import submit_slurm

IDLE = {"scontrol": "echo 'MaxArraySize = 1001'", "squeue": "exit 0", "sacct": "exit 0", "srun": "exit 0"}
"""A cluster with nothing in its queue and its books, but for what a test replaces."""

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
"""The controller's answer about a job that it does not know."""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand-ins for SLURM's commands, ahead of the real ones."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "cat", "dirname", "git", "ls", "sed", "seq", "sleep", "touch", "wc"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(folder))

    def write(**scripts: str) -> None:
        for name, body in scripts.items():
            file = folder / name
            file.write_text(f"#!{folder}/bash\n{textwrap.dedent(body)}\n")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty profile of the user's."""
    file = tmp_path / "slurm.toml"
    file.write_text("")
    file.chmod(0o600)
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(file))
    return file


# -- what SLURM says


@pytest.mark.parametrize(
    ("job", "tasks"),
    [
        ("12_3", ["12_3"]),
        ("12", ["12"]),
        ("12_[1-3,7%2]", ["12_1", "12_2", "12_3", "12_7"]),
        ("12_[0-1]", ["12_0", "12_1"]),
        ("12_[4,6-", ["12_4", "12_6"]),  # cut short by a narrow column
    ],
)
def test_array_ids_are_read_as_accounting_writes_them(job: str, tasks: list[str]) -> None:
    assert expand(job) == tasks


def test_a_state_that_is_not_known_is_not_over() -> None:
    assert verdict("CANCELLED by 0") == "cancelled"
    assert verdict("NODE_FAIL") == "over"
    assert verdict("SUSPENDED") == "running"
    assert verdict("LAUNCHED_TO_THE_MOON") == "unknown"
    assert verdict("") == "unknown"


def test_cost_is_summed_over_all_attempts_and_the_last_one_decides() -> None:
    text = """
7_0|mine|NODE_FAIL|100|cpu=1,gres/gpu=4,node=1
7_0|mine|COMPLETED|50|cpu=1,gres/gpu=4|n1|0:0
7_1|allocation|RUNNING|10|cpu=1
7_2|a job of last year that had this number|FAILED|10|cpu=1
rubbish
"""
    tasks = accounted(text, {"7": "mine"})
    assert "7_2" not in tasks
    assert (tasks["7_0"].verdict, tasks["7_0"].seconds, tasks["7_0"].gpu_seconds) == ("over", 150, 600)
    assert tasks["7_1"].gpu_seconds == 0
    assert (tasks["7_0"].node, tasks["7_0"].status) == ("n1", 0)


def test_the_queue_is_believed_before_the_accounting(commands: Any) -> None:
    commands(
        squeue="echo '7_0|mine|PENDING|BeginTime'; echo '7_1|another|RUNNING|None'",
        sacct="printf '7_0|mine|NODE_FAIL|100|\\n7_[1-2]|mine|PENDING|0|\\n7_3|mine|CANCELLED by 0|5|\\n'",
    )
    answer = look_up({"7": "mine"})
    assert {job: task.verdict for job, task in answer.tasks.items()} == {
        "7_0": "pending",  # requeued after its node failed
        "7_1": "cancelled",  # the accounting forgot that it was cancelled before it began
        "7_2": "cancelled",
        "7_3": "cancelled",
    }
    assert answer.notes == ()


def test_commands_that_are_missing_failing_or_silent_are_named(commands: Any) -> None:
    commands(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", scontrol="sleep 60")
    answer = look_up({"7": "mine"})
    assert not answer.queue_reached
    assert "no command sacct" in answer.notes[0]
    assert "Unable to contact slurm controller" in answer.notes[1]
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        ask("scontrol", "ping", timeout=0.2)


def test_a_job_submitted_from_inside_a_job_inherits_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SBATCH_EXPORT",
        "PMIX_RANK",
        "SUBMITIT_EXECUTOR",
        "SLURM_CONF",
    ):
        monkeypatch.setenv(name, "7")
    kept = clean_environment()
    assert kept["SLURM_CONF"] == "7"
    assert not [
        name for name in kept if name.startswith(("SLURM_", "SBATCH_", "PMIX_", "SUBMITIT_")) and name != "SLURM_CONF"
    ]


# -- what is said to SLURM


def planned(campaigns: Any) -> CampaignPlan:
    return with_data(campaigns.plan(), progress=False)


def test_a_dry_run_shows_scripts_and_cost_without_slurm(campaigns: Any, commands: Any, no_profile: Path) -> None:
    submission = submit_slurm(campaigns.plan(), dry_run=True)
    assert len(submission.missing) == 4
    (script,) = submission.scripts()
    assert "#SBATCH --array=0-3%4" in script
    assert not (campaigns.folder / "root" / "submissions").exists()


def test_more_gpu_hours_than_allowed_are_refused_before_anything_is_queued(
    campaigns: Any, commands: Any, no_profile: Path
) -> None:
    no_profile.write_text("gpus_per_node = 8\n")
    with pytest.raises(UserError, match=re.escape("--max-gpu-hours allows 0.0. Nothing was submitted")):
        submit_slurm(campaigns.plan(), dry_run=True, max_gpu_hours=0.0)


@pytest.mark.parametrize("limit", [0.0, float("nan")])
def test_a_limit_that_no_number_of_hours_meets_submits_nothing(limit: float, no_profile: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing was submitted"):
        submit_slurm(plan(load_campaign("moonlight"), tmp_path), dry_run=True, max_gpu_hours=limit)


@pytest.mark.parametrize(("gpus", "tasks", "times"), [(1, 1, 1.0), (8, 8, 1.0), (8, 1, 8.0)])
def test_gpu_hours_are_the_same_wherever_gpus_are_asked_for(
    gpus: int, tasks: int, times: float, no_profile: Path, tmp_path: Path
) -> None:
    alone = plan_totals(plan(load_campaign("moonlight"), tmp_path))["gpu_hours"]
    asked = {"gpus": gpus, "tasks": tasks}
    settings = tuple(f"placement.slurm.{name}={value}" for name, value in asked.items())
    in_campaign = plan(load_campaign("moonlight", settings=settings), tmp_path)
    no_profile.write_text("".join(f"{name} = {value}\n" for name, value in asked.items()))
    in_profile = plan(load_campaign("moonlight"), tmp_path)
    for planned in (in_campaign, in_profile):
        submission = submit_slurm(planned, dry_run=True)
        hours = (plan_totals(planned)["gpu_hours"], submission.gpu_hours, planned_gpu_hours(planned))
        assert hours == pytest.approx([times * alone] * 3)
        assert ("stay idle" in submission.requests()[0]) == (times > 1)


def test_jobs_ask_for_what_their_runs_need_and_say_how_many_a_run_takes(no_profile: Path, tmp_path: Path) -> None:
    def request(*settings: str) -> str:
        submission = submit_slurm(plan(load_campaign("moonlight", settings=settings), tmp_path), dry_run=True)
        return submission.requests()[0]

    assert "gpus_per_node = 1, tasks_per_node = 1, cpus_per_task = 8" in request()
    assert re.search(r"takes 350 h, so about 36\d jobs.* Raise minutes", request())
    assert "Raise minutes" not in request("placement.slurm.time_minutes=2880")
    assert "the job asks for none" in request("placement.slurm.gpus_per_node=0")
    assert "at its start" in request("placement.slurm.time_minutes=2")


HOSTILE = [
    "$(touch {mark})",
    "`touch {mark}`",
    "a; touch {mark}",
    "a' ; touch {mark} '",
    'a" ; touch {mark} "',
    "a\n#SBATCH --wrap=x\ntouch {mark}",
]
SLURM_FIELDS = [field.name for field in msgspec.structs.fields(SlurmConfig) if "str" in str(field.type)]


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize(
    "field", [*SLURM_FIELDS, "name", "title", "sbatch option", "sbatch value", "rung", "arm", "data"]
)
def test_no_text_of_a_campaign_file_is_executed(
    field: str, payload: str, campaigns: Any, commands: Any, no_profile: Path, tmp_path: Path
) -> None:
    commands(srun="exit 0")
    mark = tmp_path / "executed"
    text = msgspec.json.encode(payload.format(mark=mark)).decode()  # a JSON string is a TOML string
    campaigns.plan()
    file = campaigns.folder / "tiny.toml"
    content = file.read_text()
    match field:
        case "name":
            content = content.replace('name = "tiny"', f"name = {text}")
        case "title":
            content = f"title = {text}\n{content}"
        case "rung":
            content = content.replace('name = "a"', f"name = {text}")
        case "arm":
            content = content.replace('name = "muon"', f"name = {text}")
        case "data":
            content = content.replace(f'path = "{campaigns.text}"', f"path = {text}")
        case "sbatch option":
            content += f"[placement.slurm.sbatch]\n{text} = 1\n"
        case "sbatch value":
            content += f"[placement.slurm.sbatch]\nreservation = {text}\n"
        case "setup" | "environment":
            content += f"[placement.slurm]\n{field} = [{text}]\n"
        case "sbatch":
            content += f"[placement.slurm]\nsbatch = {text}\n"
        case _:
            content += f"[placement.slurm]\n{field} = {text}\n"
    file.write_text(content)
    scripts = []
    with contextlib.suppress(UserError):
        scripts = submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True).scripts()
    for script in scripts:
        # Without the check of the snapshot, which is not there and would end the script early.
        unchecked = "\n".join(line for line in script.splitlines() if not line.startswith("found="))
        assert unchecked != script
        subprocess.run(["bash", "-c", unchecked], capture_output=True, check=False)
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert not any("--wrap" in line for line in directives)
    assert not mark.exists()


def test_setup_lines_come_from_the_users_own_profile_only(campaigns: Any, no_profile: Path) -> None:
    no_profile.write_text('partition = "gpu"\nsetup = ["module load cuda"]\n')
    submission = submit_slurm(campaigns.plan(), dry_run=True)
    assert "\nmodule load cuda\n" in submission.scripts()[0]
    assert "--partition=gpu" in submission.scripts()[0]
    no_profile.chmod(0o666)
    with pytest.raises(UserError, match="chmod go-w"):
        submit_slurm(campaigns.plan(), dry_run=True)


@pytest.mark.parametrize(
    "error",
    [
        "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; echo 'Batch job submission failed' >&2; exit 1",
        "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2; sleep 600",
    ],
    ids=["refused", "retried in silence"],
)
def test_an_array_that_has_no_room_is_submitted_in_parts_and_the_rest_later(
    campaigns: Any, commands: Any, no_profile: Path, error: str
) -> None:
    ready = planned(campaigns)
    commands(
        scontrol="echo 'MaxArraySize = 1001'",
        squeue='[[ "$*" == *" -n "* ]] || cat "$(dirname "$0")/queue" 2>/dev/null; exit 0',
        sacct="exit 0",
        srun="exit 0",
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
    assert (len(first.queued), len(first.left)) == (2, 2)
    assert any("the same command submits the rest later" in note for note in first.notes)
    again = submit_slurm(ready)
    assert (len(again.joined), len(again.queued), len(again.left)) == (2, 0, 2)
    assert sum(len(array.runs) for array in array_records.all_arrays(ready.root)) == 2


def test_nothing_is_submitted_for_a_run_whose_job_cannot_be_looked_up(
    campaigns: Any, commands: Any, no_profile: Path
) -> None:
    ready = planned(campaigns)
    commands(
        **IDLE,
        sbatch="echo Submitted batch job 5",
    )
    assert len(submit_slurm(ready).queued) == 4
    commands(squeue="exit 1", sbatch="touch $(dirname $0)/called; exit 1")
    blind = submit_slurm(ready)
    assert (len(blind.unknown), blind.queued) == (4, [])
    assert not (campaigns.folder / "bin" / "called").exists()


def test_a_run_that_starts_from_another_waits_for_it(campaigns: Any, commands: Any, no_profile: Path) -> None:
    ready = planned(campaigns)
    trunk, branch = ready.runs[0], ready.runs[2]
    branch = msgspec.structs.replace(branch, spec=msgspec.structs.replace(branch.spec, branch_of=trunk.id))
    folder = campaigns.folder / "bin"
    commands(
        **IDLE,
        sbatch='cat "$1" >> $(dirname $0)/scripts; echo Submitted batch job $(ls $(dirname $0)/*.sh 2>/dev/null | wc -l)7',
    )
    both = msgspec.structs.replace(ready, runs=(trunk, branch))
    assert submit_slurm(both).queued == [trunk.id, branch.id]
    first, second = (folder / "scripts").read_text().split("#!/bin/bash")[1:]
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterok:07_0" in second
    assert "#SBATCH --kill-on-invalid-dep=yes" in second


def test_a_run_whose_predecessor_is_not_on_its_way_is_left(campaigns: Any, commands: Any, no_profile: Path) -> None:
    ready = planned(campaigns)
    branch = msgspec.structs.replace(
        ready.runs[2], spec=msgspec.structs.replace(ready.runs[2].spec, branch_of="0" * 12)
    )
    commands(**IDLE, sbatch="exit 1")
    alone = submit_slurm(msgspec.structs.replace(ready, runs=(branch,)))
    assert alone.left == [branch.id]
    assert any("neither done nor on its way" in note for note in alone.notes)


def test_runs_that_share_a_device_are_tasks_of_several_and_a_run_over_several_devices_cannot_share(
    campaigns: Any, no_profile: Path
) -> None:
    campaigns.plan()
    file = campaigns.folder / "tiny.toml"
    content = file.read_text()
    file.write_text(content + "runs_per_gpu = 2\n[placement.slurm]\ngpus_per_node = 1\n")
    submission = submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True)
    assert "#SBATCH --array=0-1%2" in submission.scripts()[0]
    file.write_text(content + "runs_per_gpu = 2\n[placement.slurm]\ntasks_per_node = 2\n")
    with pytest.raises(UserError, match="set runs_per_gpu = 1, or nodes, tasks and devices = 1"):
        submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True)


@pytest.mark.parametrize("folder", ["root/code", "root/runs", "root", "."])
def test_folders_that_jobs_execute_from_are_private_and_refused_where_others_may_write(
    campaigns: Any, commands: Any, no_profile: Path, folder: str
) -> None:
    ready = planned(campaigns)
    commands(
        **IDLE,
        sbatch="echo Submitted batch job 5",
    )
    submit_slurm(ready)
    made = [ready.root / "code", ready.root / array_records.FOLDER, *(ready.directory(run).path for run in ready.runs)]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in made} == {0o700}
    assert not [file for folder in made for file in folder.rglob("*") if file.stat().st_mode & 0o077]
    exposed = campaigns.folder / folder
    exposed.chmod(0o777)
    with pytest.raises(UserError, match=re.escape(f"chmod go-w {exposed.resolve()}")):
        submit_slurm(ready)
    if folder == ".":
        exposed.chmod(0o1777)  # as /tmp: others cannot rename what is the user's
        submit_slurm(ready)


@pytest.mark.parametrize("change", [None, "a module edited", "a module added", "a compiled file", "a linked package"])
def test_a_batch_script_starts_nothing_from_a_snapshot_that_was_changed(
    campaigns: Any, no_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    code = take_snapshot(tmp_path / "code")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python", "srun"):
        (shims / name).write_text('#!/bin/bash\ntouch "$0.ran"\n')
        (shims / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shims / "python"))
    script = batch_script(campaigns.plan(), SlurmConfig(), name="n", token="t", tasks=1, code=code)
    if change == "a module edited":
        (code / "sweeps" / "local.py").write_text("# edited\n")
    elif change == "a module added":
        (code / "torch.py").write_text("")
    elif change == "a compiled file":
        (code / "sweeps" / "__pycache__").mkdir()
        (code / "sweeps" / "__pycache__" / "plan.cpython-311.pyc").write_text("")
    elif change == "a linked package":
        (code / "torch").symlink_to(tmp_path)
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"PATH": f"{shims}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    ran = {file.stem for file in shims.glob("*.ran")}
    if change is None:
        assert (done.returncode, ran) == (0, {"python", "srun"}), done.stderr
        assert take_snapshot(tmp_path / "code") == code
    else:
        assert (done.returncode, ran) == (UNNOTED, set())
        assert "other code than was submitted" in done.stderr
        with pytest.raises(UserError, match="remove the folder and submit again"):
            take_snapshot(tmp_path / "code")


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
    ids=[
        "never accounted",
        "closed by the accounting",
        "still accounted",
        "nobody answers",
        "by a person",
        "no accounting",
    ],
)
def test_jobs_that_the_controller_lost_are_submitted_again_and_cancelled_ones_are_not(
    campaigns: Any,
    commands: Any,
    no_profile: Path,
    monkeypatch: pytest.MonkeyPatch,
    sacct: str,
    scontrol: str,
    outcome: str,
) -> None:
    monkeypatch.setattr("sweeps.slurm.queue_state.NEW_SECONDS", 0.0)
    ready = planned(campaigns)
    commands(**IDLE, sbatch="echo Submitted batch job 5")
    first = submit_slurm(ready).queued
    assert len(first) == 4
    commands(
        sacct=sacct,
        scontrol=f"[[ $* == *config* ]] && {{ echo 'MaxArraySize = 1001'; exit; }}; {scontrol}",
        sbatch="echo Submitted batch job 6",
    )
    again = submit_slurm(ready)
    assert {name: getattr(again, name) for name in ("queued", "cancelled", "unknown") if getattr(again, name)} == {
        outcome: first
    }
    if outcome == "cancelled":
        commands(sacct="exit 0")  # the accounting forgets; the run does not
        assert submit_slurm(ready).cancelled == first
        assert {"--retry cancelled" in (row.reason or "") for row in status(ready)} == {True}


def test_a_waiting_task_that_leaves_no_trace_was_cancelled_if_its_array_is_known() -> None:
    array = ArrayRecord(token="t", name="n", runs=("a", "b"), code="c", host="h", pid=1, time=0.0, job="5")
    seen = QueueSnapshot(
        records=[array],
        places=array_records.locations([array]),
        answer=JobStates(tasks={"5_0": SlurmTask("5_0", "COMPLETED", "over")}),
    )
    task = seen.task("b")
    assert task is not None
    assert task.verdict == "cancelled"


def test_jobs_that_slurm_kills_with_their_batch_script_count_as_attempts(
    campaigns: Any, commands: Any, no_profile: Path
) -> None:
    no_profile.write_text("max_kills = 2\n")
    ready = planned(campaigns)
    victim = ready.runs[0]
    ready = msgspec.structs.replace(ready, runs=(victim,))
    directory = ready.directory(victim)

    def times_out(job: int) -> None:
        """The job begins, trains, and is killed at its time limit before it can note anything."""
        (array,) = [array for array in array_records.all_arrays(ready.root) if array.job == str(job)]
        array_records.note_began(ready.root, victim.id, array)
        directory.note("start", step=0)
        commands(sacct=f"echo '{job}_0|allocation|TIMEOUT|60|'", sbatch=f"echo Submitted batch job {job + 1}")

    commands(**IDLE, sbatch="echo Submitted batch job 5")
    assert submit_slurm(ready).queued == [victim.id]
    times_out(5)
    assert submit_slurm(ready).queued == [victim.id]
    times_out(6)
    for _ in range(2):  # what is noted is noted once
        assert submit_slurm(ready).failed == [victim.id]
    assert "2 attempts were killed without a step of progress, by the time limit; raise minutes" in (
        directory.attempts()[-1].reason or ""
    )
    assert [ending.state for ending in read_exits(directory)] == ["TIMEOUT", "TIMEOUT"]
    assert submit_slurm(ready, retry="failed").queued == [victim.id]


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("your job 41 used 3 hours\nSubmitted batch job 5", "5"),
        ("Submitted batch job 5 on cluster c2\nsee you at job 41", "5"),
        ("thanks for job 41", None),
    ],
)
def test_the_job_id_is_what_sbatch_says_and_not_what_a_wrapper_adds(
    commands: Any, tmp_path: Path, printed: str, job: str | None
) -> None:
    commands(sbatch=f"printf '{printed}\n'")
    if job is None:
        with pytest.raises(SubmissionError, match="thanks for job 41"):
            launch(tmp_path / "script", "")
    else:
        assert launch(tmp_path / "script", "") == job


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("Priority", "SLURM's reason is Priority"),
        ("AssocGrpCpuLimit", "AssocGrpCpuLimit: it starts when others of your account end, or never"),
        ("AssocGrpJobsLimit", "AssocGrpJobsLimit: your account or QOS has as many running jobs as it may"),
        ("QOSMaxGRESPerUser", "QOSMaxGRESPerUser: it starts when others of your QOS end, or never"),
        ("AssocGrpCPUMinutesLimit", "AssocGrpCPUMinutesLimit: the budget"),
        ("JobHeldUser", "scontrol release 5_0"),
    ],
)
def test_a_waiting_job_says_slurms_reason_and_what_to_do(reason: str, advice: str) -> None:
    assert advice in (SlurmTask("5_0", "PENDING", "pending", reason=reason).advice or "")


@pytest.mark.parametrize(
    ("association", "verdict", "said"),
    [
        ("|cpu=1|||", "fail", "account lab may use 1 of cpu, and a job asks for 2"),
        ("me||gres/gpu=4,cpu=9||", "pass", ""),
        ("me|||0|", "fail", "account lab may have no running jobs"),
        ("somebody|cpu=1|||", "pass", ""),
    ],
)
def test_doctor_fails_a_job_that_exceeds_a_limit_by_itself(
    commands: Any, association: str, verdict: str, said: str
) -> None:
    commands(
        id="echo me",
        sacctmgr=f"[[ $* == *association* ]] && echo '{association}' || echo lab",
        scontrol="echo 'PartitionName=main Default=YES MaxTime=UNLIMITED'",
        sbatch="exit 0",
    )
    (check,) = doctor._placement("a", SlurmConfig(cpus=2))
    assert check.verdict == verdict
    assert said in check.finding


def test_a_job_that_would_be_asked_to_save_when_it_begins_is_refused(campaigns: Any, no_profile: Path) -> None:
    no_profile.write_text("time_minutes = 2\n")
    with pytest.raises(UserError, match="time_minutes = 2 is asked to save signal_seconds = 120 before its end"):
        submit_slurm(campaigns.plan(), dry_run=True)


def test_a_disk_without_room_is_a_sentence_and_not_a_traceback(
    campaigns: Any, commands: Any, no_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = planned(campaigns)
    commands(**IDLE, sbatch="exit 1")

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_records, "write_json", no_room)
    with pytest.raises(UserError, match="No space left on device"):
        submit_slurm(ready)


# -- nodes


def failing(root: Path, *where: tuple[str, str]) -> None:
    """Note failures at their start of runs on nodes."""
    (root / array_records.FOLDER).mkdir(exist_ok=True)
    bad_nodes.note_failures(
        root,
        [
            NodeFailure(node=node, run=run, job=str(number), restart=0, time=time.time())
            for number, (run, node) in enumerate(where)
        ],
    )


def test_two_runs_condemn_a_node_and_a_run_that_fails_everywhere_condemns_none(tmp_path: Path, commands: Any) -> None:
    commands(sinfo="printf 'n1\\nn2\\nn3\\n'")
    failing(tmp_path, ("a", "n1"), ("a", "n1"))
    assert bad_nodes.left_out(tmp_path) == []
    failing(tmp_path, ("a", "n1"), ("a", "n1"), ("b", "n1"))
    assert bad_nodes.left_out(tmp_path) == ["n1"]
    failing(tmp_path, ("a", "n1"), ("a", "n1"), ("b", "n1"), ("b", "n2"))
    assert bad_nodes.left_out(tmp_path) == []  # b is at fault


def test_all_nodes_that_there_are_cannot_be_left_out(tmp_path: Path, commands: Any) -> None:
    failing(tmp_path, ("a", "n1"), ("b", "n1"))
    commands(sinfo="echo n1; echo n2")
    assert bad_nodes.left_out(tmp_path) == ["n1"]
    commands(sinfo="echo n1")
    assert bad_nodes.left_out(tmp_path) == []


# -- what a job does


def test_code_that_changed_after_submission_is_not_run(campaigns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = planned(campaigns)
    run = ready.runs[0]
    ready.directory(run).create(run.spec, run.placement)
    array = array_records.new_array(ready.root, token="0" * 12, name="tiny-0", runs=[run.id], code="another code")
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "1"}
    command = [sys.executable, "-m", "sweeps.slurm.job", str(array_records.path_of(ready.root, array))]
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == job.REFUSED
    assert ready.state(run) == "failed"
    assert "submitted with another code" in (ready.directory(run).attempts()[-1].reason or "")


def test_a_snapshot_is_named_by_its_content_and_taken_once(tmp_path: Path) -> None:
    first = take_snapshot(tmp_path)
    before = (first / "sweeps" / "local.py").stat().st_mtime_ns
    assert take_snapshot(tmp_path) == first
    assert (first / "sweeps" / "local.py").stat().st_mtime_ns == before
    assert code_digest(first) == first.name == code_digest()
    (first / "sweeps" / "local.py").write_text("# edited\n")
    assert code_digest(first) != first.name


def test_kills_without_progress_are_counted_and_progress_forgives_them() -> None:
    def endings(*pairs: tuple[int, int]) -> list[JobExit]:
        return [JobExit(job="1", status=status, step=step, time=0.0) for status, step in pairs]

    assert exits_without_progress(endings((137, 0), (137, 0))) == (2, 2)
    assert exits_without_progress(endings((137, 0), (137, 0), (137, 40))) == (1, 1)
    assert exits_without_progress(endings((137, 0), (75, 0), (0, 0))) == (1, 3)


@pytest.mark.parametrize(
    ("processes", "step", "reason_abandoned"),
    [(1, 3, True), (2, 3, False), (1, 0, False)],
    ids=["it failed by itself", "a peer of it may be gone", "it may be the node"],
)
def test_an_error_is_final_only_where_nothing_else_can_be_at_fault(
    processes: int, step: int, reason_abandoned: bool, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path)
    directory.note("start", step=0)
    if step:
        append_line(
            directory.metrics_file,
            MetricsRow(
                step=step, tokens=1, flops=1, train_loss=1.0, learning_rate=0.1, grad_norm=None,
                tokens_per_second=1.0, mfu=None,
            ),
        )  # fmt: skip
    error = JobExit(job="1", status=1, step=0, starts=1, time=0.0)
    assert (_why_give_up(directory, [], error, 3, processes=processes) is not None) == reason_abandoned
    assert _why_give_up(directory, [error, error], error, 3, processes=processes) is not None


# -- leases


def test_a_lease_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    with hold(tmp_path, beat_seconds=0.5) as held:
        assert held
        with hold(tmp_path, beat_seconds=0.5) as second:
            assert not second
    assert not is_held(tmp_path, beat_seconds=0.5)
    assert not (tmp_path / lease.FILE).exists()


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_lease_whose_owner_is_silent_is_taken_over_whatever_the_clocks_say(tmp_path: Path, skew: float) -> None:
    elsewhere = Lease(owner="gone", host="another-node", pid=1, beat=7)
    (tmp_path / lease.FILE).write_bytes(msgspec.json.encode(elsewhere))
    os.utime(tmp_path / lease.FILE, (time.time() + skew,) * 2)
    with hold(tmp_path, beat_seconds=0.05) as held:
        assert held


def test_a_lease_on_another_node_that_still_beats_is_respected(tmp_path: Path) -> None:
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            content = msgspec.json.encode(Lease(owner="alive", host="another-node", pid=1, beat=number))
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").rename(tmp_path / lease.FILE)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        until((tmp_path / lease.FILE).exists, "it does not beat")
        assert is_held(tmp_path, beat_seconds=1.0)
    finally:
        stop.set()
        beating.join()


def test_who_loses_a_lease_stops_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from sweeps.slurm.lease import hold\n"
        "with hold(Path(sys.argv[1]), beat_seconds=0.05) as held:\n"
        "    print(held, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        thief = msgspec.json.encode(Lease(owner="thief", host="another-node", pid=1))
        (tmp_path / "new").write_bytes(thief)
        (tmp_path / "new").rename(tmp_path / lease.FILE)
        assert status_of(process) == lease.LOST_LEASE
    assert msgspec.json.decode((tmp_path / lease.FILE).read_bytes(), type=Lease).owner == "thief"


def test_a_claim_is_given_once_and_moves_only_from_its_owner_or_from_a_dropped_array(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "runs" / "r").path.mkdir(parents=True)
    first = array_records.new_array(tmp_path, token="first", name="n", runs=["r"], code="c")
    array_records.new_array(tmp_path, token="third", name="n", runs=["r"], code="c")
    assert array_records.claim(tmp_path, "r", "first")
    assert not array_records.claim(tmp_path, "r", "second")
    assert not array_records.claim(tmp_path, "r", "second", instead_of="somebody else")
    assert array_records.claim(tmp_path, "r", "third", instead_of="first")
    array_records.drop(tmp_path, first)
    assert not array_records.claim(tmp_path, "r", "second")
    (tmp_path / array_records.FOLDER / "third.json").unlink()
    assert array_records.claim(tmp_path, "r", "second")


def test_the_script_is_valid_bash(campaigns: Any, no_profile: Path, tmp_path: Path) -> None:
    script = batch_script(campaigns.plan(), SlurmConfig(gpus_per_node=2, memory="16G"), name="n", token="t", tasks=3)
    assert subprocess.run(["bash", "-n", "-c", script], check=True)


def test_code_that_runs_from_a_snapshot_says_which_commit_it_is(tmp_path: Path) -> None:
    folder = take_snapshot(tmp_path)
    command = [
        sys.executable,
        "-P",
        "-c",
        "from scaling.run.provenance import describe_code; print(describe_code().commit)",
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(describe_code().commit)
