"""Is this cluster fit for this campaign? Asked before GPU-hours are spent; each check passes, warns or fails.

Nothing is changed. With a probe, a job of a minute writes into the run root and imports the environment on a compute
node, for a login node can differ from those in both.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from scaling.console import console
from scaling.io import Strict
from sweeps.config.placement import SlurmConfig, profile_file
from sweeps.planning.plan import CampaignPlan
from sweeps.slurm.client import Unreachable, ask
from sweeps.slurm.snapshot import code_root, exposed

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
ROOM_BYTES = 1 << 30
PROBE_SECONDS = 180.0


class ClusterCheck(Strict, frozen=True):
    """One question with its answer."""

    name: str
    verdict: Literal["pass", "warn", "fail"]
    finding: str


def examine(plan: CampaignPlan, *, probe: bool = False) -> list[ClusterCheck]:
    """All checks of a campaign on this cluster.

    Args:
        plan: As `sweeps.planning.plan.plan` gives it.
        probe: Submit a job of at most a minute for each kind of placement, and wait for it.
    """
    checks = [*_commands(), *_root(plan.root)]
    if any(check.verdict == "fail" for check in checks):
        return checks
    kinds: dict[str, SlurmConfig] = {}
    for rung, table in plan.placements.items():
        if table.slurm not in kinds.values():
            kinds[rung] = table.slurm
    checks += _configuration(len(plan.distinct()))
    for rung, asked in kinds.items():
        checks += list(_placement(rung, asked))
        if probe:
            checks.append(_probe(plan.root, rung, asked))
    return checks


def show(checks: list[ClusterCheck]) -> None:
    """Print the checks as a table."""
    styles = {"pass": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("check", "", "finding"):
        table.add_column(column, no_wrap=column != "finding")
    for check in checks:
        table.add_row(check.name, Text(check.verdict, style=styles[check.verdict]), Text(check.finding))
    console().print(table)


def _commands() -> Iterator[ClusterCheck]:
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        yield ClusterCheck(
            name="commands",
            verdict="fail",
            finding=f"{', '.join(absent)} cannot be found. Log in to the cluster, or load its SLURM module.",
        )
        return
    try:
        ask("scontrol", "ping")
    except Unreachable as error:
        yield ClusterCheck(
            name="controller", verdict="fail", finding=f"{error}. Ask your administrators, or try later."
        )
        return
    yield ClusterCheck(name="controller", verdict="pass", finding=ask("scontrol", "--version").strip())
    try:
        ask("sacct", "-n", "-X", "-S", "now")
        yield ClusterCheck(name="accounting", verdict="pass", finding="sacct answers: hours spent will be known")
    except Unreachable as error:
        yield ClusterCheck(
            name="accounting",
            verdict="warn",
            finding=f"{error}. Campaigns work; hours spent and cancelled jobs will not be known.",
        )


def _root(root: Path) -> Iterator[ClusterCheck]:
    here = root
    while not here.exists():
        here = here.parent
    if not os.access(here, os.W_OK):
        yield ClusterCheck(
            name="run root", verdict="fail", finding=f"{here} is not writable. Choose another with --root."
        )
        return
    if (folder := exposed(root)) is not None:
        finding = f"others may write {folder}, and could replace what your jobs execute. Run chmod go-w, or move."
        yield ClusterCheck(name="run root", verdict="fail", finding=finding)
        return
    free = shutil.disk_usage(here).free
    if free < ROOM_BYTES:
        yield ClusterCheck(
            name="run root", verdict="fail", finding=f"{here} has {free / 1e9:.2f} GB left. Make room, or move."
        )
        return
    kind = _file_system(here)
    if kind in ("tmpfs", "ramfs") or here.is_relative_to("/tmp"):
        yield ClusterCheck(
            name="run root",
            verdict="warn",
            finding=f"{root} is on {kind or 'a local disk'}, which other nodes do not see. "
            "Use a shared file system, or check with --probe.",
        )
    else:
        yield ClusterCheck(name="run root", verdict="pass", finding=f"{root}, {kind}, {free / 1e9:,.0f} GB free")


def _file_system(path: Path) -> str:
    best, kind = "", ""
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            mount, found = line.split()[1:3]
            if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, found
    except (OSError, IndexError):
        return ""
    return kind


def _configuration(runs: int) -> Iterator[ClusterCheck]:
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*)$", ask("scontrol", "show", "config"), re.MULTILINE))
    largest = int(config.get("MaxArraySize", "1001"))
    arrays = -(-runs // largest)
    yield ClusterCheck(
        name="array size", verdict="pass", finding=f"at most {largest:,} tasks; {runs:,} runs are {arrays} of them"
    )
    if config.get("JobRequeue", "1").strip() == "0":
        yield ClusterCheck(
            name="requeue",
            verdict="warn",
            finding="the cluster does not requeue by default. Jobs ask for it; if that is refused, submit again to go on.",
        )
    wait = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    yield ClusterCheck(
        name="requeue delay", verdict="pass", finding=f"a requeued job waits {wait[1] if wait else 120} s at least"
    )
    limit = _submit_limit()
    if limit is not None and limit < runs:
        yield ClusterCheck(
            name="submit limit",
            verdict="warn",
            finding=f"your account may have {limit:,} jobs; of {runs:,} runs the rest goes in when you submit again",
        )


def _submit_limit() -> int | None:
    try:
        user = ask("id", "-un").strip()
        text = ask("sacctmgr", "-n", "-P", "show", "association", f"user={user}", "format=MaxSubmitJobs")
    except Unreachable:
        return None
    return min((int(line) for line in text.split() if line.isdigit()), default=None)


def _placement(rung: str, table: SlurmConfig) -> Iterator[ClusterCheck]:
    """Whether SLURM would take such a job, and whether it could ever start: it accepts limits above a partition's."""
    name = f"placement of {rung}"
    try:
        partitions = [
            dict(re.findall(r"(\w+)=(\S*)", line)) for line in ask("scontrol", "-o", "show", "partition").splitlines()
        ]
    except Unreachable as error:
        yield ClusterCheck(name=name, verdict="fail", finding=f"{error}. Try again later.")
        return
    known = [partition["PartitionName"] for partition in partitions]
    chosen = [
        partition
        for partition in partitions
        if (partition["PartitionName"] == table.partition if table.partition else partition.get("Default") == "YES")
    ]
    if not chosen:
        wanted = f'there is no partition "{table.partition}"' if table.partition else "there is no default partition"
        yield ClusterCheck(
            name=name,
            verdict="fail",
            finding=f"{wanted}. Set partition in [placement.slurm] or in {profile_file()}; known: {', '.join(known)}.",
        )
        return
    limit = _minutes(chosen[0].get("MaxTime", "UNLIMITED"))
    if limit is not None and table.time_minutes > limit:
        yield ClusterCheck(
            name=name,
            verdict="fail",
            finding=f"minutes is {table.time_minutes:,}, and partition {chosen[0]['PartitionName']} allows {limit:,}; "
            f"the job would wait for ever. Set time_minutes = {limit} or less: a longer run continues in the next job.",
        )
        return
    if table.signal_seconds >= table.time_minutes * 60:
        yield ClusterCheck(
            name=name,
            verdict="fail",
            finding=f"signal_seconds is {table.signal_seconds}, as long as the job itself. Lower it, or give more minutes.",
        )
        return
    try:
        ask("sbatch", "--test-only", *_request(table), "--wrap", "true")
    except Unreachable as error:
        said = str(error).removeprefix("sbatch failed: ")
        yield ClusterCheck(name=name, verdict="fail", finding=f"SLURM would refuse: {said}. Change [placement.slurm].")
        return
    if (exceeded := _limit_below(table)) is not None:
        yield ClusterCheck(
            name=name,
            verdict="fail",
            finding=f"{exceeded}; the job would wait for ever. Ask for less in [placement.slurm], or have the limit raised.",
        )
        return
    yield ClusterCheck(name=name, verdict="pass", finding=f"partition {chosen[0]['PartitionName']} would take it")


def _limit_below(table: SlurmConfig) -> str | None:
    """A limit of the user's account or QOS that one job exceeds by itself, as a clause: sbatch accepts such jobs."""
    wanted = {
        "cpu": table.nodes * table.tasks_per_node * table.cpus_per_task,
        "node": table.nodes,
        "gres/gpu": table.devices,
    }
    limits = "GrpTRES,MaxTRES,GrpJobs,MaxJobs"
    rows = []
    try:
        user = ask("id", "-un").strip()
        account = (
            table.account
            or ask("sacctmgr", "-n", "-P", "show", "user", user, "format=DefaultAccount").partition("\n")[0]
        )
        text = ask("sacctmgr", "-n", "-P", "show", "association", f"account={account}", f"format=User,{limits}")
        rows += [(f"account {account}", row) for row in text.splitlines() if row.split("|")[0] in ("", user)]
        if table.qos is not None:
            text = ask("sacctmgr", "-n", "-P", "show", "qos", table.qos, "format=Name,GrpTRES,MaxTRES,GrpJobs")
            rows += [(f"QOS {table.qos}", row) for row in text.splitlines()]
    except Unreachable:
        return None
    for owner, row in rows:
        group, each, *jobs = row.split("|")[1:]
        if "0" in jobs:
            return f"{owner} may have no running jobs"
        for name, most in re.findall(r"([\w/]+)=(\d+)", f"{group},{each}"):
            if wanted.get(name, 0) > int(most):
                return f"{owner} may use {most} of {name}, and a job asks for {wanted[name]}"
    return None


def _request(table: SlurmConfig) -> list[str]:
    options = {
        "partition": table.partition,
        "account": table.account,
        "qos": table.qos,
        "constraint": table.constraint,
        "nodes": table.nodes,
        "ntasks-per-node": table.tasks_per_node,
        "cpus-per-task": table.cpus_per_task,
        "gpus-per-node": table.gpus_per_node or None,
        "mem": table.memory,
        "time": table.time_minutes,
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def _minutes(limit: str) -> int | None:
    """Minutes of a limit as SLURM writes it, ``1-02:30:00``; None for no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes + (seconds > 0)


def _probe(root: Path, rung: str, table: SlurmConfig) -> ClusterCheck:
    """A short job that writes into the root and imports what a run imports."""
    name = f"probe of {rung}"
    folder = root / "submissions"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    answer = folder / f".probe-{uuid.uuid4().hex}"
    python = shlex.quote(sys.executable)
    code = "import scaling.training.loop, pathlib, sys, torch; pathlib.Path(sys.argv[1]).write_text(str(torch.cuda.device_count()))"
    command = (
        f"PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code_root()))} srun {python} -c {shlex.quote(code)} "
        f"{shlex.quote(str(answer))}"
    )
    request = [option for option in _request(table) if not option.startswith("--time=")]
    log = folder / f"{answer.name}.log"
    try:
        ask("sbatch", "--wait", "--time=5", *request, "-o", str(log), "--wrap", command, timeout=PROBE_SECONDS)
        found = answer.read_text()
        if int(found) < table.gpus_per_node:
            return ClusterCheck(
                name=name,
                verdict="warn",
                finding=f"torch sees {found} GPUs on the node, and {table.gpus_per_node} were asked for. ClusterCheck CUDA there.",
            )
        return ClusterCheck(
            name=name, verdict="pass", finding=f"the environment imports there; torch sees {found} GPUs"
        )
    except (Unreachable, OSError) as error:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        said = tail[0] if tail else str(error)
        return ClusterCheck(
            name=name,
            verdict="fail",
            finding=f"the job did not write into {root}: {said}. Is the folder, with its environment, shared?",
        )
    finally:
        answer.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
