"""The ``[placement]`` table of a campaign: where and how its runs execute, and the expected speed of the device.

Nothing in it changes a run's numbers or its id. Every value that reaches SLURM is checked here, so that no text of a
campaign file can become a shell command or an extra line of a batch script.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec

from scaling.errors import ConfigError, unknown_name
from scaling.io import NonNegativeFloat, Small, Strict
from scaling.spec import ExecutionConfig
from sweeps.config.toml import QUOTED, as_value, merged, read_toml

Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
"""A name that is safe as a folder, a job name or an option: it cannot leave the root or end a line."""

PEAKS: dict[str, float] = {
    # Dense bf16 peak of one device in FLOP/s, from the makers' data sheets.
    "A100": 312e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "MI300X": 1307.4e12,
    # One core in fp32: on a Zen 4 core large matrix products reach 100 GFLOP/s, assumed to be 0.8 of its peak.
    "cpu": 125e9,
}
"""Peaks by `accelerator`."""


SlurmWord = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.@:+-]*[A-Za-z0-9_]\Z", max_length=100)]
SlurmText = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.,:;@%+*&|()\[\]/= -]*\Z", max_length=500)]
Memory = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]*[KMGT]?\Z")]

MAX_CPUS = 10_000

SBATCH_OPTIONS = frozenset({
    "begin", "clusters", "cores_per_socket", "deadline", "dependency", "distribution", "exclude", "exclusive", "gres",
    "gpu_bind", "gpu_freq", "hint", "licenses", "mail_type", "mail_user", "mem_bind", "mem_per_cpu", "mem_per_gpu",
    "network", "nice", "nodelist", "ntasks_per_core", "ntasks_per_socket", "oversubscribe", "power", "prefer",
    "reservation", "sockets_per_node", "switches", "threads_per_core", "tmp", "wckey",
})  # fmt: skip
"""Options of sbatch that ``[placement.slurm.sbatch]`` may set. Options that the harness sets, and options that name files
or commands, are left out."""


class SlurmConfig(Strict, frozen=True):
    """``[placement.slurm]``: resources of a job. Your own profile file supplies the fields that a campaign leaves out.

    Raises:
        ConfigError: An option of sbatch is not in `SBATCH_OPTIONS`, or a value has a line break.
    """

    partition: SlurmWord | None = None
    """Partition, as for sbatch."""
    account: SlurmWord | None = None
    """Account, as for sbatch."""
    qos: SlurmWord | None = None
    """Quality of service, as for sbatch."""
    constraint: SlurmText | None = None
    """Required node features, as for sbatch."""
    nodes: Small = 1
    """Nodes of one job."""
    tasks_per_node: Small = 1
    """Processes on each node; they train one run together."""
    gpus_per_node: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """GPUs on each node; by default one for each process of a run on GPUs."""
    cpus_per_task: Annotated[int, msgspec.Meta(gt=0, le=MAX_CPUS)] = 1
    """CPUs of each task; by default `threads` for each run or process in it."""
    memory: Memory | None = None
    """Memory of each node, such as ``16G``."""
    time_minutes: Annotated[int, msgspec.Meta(gt=0, le=1_000_000)] = 60
    """Time limit of one job, in minutes; a longer run continues in the next job."""
    signal_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 120
    """Time before the limit at which the run gets the signal to save. SLURM may send it up to a minute early."""
    max_parallel: Annotated[int, msgspec.Meta(gt=0, le=1_000_000)] | None = None
    """Most tasks of an array at the same time."""
    max_kills: Small = 3
    """Killed attempts without progress before a run counts as failed."""
    stall_seconds: Annotated[int, msgspec.Meta(gt=0, le=10_000_000)] = 1800
    """Time without a new row of metrics, checkpoint or line of the log after which a run's processes are killed as
    stalled; the run continues from its last checkpoint."""
    environment: tuple[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z")], ...] = ()
    """Names of further environment variables that jobs inherit."""
    setup: tuple[str, ...] = ()
    """Shell lines before training, such as ``module load cuda``. Accepted from your own profile only."""
    sbatch: dict[str, SlurmText | int | bool] = msgspec.field(default_factory=dict)
    """Further options of sbatch, by their names without dashes."""

    def __post_init__(self) -> None:
        """Refuse options outside `SBATCH_OPTIONS`."""
        for option in self.sbatch:
            if option.replace("-", "_") not in SBATCH_OPTIONS:
                raise ConfigError(f"[placement.slurm.sbatch] {unknown_name('option', option, SBATCH_OPTIONS)}")
        for line in self.setup:
            if "\n" in line or "\0" in line:
                raise ConfigError(
                    f"[placement.slurm] setup has a line break in {QUOTED.repr(line)}. Write one string a line."
                )

    @property
    def devices(self) -> int:
        """GPUs of one job; 0 for runs on processors."""
        return self.nodes * self.gpus_per_node

    @property
    def processes(self) -> int:
        """Processes of one run."""
        return self.nodes * self.tasks_per_node


class PlacementConfig(ExecutionConfig, frozen=True):
    """``[placement]``: where and how runs execute; ``[placement.rungs."NAME"]`` replaces single fields for one rung.

    Raises:
        ConfigError: The accelerator has no row in `PEAKS`.
    """

    data: str | None = None
    """Folder of prepared token shards; by default the folder under the root that belongs to ``[data]``."""
    runs_per_gpu: Small = 1
    """Single-device runs that share a GPU at the same time; small models do not fill one. A SLURM job then has this many
    runs for each of its GPUs, or in total if it has none."""
    accelerator: str = "cpu"
    """Device whose peak is assumed before any run was measured, a row of `PEAKS`."""
    utilisation: Annotated[float, msgspec.Meta(ge=1e-6, le=1.0)] = 0.4
    """Share of that peak that you expect to reach."""
    price: NonNegativeFloat | None = None
    """Price of one GPU-hour (without GPUs: of one hour of a run), in any currency."""
    watts: NonNegativeFloat | None = None
    """Power of one GPU (without GPUs: of one run) in training, with its share of the machine."""
    slurm: SlurmConfig = SlurmConfig()
    """Resources of a SLURM job."""

    def __post_init__(self) -> None:
        """Refuse an accelerator without a row in `PEAKS`."""
        if self.accelerator not in PEAKS:
            raise ConfigError(f"[placement] {unknown_name('accelerator', self.accelerator, PEAKS)}")

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one device: a GPU, or the threads of one process."""
        return PEAKS[self.accelerator] * (self.threads if self.accelerator == "cpu" else 1)

    @property
    def on_cuda(self) -> bool:
        """True if runs train on GPUs, according to the campaign."""
        return self.device == "cuda" or (self.device == "auto" and self.accelerator != "cpu")

    @property
    def processes(self) -> int:
        """Processes of one run, one for each device."""
        return max(self.slurm.processes, self.devices)

    @property
    def runs_per_task(self) -> int:
        """Runs of one SLURM job, side by side."""
        return self.runs_per_gpu * max(self.slurm.gpus_per_node, 1) if self.runs_per_gpu > 1 else 1

    @property
    def gpus(self) -> float:
        """GPUs that one run occupies, idle ones included: a fraction if runs share a GPU, 0 without GPUs."""
        return (self.slurm.devices or (self.processes if self.on_cuda else 0)) / self.runs_per_task


def placements(
    table: dict[str, Any], rungs: list[str], *, where: str, file: type[msgspec.Struct] | None = None
) -> dict[str, PlacementConfig]:
    """The complete placement of every rung: the user's SLURM profile, then ``[placement]``, then the rung's own fields.

    Args:
        table: ``[placement]`` of the file, its sub-table ``rungs`` included.
        rungs: Names of all rungs.
        where: Name of the campaign file, for errors.
        file: The Struct of the whole campaign file, for errors.
    """
    shared = {name: value for name, value in table.items() if name != "rungs"}
    base = as_value(shared, PlacementConfig, where=f"{where}, [placement]", file=file)
    overrides = table.get("rungs", {})
    if not isinstance(overrides, dict) or not all(isinstance(value, dict) for value in overrides.values()):
        raise ConfigError(
            f'{where}, [placement]: rungs is {QUOTED.repr(overrides)}. Write [placement.rungs."NAME"] and fields below.'
        )
    for name in overrides:
        if name not in rungs:
            raise ConfigError(f"{where}, [placement.rungs]: {unknown_name('rung', name, rungs)}")
    profile = _profile(profile_file())
    found: dict[str, PlacementConfig] = {}
    for rung in rungs:
        raw, own = merged(shared, overrides.get(rung, {})), base
        if rung in overrides:
            own = as_value(raw, PlacementConfig, where=f'{where}, [placement.rungs."{rung}"]', file=file)
        slurm = raw.get("slurm", {})
        if "setup" in slurm:
            raise ConfigError(
                f"{where}, [placement.slurm]: setup holds shell lines, and a campaign file may come from anybody. "
                f"Move them into your own profile, {profile_file()}, as setup = [...]."
            )
        found[rung] = _complete(own, merged(profile, slurm))
    return found


def _complete(placement: PlacementConfig, slurm: dict[str, Any]) -> PlacementConfig:
    """The placement with its SLURM resources; GPUs and CPUs that no table names are derived from its runs."""
    job = as_value(slurm, SlurmConfig, where=str(profile_file()))
    if "gpus_per_node" not in slurm and "gres" not in job.sbatch and placement.on_cuda:
        job = msgspec.structs.replace(job, gpus_per_node=max(placement.devices, job.tasks_per_node))
    placement = msgspec.structs.replace(placement, slurm=job)
    if "cpus_per_task" not in slurm:
        processes = placement.runs_per_task * (1 if job.tasks_per_node > 1 else placement.devices)
        job = msgspec.structs.replace(job, cpus_per_task=min(placement.threads * processes, MAX_CPUS))
    return msgspec.structs.replace(placement, slurm=job)


PROFILE = "SCALING_SLURM_PROFILE"
"""Environment variable with the path of another profile file."""


def profile_file() -> Path:
    """The user's own SLURM defaults, a TOML file with the fields of ``[placement.slurm]``."""
    named = os.environ.get(PROFILE)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(named) if named else home / "scaling" / "slurm.toml"


def _profile(file: Path) -> dict[str, Any]:
    if not file.exists() and not os.environ.get(PROFILE):
        return {}
    profile = read_toml(file)
    status = file.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise ConfigError(
            f"{file}: others may write this file, and its setup lines run in your jobs. Run: chmod go-w {file}"
        )
    as_value(profile, SlurmConfig, where=str(file))
    return profile
