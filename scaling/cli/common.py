"""What several verbs share: the campaign argument, the root folder, and how values are printed."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from tyro.conf import Positional, UseAppendAction, arg

from scaling.errors import plain

if TYPE_CHECKING:
    from sweeps.campaign import Campaign
    from sweeps.plan import Plan

CampaignName = Annotated[str, arg(metavar="CAMPAIGN")]
TableName = Annotated[str, arg(metavar="TABLE")]
RunDir = Annotated[Path, arg(metavar="RUN_DIR")]


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
        from sweeps.campaign import load_campaign

        return load_campaign(self.campaign, hyperparameters=hyperparameters, settings=self.set)

    def planned(self, *, hyperparameters: str | None = None) -> Plan:
        """The campaign's runs against what the disk holds."""
        from sweeps.plan import plan

        return plan(self.loaded(hyperparameters=hyperparameters), self.root)


def print_json(value: Any) -> None:
    """A value, msgspec's or plain, with all its digits."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def next_step(command: str) -> None:
    """What a reader does now."""
    print(plain(f"Next: {command}"))
