"""What several verbs share: the campaign argument, the root folder, and how values are printed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from tyro.conf import Positional, UseAppendAction, arg

from scaling.errors import UserError, plain

if TYPE_CHECKING:
    from sweeps.config.campaign import Campaign
    from sweeps.planning.plan import CampaignPlan

CampaignName = Annotated[str, arg(metavar="CAMPAIGN")]
TableName = Annotated[str, arg(metavar="TABLE")]
RunName = Annotated[str, arg(metavar="RUN")]

ID_LETTERS = frozenset("0123456789abcdef")


def default_root() -> Path:
    """The folder that SCALING_ROOT names, else this one."""
    return Path(os.environ.get("SCALING_ROOT", "."))


def under(root: Path) -> list[str]:
    """The option that names a root, where it is not the default."""
    return [] if root == default_root() else ["--root", str(root)]


@dataclass(frozen=True)
class OnCampaign:
    """A verb about a campaign."""

    campaign: Positional[CampaignName]
    """Campaign file (TOML), or the name of a built-in one: quick, moonlight, ..."""
    root: Path = field(default_factory=default_root)
    """Folder that holds data/, runs/ and results/; the environment variable SCALING_ROOT sets another default."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """TABLE.KEY=VALUE in place of what the file says, such as placement.slurm.partition=short; may be repeated."""

    def next_step(self, verb: str) -> None:
        """What a reader does now with this campaign, under the same root and settings."""
        settings = () if verb == "fit" else self.set  # a table of runs has its settings behind it
        words = [*under(self.root), *(word for setting in settings for word in ("--set", setting))]
        next_step(shlex.join(["scaling", *verb.split(), self.campaign, *words]))

    def loaded(self, *, hyperparameters: str | None = None) -> Campaign:
        """The campaign."""
        from sweeps.config.campaign import load_campaign

        return load_campaign(self.campaign, hyperparameters=hyperparameters, settings=self.set)

    def planned(self, *, hyperparameters: str | None = None) -> CampaignPlan:
        """The campaign's runs against what the disk holds."""
        from sweeps.planning.plan import plan

        return plan(self.loaded(hyperparameters=hyperparameters), self.root)


@dataclass(frozen=True)
class OnRun:
    """A verb about one run."""

    named: Positional[RunName]
    """The start of the run's id, its directory, or CAMPAIGN/ARM/RUNG/SEED, such as quick/muon/21k/0."""
    root: Path = field(default_factory=default_root)
    """Folder that holds runs/; the environment variable SCALING_ROOT sets another default."""

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return find_run(self.named, self.root)


def find_run(name: str, root: Path) -> Path:
    """The directory of the run that a name means: see `OnRun.named`.

    Raises:
        UserError: No run has that name, or several have.
    """
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return Path(name)
    runs, (campaign, *parts) = root / "runs", name.rsplit("/", 3)
    if name and set(name) <= ID_LETTERS:
        found = sorted(path for path in runs.glob(f"{name}*") if path.is_dir())
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f'{runs}: {len(found)} runs begin with "{name}": {", ".join(path.name for path in found[:5])}'
                f"{', ...' if len(found) > 5 else ''}. Give more of the id."
            )
    elif len(parts) == 3 and (campaign.endswith(".toml") or (campaign and "/" not in campaign)):
        return _in_campaign(campaign, *parts, root=root)
    raise UserError(
        f'{runs}: no run is called "{name}". Give the start of an id as scaling status shows it, the path of its directory, '
        "or CAMPAIGN/ARM/RUNG/SEED."
    )


def _in_campaign(campaign: str, arm: str, rung: str, seed: str, *, root: Path) -> Path:
    from sweeps.planning.run_operations import select

    plan = OnCampaign(campaign, root).planned()
    chosen = select(plan, arm=arm, rung=rung)
    for run in chosen:
        if str(run.seed) == seed:
            return plan.directory(run).path
    seeds = ", ".join(str(run.seed) for run in chosen)
    raise UserError(f"{plan.campaign.file}: {arm} has no run of rung {rung} with seed {seed}. Seeds there: {seeds}.")


def print_json(value: Any) -> None:
    """A value, msgspec's or plain, with all its digits."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def next_step(command: str) -> None:
    """Print what to do now: a command that the reader's shell finds, even where the environment is not activated."""
    print(plain(f"Next: {command.replace('scaling', program(), 1)}"))


def program() -> str:
    """How this shell calls the command line: by its name if that is on the PATH, else as it was called now."""
    called = sys.argv[0]
    if shutil.which("scaling") or "/" not in called:
        return "scaling"
    return shlex.join([sys.executable, "-m", "scaling"]) if called.endswith("__main__.py") else shlex.quote(called)


def version() -> str:
    """The installed version; "not installed" where the code runs from a folder."""
    from importlib import metadata

    try:
        return metadata.version("scaling-harness")
    except metadata.PackageNotFoundError:
        return "not installed"
