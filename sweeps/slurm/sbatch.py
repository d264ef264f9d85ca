"""The batch script of an array, the copy of the code that its jobs run, and the submission with sbatch.

submitit writes the script; its pickles, results and job states are not used. A job may wait for days while the working
tree changes, so jobs import a snapshot of the packages, taken at submission and named by its content.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import UserError
from scaling.io import temporary_name, write_json
from scaling.run.provenance import describe_code
from scaling.units import largest_divisor
from sweeps.slurm import array_records
from sweeps.slurm.client import CommandError, clean_environment
from sweeps.slurm.exit_codes import NOT_RECORDED

if TYPE_CHECKING:
    from scaling.spec import Placement
    from sweeps.config.placement import SlurmConfig
    from sweeps.planning.plan import CampaignPlan, PlannedRun

INHERITED = (
    "HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "SLURM_CONF", "LD_LIBRARY_PATH",
    "VIRTUAL_ENV", "CUDA_HOME", "OMP_NUM_THREADS", "HF_HOME", "XDG_CACHE_HOME",
)  # fmt: skip
"""The submitter's variables that jobs inherit: tokens and passwords are not among them."""

OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "time_minutes",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "memory",
}
"""Fields of ``[placement.slurm]`` by the option of sbatch that they set; a field that is None or 0 sets nothing."""

QUEUE_IS_FULL = ("temporarily unable to accept job", "job queue full")
"""Parts of sbatch's message when SLURM holds MaxJobCount jobs; sbatch then retries for two minutes in silence."""

LIMIT_MESSAGES = ("SubmitLimit", "MaxSubmit", "job limit", "max jobs", "MaxJobCount", "array index", *QUEUE_IS_FULL)
"""Parts of sbatch's message when SLURM takes no more jobs; a smaller array may have room."""

PACKAGES = ("scaling", "sweeps", "analysis")
SNAPSHOT_SUFFIXES = {".py", ".toml", ".typed"}
DESCRIPTION = "code.json"
"""File of a snapshot with its commit; not code, and not hashed."""


def sbatch_options(slurm: SlurmConfig) -> dict[str, str | int | bool]:
    """A placement's request by sbatch's option names: what both the batch script and `scaling doctor` pass to sbatch."""
    values = {option: getattr(slurm, name) for option, name in OPTIONS.items()}
    further = {option.replace("_", "-"): value for option, value in slurm.sbatch.items() if value is not False}
    return {option: value for option, value in values.items() if value} | further


def launch(file: Path, script: str) -> str:
    """Submit a batch script, which is kept in `file`; the job id of its array.

    Raises:
        CommandError: There is no job id. SLURM can have taken the job all the same.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_text(script)
    try:
        process = subprocess.Popen(
            ["sbatch", str(file)], env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise CommandError("there is no command sbatch on this machine") from None
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
        output = " ".join(" ".join(errors).split()) or f"sbatch printed {printed.strip()!r}"
        raise CommandError(output[:500])
    return str(ids[-1])


def batch_script(
    plan: CampaignPlan,
    slurm: SlurmConfig,
    *,
    token: str,
    tasks: int,
    code: Path | None = None,
    after: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> str:
    """The script of an array of so many tasks; every value is checked or quoted.

    Jobs import from `code`, by default the snapshot of the present code. They start after the jobs `after` have
    succeeded, on other nodes than `exclude` and those that the placement excludes.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    folder = code or plan.root / "code" / code_digest()
    # The working tree, which jobs run on the user's request, holds more than the packages.
    check = [] if code == code_root() else [check_in_shell(folder, code_hash(code))]
    record = shlex.quote(str(array_records.path_of(plan.root, token)))
    python = shlex.quote(sys.executable)
    options = sbatch_options(slurm)
    if after:
        # Without the second, a job whose predecessor failed would wait without end.
        options |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
    if exclude:
        options["exclude"] = ",".join([*([str(options["exclude"])] if "exclude" in options else []), *exclude])
    inherited = [name for name in (*INHERITED, *slurm.environment) if name in os.environ]
    return _make_sbatch_string(
        command=f"{python} -u -m sweeps.slurm.job {record}",
        folder=plan.root / array_records.FOLDER / "slurm",
        job_name=array_records.job_name(plan.campaign.name, token),
        signal_delay_s=slurm.signal_seconds,
        map_count=tasks,
        array_parallelism=slurm.max_parallel or tasks,
        stderr_to_stdout=True,
        wckey=None,  # type: ignore[arg-type]  # submitit's own default would be refused where keys are enforced
        srun_args=["--kill-on-bad-exit=1"],
        setup=[
            "trap : HUP INT QUIT USR1 USR2 TERM",  # the script outlives signals to its processes, and records their exit
            "umask 077",
            *check,
            "export PYTHONDONTWRITEBYTECODE=1",  # a compiled file would be one more than the snapshot may hold
            "export SLURM_EXPORT_ENV=ALL",  # else srun passes on what sbatch inherited, and not what is set here
            "export PYTHONSAFEPATH=1",  # else Python imports from the working folder
            f"export PYTHONPATH={shlex.quote(str(folder))}",
            f"export OMP_NUM_THREADS={slurm.cpus_per_task}",
            *slurm.setup,
            f"{python} -m sweeps.slurm.watchdog {record} {slurm.stall_seconds} & watchdog=$!",
        ],
        teardown=[
            "status=$?",
            "trap '' TERM",  # SLURM signals a job that requeues itself at once, and the hook has work left after that
            'kill "$watchdog" 2>/dev/null',
            f'{python} -m sweeps.slurm.requeue {record} "$status" {slurm.max_kills}',
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
        UserError: The tasks do not divide the sequences of a batch, or the signal to save would arrive before the start.
    """
    where = f'{plan.campaign.file}, rung "{run.rung}"'
    if slurm.signal_seconds >= 60 * slurm.time_minutes:
        raise UserError(
            f"{where}: signal_seconds = {slurm.signal_seconds} is the whole time limit, time_minutes = "
            f"{slurm.time_minutes}. Raise time_minutes, or lower signal_seconds."
        )
    if slurm.processes == 1:
        return run.placement
    sequences = run.spec.batch_tokens // run.spec.model.context
    if sequences % slurm.processes:
        divisors = ", ".join(str(count) for count in range(1, sequences + 1) if sequences % count == 0)
        raise UserError(
            f"{where}: {slurm.nodes} nodes with {slurm.tasks_per_node} tasks are {slurm.processes} processes, which do "
            f"not divide the {sequences} sequences of a batch. Use one of {divisors}."
        )
    share = sequences // slurm.processes
    micro_batch = largest_divisor(share, run.placement.micro_batch or share)
    return msgspec.structs.replace(
        run.placement,
        devices=slurm.tasks_per_node,
        nodes=slurm.nodes,
        micro_batch=None if micro_batch == share else micro_batch,
    )


def code_root() -> Path:
    """The folder with the three packages that this process imports."""
    return Path(__file__).resolve().parents[2]


def code_files(root: Path) -> list[Path]:
    """Files of the three packages that a snapshot holds."""
    files = (file for package in PACKAGES for file in (root / package).rglob("*"))
    return [f for f in files if f.suffix in SNAPSHOT_SUFFIXES and f.is_file() and "__pycache__" not in f.parts]


def code_hash(root: Path | None = None) -> str:
    """SHA-256 over what ``sha256sum`` prints for the packages' files in the order of their names."""
    root = root or code_root()
    files = sorted((f"./{file.relative_to(root).as_posix()}".encode(), file) for file in code_files(root))
    lines = (hashlib.sha256(file.read_bytes()).hexdigest().encode() + b"  " + name + b"\n" for name, file in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def code_digest(root: Path | None = None) -> str:
    """The first 12 hex digits of `code_hash`."""
    return code_hash(root)[:12]


def check_in_shell(folder: Path, digest: str) -> str:
    """A shell command that ends the script unless a snapshot holds the files of that `code_hash` and no others.

    The batch script, which SLURM keeps, runs it before Python sees the folder. A module, a compiled file or a link that was
    added changes the hash or makes ``sha256sum`` fail.
    """
    where = shlex.quote(str(folder))
    return (
        f"found=$(set -o pipefail; cd {where} && find . ! -type d ! -path ./{DESCRIPTION} -print0 | LC_ALL=C sort -z "
        f'| xargs -0 sha256sum | sha256sum) && [ "${{found%% *}}" = {digest} ] || {{ '
        f"echo {where}: its files differ from the submitted code, so nothing is started. Remove the folder and submit "
        f"again. >&2; exit {NOT_RECORDED}; }}"
    )


def exposed(root: Path) -> Path | None:
    """A folder through which other users can replace the code that jobs execute: the run root, a folder in it, or a parent.

    A group with the user's name and no other members is the user. With the sticky bit, only owners rename their entries.
    """
    root = root.resolve()
    for folder in (root / "code", root / "submissions", root / "runs", root):
        if folder.exists() and (folder.stat().st_uid not in (os.getuid(), 0) or _others_write(folder)):
            return folder
    return next(
        (p for p in root.parents if p.exists() and _others_write(p) and not p.stat().st_mode & stat.S_ISVTX), None
    )


def _others_write(folder: Path) -> bool:
    status = folder.stat()
    if status.st_mode & stat.S_IWOTH or not status.st_mode & stat.S_IWGRP:
        return bool(status.st_mode & stat.S_IWOTH)
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return not (user.pw_gid == group.gr_gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name})


def take_snapshot(folder: Path) -> Path:
    """A copy of the code under ``folder/<digest>``; the one that is there already if nothing changed.

    Raises:
        UserError: The folder of that digest holds other files.
    """
    source = code_root()
    target = folder / code_digest(source)
    if target.exists():
        found = {path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()} - {target / DESCRIPTION}
        if found != set(code_files(target)) or code_digest(target) != target.name:
            raise UserError(f"{target}: its files are not the code of this digest; remove the folder and submit again.")
        return target
    temporary = temporary_name(target)
    for file in code_files(source):
        copy = temporary / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    write_json(temporary / DESCRIPTION, describe_code())
    try:
        temporary.rename(target)
    except OSError:  # another submitter was faster, with the same content
        shutil.rmtree(temporary)
        if not target.exists():
            raise
    return target
