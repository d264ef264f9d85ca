"""SLURM's commands: parsing, errors, environment."""

from __future__ import annotations

from typing import Any

import pytest

from sweeps.slurm.client import (
    CommandError,
    SlurmTask,
    clean_environment,
    expand_array_ids,
    job_states,
    parse_accounting,
    run_slurm,
    verdict,
)


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
def test_array_ids_are_expanded(job: str, tasks: list[str]) -> None:
    assert expand_array_ids(job) == tasks


def test_an_unknown_state_has_not_ended() -> None:
    assert verdict("CANCELLED by 0") == "cancelled"
    assert verdict("NODE_FAIL") == "ended"
    assert verdict("SUSPENDED") == "running"
    assert verdict("LAUNCHED_TO_THE_MOON") == "unknown"
    assert verdict("") == "unknown"


def test_accounting_sums_attempts_and_the_last_state_counts() -> None:
    text = """
7_0|mine|NODE_FAIL|100|cpu=1,gres/gpu=4,node=1
7_0|mine|COMPLETED|50|cpu=1,gres/gpu=4|n1|0:0
7_1|allocation|RUNNING|10|cpu=1
7_2|a job of last year that had this number|FAILED|10|cpu=1
rubbish
"""
    tasks = parse_accounting(text, {"7": "mine"})
    assert "7_2" not in tasks
    assert (tasks["7_0"].verdict, tasks["7_0"].gpu_seconds) == ("ended", 600)
    assert tasks["7_1"].gpu_seconds == 0
    assert (tasks["7_0"].node, tasks["7_0"].exit_status) == ("n1", 0)


def test_the_queue_overrides_the_accounting(commands: Any) -> None:
    commands(
        squeue="echo '7_0|mine|PENDING|BeginTime'; echo '7_1|another|RUNNING|None'",
        sacct="printf '7_0|mine|NODE_FAIL|100|\\n7_[1-2]|mine|PENDING|0|\\n7_3|mine|CANCELLED by 0|5|\\n'",
    )
    answer = job_states({"7": "mine"})
    assert {job: task.verdict for job, task in answer.tasks.items()} == {
        "7_0": "pending",  # requeued after its node failed
        "7_1": "cancelled",  # the accounting forgot that it was cancelled before it began
        "7_2": "cancelled",
        "7_3": "cancelled",
    }
    assert answer.notes == ()


def test_errors_name_the_command(commands: Any) -> None:
    commands(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", scontrol="sleep 60")
    answer = job_states({"7": "mine"})
    assert not answer.queue_reached
    assert "no command sacct" in answer.notes[0]
    assert "Unable to contact slurm controller" in answer.notes[1]
    with pytest.raises(CommandError, match=r"did not answer within 0\.2 s"):
        run_slurm("scontrol", "ping", timeout=0.2)


def test_variables_of_a_surrounding_job_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SBATCH_EXPORT", "PMIX_RANK", "SUBMITIT_EXECUTOR")
    for name in (*dropped, "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    kept = {name for name in clean_environment() if name.startswith(("SLURM_", "SBATCH_", "PMIX_", "SUBMITIT_"))}
    assert kept == {"SLURM_CONF"}


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
def test_a_pending_job_has_reason_and_remedy(reason: str, advice: str) -> None:
    assert advice in (SlurmTask("5_0", "PENDING", "pending", reason=reason).advice or "")
