"""Arguments that several verbs share (campaign, run, root folder), and output of values and next steps."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from tyro.conf import Positional, UseAppendAction, arg

from scaling.errors import UserError, plain

if TYPE_CHECKING:
    from rich.table import Table

    from sweeps.config.campaign import Campaign
    from sweeps.planning.plan import CampaignPlan, PlannedRun

T = TypeVar("T")

CampaignName = Annotated[str, arg(metavar="CAMPAIGN")]
TableName = Annotated[str, arg(metavar="TABLE")]
RunName = Annotated[str, arg(metavar="RUN")]

ID_DIGITS = frozenset("0123456789abcdef")


def default_root() -> Path:
    """The folder in the environment variable SCALING_ROOT, or the current one."""
    return Path(os.environ.get("SCALING_ROOT", "."))


def root_option(root: Path) -> list[str]:
    """The words of the option --root, if the root is not the default."""
    return [] if root == default_root() else ["--root", str(root)]


@dataclass(frozen=True)
class OnCampaign:
    """Arguments of a verb on a campaign."""

    campaign: Positional[CampaignName]
    """Campaign file (TOML), or the name of a built-in one: quick, moonlight, ..."""
    root: Path = field(default_factory=default_root)
    """Folder of data/, runs/ and results/; the environment variable SCALING_ROOT sets another default."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """TABLE.KEY=VALUE replaces a value of the file, as in placement.slurm.partition=short; can be repeated."""

    def next_step(self, verb: str) -> None:
        """Print the next command on this campaign, with the same root and settings."""
        settings = () if verb == "fit" else self.set  # the table of runs already depends on them
        words = [*root_option(self.root), *(word for setting in settings for word in ("--set", setting))]
        next_step(shlex.join(["scaling", *verb.split(), self.campaign, *words]))

    def loaded(self, *, hyperparameters: str | None = None) -> Campaign:
        """The campaign."""
        from sweeps.config.campaign import load_campaign

        return load_campaign(self.campaign, hyperparameters=hyperparameters, settings=self.set)

    def planned(self, *, hyperparameters: str | None = None) -> CampaignPlan:
        """The campaign's runs, and which of them exist on disk."""
        from sweeps.planning.plan import plan

        return plan(self.loaded(hyperparameters=hyperparameters), self.root)

    def recorded(self) -> CampaignPlan:
        """The runs of plan.jsonl; made anew, with a sentence, if the campaign was not planned as it is now."""
        from sweeps.planning.plan import recorded_plan

        plan, note = recorded_plan(self.loaded(), self.root)
        if note:
            print(plain(note))
        return plan


@dataclass(frozen=True)
class OnRun:
    """Arguments of a verb on one run."""

    named: Positional[RunName]
    """The start of the run's id, its directory, or CAMPAIGN/ARM/RUNG/SEED, such as quick/muon/21k/0."""
    root: Path = field(default_factory=default_root)
    """Folder of runs/; the environment variable SCALING_ROOT sets another default."""

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return find_run(self.named, self.root)


def find_run(name: str, root: Path) -> Path:
    """The directory of a run by its name, as described at `OnRun.named`.

    Raises:
        UserError: No run or several runs have that name.
    """
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        return Path(name)
    runs, (campaign, *parts) = root / "runs", name.rsplit("/", 3)
    if name and set(name) <= ID_DIGITS:
        found = sorted(path for path in runs.glob(f"{name}*") if path.is_dir())
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(path.name for path in found[:5]) + (", ..." if len(found) > 5 else "")
            raise UserError(f'{runs}: the ids of {len(found)} runs start with "{name}": {some}. Give more digits.')
    elif len(parts) == 3 and (campaign.endswith(".toml") or (campaign and "/" not in campaign)):
        plan, run = planned_run(campaign, *parts, root=root)
        return plan.directory(run).path
    raise UserError(
        f'{runs}: there is no run "{name}". Give the start of an id from scaling status, the path of its directory, '
        "or CAMPAIGN/ARM/RUNG/SEED."
    )


def planned_run(campaign: str, arm: str, rung: str, seed: str, *, root: Path) -> tuple[CampaignPlan, PlannedRun]:
    """The plan of a campaign, and its run of an arm at a rung with a seed.

    Raises:
        UserError: The campaign has no such run.
    """
    from sweeps.planning.run_operations import select

    plan = OnCampaign(campaign, root).planned()
    chosen = select(plan, arm=arm, rung=rung)
    for run in chosen:
        if str(run.seed) == seed:
            return plan, run
    seeds = ", ".join(str(run.seed) for run in chosen)
    raise UserError(f"{plan.campaign.file}: arm {arm} has no run on rung {rung} with seed {seed}. Its seeds: {seeds}.")


def rich_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, title: str | None = None) -> Table:
    """A table for the terminal, its first `left` columns aligned to the left and the others to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_json(value: Any) -> None:
    """Print a value as JSON with all digits."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_result(value: T, json: bool, text: Callable[[T], str]) -> None:
    """Print a value as JSON, or as text."""
    if json:
        print_json(value)
    else:
        print(plain(text(value)))


def next_step(command: str) -> None:
    """Print the next command, in a form that works in this shell even if the environment is not activated."""
    print(plain(f"Next: {command.replace('scaling', program(), 1)}"))


def program() -> str:
    """The command in this shell: ``scaling`` if it is on the PATH, otherwise the way in which it was just called."""
    command = sys.argv[0]
    if shutil.which("scaling") or "/" not in command:
        return "scaling"
    return shlex.join([sys.executable, "-m", "scaling"]) if command.endswith("__main__.py") else shlex.quote(command)


def version() -> str:
    """The installed version, or "not installed" if the code runs from a folder."""
    from importlib import metadata

    try:
        return metadata.version("scaling-harness")
    except metadata.PackageNotFoundError:
        return "not installed"
