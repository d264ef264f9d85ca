"""The batch script of an array, and its way to SLURM, through submitit.

submitit writes, sends and files the script. Its pickles, its results and its word on states are not used: a job is the
path of a record and a place in it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from scaling.errors import UserError
from scaling.spec import Placement
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import CampaignPlan, PlannedRun
from sweeps.slurm import array_records
from sweeps.slurm.client import clean_environment
from sweeps.slurm.snapshot import code_digest

INHERITED = (
    "HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "SLURM_CONF", "LD_LIBRARY_PATH",
    "VIRTUAL_ENV", "CUDA_HOME", "OMP_NUM_THREADS", "HF_HOME", "XDG_CACHE_HOME",
)  # fmt: skip
"""Variables that jobs get of the submitter's: tokens and passwords stay behind."""


class Launcher(SlurmExecutor):
    """submitit's writing, sending and filing of a batch script, without its pickles: the job is a path."""

    def __init__(self, folder: Path, script: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        super().__init__(folder)
        self.script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def launch(self) -> str:
        """The array's job id.

        Raises:
            FailedJobError: sbatch is missing or refused.
        """
        before, clean = dict(os.environ), clean_environment()
        os.environ.clear()
        os.environ.update(clean)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what its exception says
                return str(self._submit_command("").job_id)
        finally:
            os.environ.clear()
            os.environ.update(before)


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
    code = plan.root / "code" / code_digest() if code is None else code
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
            "umask 077",
            "export SLURM_EXPORT_ENV=ALL",  # else srun passes on what sbatch inherited, and not what is set here
            "export PYTHONSAFEPATH=1",  # the folder that sbatch was called in is no place to import from
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
        additional_parameters={"requeue": True, "export": ",".join(inherited) or "NONE", **options},
    )


def job_placement(plan: CampaignPlan, run: PlannedRun, slurm: SlurmConfig) -> Placement:
    """The run's placement in a job of several tasks: a process for each, which share the batch.

    Raises:
        UserError: The tasks do not divide the windows of a batch.
    """
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
