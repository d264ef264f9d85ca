"""Checks of a cluster for a campaign, made before GPU-hours are spent; each passes, warns or fails.

With a probe, a job of a minute writes into the run root and imports the environment on a compute node, because a login
node can differ in both.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from scaling.console import console
from sweeps.config.placement import SlurmConfig, profile_file
from sweeps.planning.plan import CampaignPlan
from sweeps.slurm.array_records import FOLDER, JOB_PREFIX
from sweeps.slurm.client import CommandError, configuration, max_array_size, parse_rows, run_slurm
from sweeps.slurm.sbatch import code_root, exposed, sbatch_options

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
STYLES = {"pass": "green", "warn": "yellow", "fail": "red"}
MIN_FREE_BYTES = 1 << 30
PROBE_SECONDS = 180.0
PROBE = (
    "import scaling.training.loop, pathlib, sys, torch; "
    "pathlib.Path(sys.argv[1]).write_text(str(torch.cuda.device_count()))"
)

Verdict = Literal["pass", "warn", "fail"]
Finding = tuple[Verdict, str]


class ClusterCheck(NamedTuple):
    """One check with its result."""

    name: str
    verdict: Verdict
    finding: str


def examine(plan: CampaignPlan, *, probe: bool = False) -> list[ClusterCheck]:
    """All checks of a campaign on this cluster; with `probe` also a job of at most a minute for each kind of placement."""
    checks = [*_commands(), ClusterCheck("run root", *_root(plan.root))]
    if any(check.verdict == "fail" for check in checks):
        return checks
    kinds: dict[str, SlurmConfig] = {}
    for rung, table in plan.placements.items():
        if table.slurm not in kinds.values():
            kinds[rung] = table.slurm
    checks += _configuration(len(plan.distinct()))
    for rung, slurm in kinds.items():
        checks.append(ClusterCheck(f"placement of {rung}", *_placement(slurm)))
        if probe:
            checks.append(ClusterCheck(f"probe of {rung}", *_probe(plan.root, slurm)))
    return checks


def show(checks: list[ClusterCheck]) -> None:
    """Print the checks as a table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("check", "", "finding"):
        table.add_column(column, no_wrap=column != "finding")
    for check in checks:
        table.add_row(check.name, Text(check.verdict, style=STYLES[check.verdict]), Text(check.finding))
    console().print(table)


def _commands() -> Iterator[ClusterCheck]:
    if absent := [command for command in COMMANDS if shutil.which(command) is None]:
        finding = f"{', '.join(absent)} cannot be found. Log in to the cluster, or load its SLURM module."
        yield ClusterCheck("commands", "fail", finding)
        return
    try:
        run_slurm("scontrol", "ping")
    except CommandError as error:
        yield ClusterCheck("controller", "fail", f"{error}. Ask your administrators, or try later.")
        return
    yield ClusterCheck("controller", "pass", run_slurm("scontrol", "--version").strip())
    try:
        run_slurm("sacct", "-n", "-X", "-S", "now")
        yield ClusterCheck("accounting", "pass", "sacct answers: hours spent will be known")
    except CommandError as error:
        finding = f"{error}. Campaigns work; hours spent and cancelled jobs will not be known."
        yield ClusterCheck("accounting", "warn", finding)


def _root(root: Path) -> Finding:
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return "fail", f"{existing} is not writable. Choose another with --root."
    if (folder := exposed(root)) is not None:
        return "fail", f"other users may write {folder} and replace the code of your jobs. Run chmod go-w, or move."
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        return "fail", f"{existing} has {free / 1e9:.2f} GB left. Make room, or move."
    try:
        kind = run_slurm("df", "--output=fstype", str(existing)).split()[-1]
    except (CommandError, IndexError):
        kind = ""
    if kind in ("tmpfs", "ramfs") or existing.is_relative_to("/tmp"):
        where = f"{root} is on {kind or 'a local disk'}, which other nodes do not see"
        return "warn", f"{where}. Use a shared file system, or check with --probe."
    return "pass", f"{root}, {kind}, {free / 1e9:,.0f} GB free"


def _configuration(runs: int) -> Iterator[ClusterCheck]:
    config = configuration()
    largest = max_array_size(config)
    finding = f"at most {largest:,} tasks; {runs:,} runs are {-(-runs // largest)} of them"
    yield ClusterCheck("array size", "pass", finding)
    if config.get("JobRequeue", "1").strip() == "0":
        finding = "the cluster does not requeue by default. Jobs request it; if that fails, submit again to continue."
        yield ClusterCheck("requeue", "warn", finding)
    wait = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    yield ClusterCheck("requeue delay", "pass", f"a requeued job waits {wait[1] if wait else 120} s at least")
    with contextlib.suppress(CommandError):
        user = run_slurm("id", "-un").strip()
        text = run_slurm("sacctmgr", "-n", "-P", "show", "association", f"user={user}", "format=MaxSubmitJobs")
        limit = min((int(line) for line in text.split() if line.isdigit()), default=runs)
        if limit < runs:
            finding = f"your account may have {limit:,} jobs; of {runs:,} runs the rest goes in when you submit again"
            yield ClusterCheck("submit limit", "warn", finding)


def _placement(slurm: SlurmConfig) -> Finding:
    """Check that SLURM would accept such a job and that it could start: sbatch accepts limits above a partition's."""
    try:
        rows = parse_rows(run_slurm("scontrol", "-o", "show", "partition"))
    except CommandError as error:
        return "fail", f"{error}. Try again later."
    partitions = {fields["PartitionName"]: fields for fields in rows}
    default = next((partition for partition, found in partitions.items() if found.get("Default") == "YES"), None)
    partition = slurm.partition or default
    if partition not in partitions:
        missing = f'there is no partition "{partition}"' if partition else "there is no default partition"
        where = f"[placement.slurm] or in {profile_file()}"
        return "fail", f"{missing}. Set partition in {where}; known: {', '.join(partitions)}."
    limit = _minutes(partitions[partition].get("MaxTime", "UNLIMITED"))
    if limit is not None and slurm.time_minutes > limit:
        return "fail", (
            f"time_minutes is {slurm.time_minutes:,}, and partition {partition} allows {limit:,}; the job would never "
            f"start. Set time_minutes = {limit} or less: a longer run continues in the next job."
        )
    if slurm.signal_seconds >= slurm.time_minutes * 60:
        return "fail", f"signal_seconds = {slurm.signal_seconds} is the whole job. Lower it, or raise time_minutes."
    try:
        run_slurm("sbatch", "--test-only", *_arguments(slurm), "--wrap", "true")
    except CommandError as error:
        message = str(error).removeprefix("sbatch failed: ")
        return "fail", f"SLURM would refuse: {message}. Change [placement.slurm]."
    if (exceeded := _exceeded_limit(slurm)) is not None:
        return "fail", f"{exceeded}; the job would never start. Request less, or have the limit raised."
    return "pass", f"partition {partition} would take it"


def _exceeded_limit(slurm: SlurmConfig) -> str | None:
    """A limit of the user's account or QOS that one job exceeds by itself, as a clause: sbatch accepts such jobs."""
    requested = {"cpu": slurm.processes * slurm.cpus_per_task, "node": slurm.nodes, "gres/gpu": slurm.devices}
    show = ("sacctmgr", "-n", "-P", "show")
    rows = []
    try:
        user = run_slurm("id", "-un").strip()
        account = slurm.account or run_slurm(*show, "user", user, "format=DefaultAccount").partition("\n")[0]
        text = run_slurm(*show, "association", f"account={account}", "format=User,GrpTRES,MaxTRES,GrpJobs,MaxJobs")
        rows += [(f"account {account}", row) for row in text.splitlines() if row.split("|")[0] in ("", user)]
        if slurm.qos is not None:
            text = run_slurm(*show, "qos", slurm.qos, "format=Name,GrpTRES,MaxTRES,GrpJobs")
            rows += [(f"QOS {slurm.qos}", row) for row in text.splitlines()]
    except CommandError:
        return None
    for owner, row in rows:
        group, each, *jobs = row.split("|")[1:]
        if "0" in jobs:
            return f"{owner} may have no running jobs"
        for resource, most in re.findall(r"([\w/]+)=(\d+)", f"{group},{each}"):
            if requested.get(resource, 0) > int(most):
                return f"{owner} may use {most} of {resource}, and a job requests {requested[resource]}"
    return None


def _arguments(slurm: SlurmConfig, *, without: tuple[str, ...] = ()) -> list[str]:
    options = {option: value for option, value in sbatch_options(slurm).items() if option not in without}
    return [f"--{option}" if value is True else f"--{option}={value}" for option, value in options.items()]


def _minutes(limit: str) -> int | None:
    """Minutes of a limit as SLURM writes it, ``1-02:30:00``; None for no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)


def _probe(root: Path, slurm: SlurmConfig) -> Finding:
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    answer = folder / f".probe-{uuid.uuid4().hex}"
    log = folder / f"{answer.name}.log"
    command = (
        f"PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code_root()))} srun {shlex.quote(sys.executable)} "
        f"-c {shlex.quote(PROBE)} {shlex.quote(str(answer))}"
    )
    request = _arguments(slurm, without=("time", "begin", "deadline", "dependency"))
    job = ["--wait", "--time=5", f"--job-name={JOB_PREFIX}-probe", "-o", str(log), "--wrap", command]
    try:
        run_slurm("sbatch", *request, *job, timeout=PROBE_SECONDS)
        gpus = answer.read_text()
        if int(gpus) < slurm.gpus_per_node:
            return "warn", f"torch sees {gpus} GPUs on the node, of {slurm.gpus_per_node} requested. Check CUDA there."
        return "pass", f"the environment imports there; torch sees {gpus} GPUs"
    except (CommandError, OSError) as error:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        cause = lines[-1] if lines else error
        return "fail", f"the job did not write into {root}: {cause}. Is the folder, with its environment, shared?"
    finally:
        answer.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
