"""The batch script of an array, which submitit writes, and its submission with sbatch.

A job is the path of an array's record and an index into it: submitit's pickles, results and job states are not used.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from submitit.slurm.slurm import _make_sbatch_string

from scaling.errors import UserError
from scaling.spec import Placement
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.slurm import array_records
from sweeps.slurm.client import clean_environment
from sweeps.slurm.snapshot import check_in_shell, code_digest, code_hash, code_root

INHERITED = (
    "HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "SLURM_CONF", "LD_LIBRARY_PATH",
    "VIRTUAL_ENV", "CUDA_HOME", "OMP_NUM_THREADS", "HF_HOME", "XDG_CACHE_HOME",
)  # fmt: skip
"""Variables that jobs get of the submitter's: tokens and passwords stay behind."""


QUEUE_IS_FULL = ("temporarily unable to accept job", "job queue full")
"""What sbatch says when SLURM holds MaxJobCount jobs, before it tries again for two minutes without another word."""


class SubmissionError(Exception):
    """sbatch is missing, refused, or gave no job id; the message is what it said."""


def launch(file: Path, script: str) -> str:
    """The job id that sbatch gives an array, whose batch script is kept in `file`.

    A queue that is full is reported at once: a smaller array may have room.

    Raises:
        SubmissionError: There is no job id. SLURM can have taken the job all the same.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_text(script)
    try:
        process = subprocess.Popen(
            ["sbatch", str(file)], env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise SubmissionError("there is no command sbatch on this machine") from None
    errors, is_full = [], False
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line.strip().removeprefix("sbatch: error: "))
            if is_full := any(words in line for words in QUEUE_IS_FULL):
                os.killpg(process.pid, signal.SIGKILL)
                break
        printed = "" if is_full else process.stdout.read()
    # A site's wrapper may print more, and other job ids with it; sbatch's own line is the last of its kind.
    ids = re.findall(r"^Submitted batch job (\d+)", printed, re.MULTILINE)
    if process.returncode or not ids:
        said = " ".join(word for line in errors for word in line.split()) or f"sbatch printed {printed.strip()!r}"
        raise SubmissionError(said[:500])
    return str(ids[-1])


def batch_script(
    plan: CampaignPlan,
    slurm: SlurmConfig,
    *,
    name: str,
    token: str,
    tasks: int,
    code: Path | None = None,
    after: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> str:
    """The script of an array, as submitit writes it; every value is checked or quoted.

    Args:
        plan: The runs' plan.
        slurm: What the jobs ask for.
        name: Job name.
        token: Of the array's record, which the jobs read.
        tasks: Of the array.
        code: Folder that the jobs import from; the snapshot of the present code when not given.
        after: Jobs that have to end well before these start.
        exclude: Nodes to leave out, besides those that the placement does.
    """
    working_tree = code == code_root()  # the user asked for it; it holds more than the packages
    code, digest = (plan.root / "code" / code_digest(), code_hash()) if code is None else (code, code_hash(code))
    record = plan.root / array_records.FOLDER / f"{token}.json"
    python = shlex.quote(sys.executable)
    options = {option.replace("_", "-"): value for option, value in slurm.sbatch.items() if value is not False}
    if after:
        # Without the second, a job whose predecessor failed would wait for ever.
        options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
    if exclude:
        named = [str(options["exclude"])] if "exclude" in options else []
        options["exclude"] = ",".join([*named, *exclude])
    inherited = [name for name in (*INHERITED, *slurm.environment) if name in os.environ]
    return _make_sbatch_string(
        command=f"{python} -u -m sweeps.slurm.job {shlex.quote(str(record))}",
        folder=plan.root / array_records.FOLDER / "slurm",
        job_name=name,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        time=slurm.time_minutes,
        nodes=slurm.nodes,
        ntasks_per_node=slurm.tasks_per_node,
        cpus_per_task=slurm.cpus_per_task,
        gpus_per_node=slurm.gpus_per_node or None,
        mem=slurm.memory,
        signal_delay_s=slurm.signal_seconds,
        comment=f"scaling {plan.campaign.name} {token}",
        map_count=tasks,
        array_parallelism=slurm.max_parallel or tasks,
        stderr_to_stdout=True,
        wckey=None,  # type: ignore[arg-type]  # submitit's own default would be refused where keys are enforced
        srun_args=["--kill-on-bad-exit=1"],
        setup=[
            "trap : HUP INT QUIT USR1 USR2 TERM",  # the script outlives what its processes are told, and notes how they end
            "umask 077",
            *([] if working_tree else [check_in_shell(code, digest)]),
            "export PYTHONDONTWRITEBYTECODE=1",  # a compiled file would be one more than the snapshot may hold
            "export SLURM_EXPORT_ENV=ALL",  # else srun passes on what sbatch inherited, and not what is set here
            "export PYTHONSAFEPATH=1",  # else Python imports from the working folder
            f"export PYTHONPATH={shlex.quote(str(code))}",
            f"export OMP_NUM_THREADS={slurm.cpus_per_task}",
            *slurm.setup,
            f"{python} -m sweeps.slurm.watchdog {shlex.quote(str(record))} {slurm.stall_seconds} & watchdog=$!",
        ],
        teardown=[
            "status=$?",
            "trap '' TERM",  # a job that requeues itself is asked to end at once, and has a word to say after that
            'kill "$watchdog" 2>/dev/null',
            f'{python} -m sweeps.slurm.requeue {shlex.quote(str(record))} "$status" {slurm.max_kills}',
        ],
        additional_parameters={
            "requeue": True,
            "chdir": plan.root,  # the folder that sbatch was called in may be gone by then
            "export": ",".join(inherited) or "NONE",
            **options,
        },
    )


def job_placement(plan: CampaignPlan, run: PlannedRun, slurm: SlurmConfig) -> Placement:
    """The run's placement in a job of several tasks: a process for each, which share the batch.

    Raises:
        UserError: The tasks do not divide the windows of a batch, or the job would be asked to save before it begins.
    """
    if slurm.signal_seconds >= 60 * slurm.time_minutes:
        raise UserError(
            f'{plan.campaign.file}, rung "{run.rung}": a job of time_minutes = {slurm.time_minutes} is asked to save '
            f"signal_seconds = {slurm.signal_seconds} before its end, which is when it begins. Raise minutes, or lower "
            "signal_seconds."
        )
    if slurm.processes == 1:
        return run.placement
    windows = run.spec.batch_tokens // run.spec.model.context
    if windows % slurm.processes:
        fitting = ", ".join(str(count) for count in range(1, windows + 1) if windows % count == 0)
        raise UserError(
            f'{plan.campaign.file}, rung "{run.rung}": {slurm.nodes} nodes with {slurm.tasks_per_node} tasks are '
            f"{slurm.processes} processes, which do not divide the {windows} windows of a batch. Use one of {fitting}."
        )
    share = windows // slurm.processes
    at_most = min(run.placement.micro_batch or share, share)
    micro_batch = max(part for part in range(1, at_most + 1) if share % part == 0)
    return msgspec.structs.replace(
        run.placement,
        devices=slurm.tasks_per_node,
        nodes=slurm.nodes,
        micro_batch=None if micro_batch == share else micro_batch,
    )
