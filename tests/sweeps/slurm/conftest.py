"""Fake SLURM commands, an empty user profile, and a campaign that is ready for submission."""

from __future__ import annotations

import shutil
import stat
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sweeps.planning.plan import CampaignPlan, with_data


class FakeCommands:
    """Shell scripts in place of SLURM's commands, on a PATH without the real ones."""

    TOOLS = ("bash", "cat", "dirname", "git", "ls", "sed", "seq", "sleep", "touch", "wc")
    IDLE = {"scontrol": "echo 'MaxArraySize = 1001'", "squeue": "exit 0", "sacct": "exit 0", "srun": "exit 0"}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for tool in self.TOOLS:
            (folder / tool).symlink_to(str(shutil.which(tool)))

    def __call__(self, **scripts: str) -> None:
        """Write or replace commands."""
        for name, body in scripts.items():
            file = self.folder / name
            file.write_text(f"#!{self.folder}/bash\n{textwrap.dedent(body)}\n")
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def idle(self, **scripts: str) -> None:
        """A cluster with an empty queue and an empty accounting, and further commands."""
        self(**(self.IDLE | scripts))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """See `FakeCommands`; without any command at first."""
    fakes = FakeCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(fakes.folder))
    return fakes


@pytest.fixture
def no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty profile of the user."""
    file = tmp_path / "slurm.toml"
    file.write_text("")
    file.chmod(0o600)
    monkeypatch.setenv("SCALING_SLURM_PROFILE", str(file))
    return file


@pytest.fixture
def ready(campaigns: Any, no_profile: Path) -> CampaignPlan:
    """A plan of four runs whose data are prepared."""
    return with_data(campaigns.plan(), progress=False)
