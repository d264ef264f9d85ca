"""The batch script, the snapshot of the code, and the call of sbatch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scaling.errors import UserError
from scaling.run.provenance import describe_code
from sweeps.config.campaign import load_campaign
from sweeps.config.placement import SlurmConfig
from sweeps.planning.plan import plan
from sweeps.slurm import exit_codes
from sweeps.slurm.client import CommandError
from sweeps.slurm.sbatch import batch_script, code_digest, launch, take_snapshot
from sweeps.slurm.submit import submit_slurm

HOSTILE = [
    "$(touch {mark})",
    "`touch {mark}`",
    "a; touch {mark}",
    "a' ; touch {mark} '",
    'a" ; touch {mark} "',
    "a\n#SBATCH --wrap=x\ntouch {mark}",
]


SLURM_FIELDS = [field.name for field in msgspec.structs.fields(SlurmConfig) if "str" in str(field.type)]


@pytest.mark.parametrize("payload", HOSTILE)
@pytest.mark.parametrize(
    "field", [*SLURM_FIELDS, "name", "title", "sbatch option", "sbatch value", "rung", "arm", "data"]
)
def test_no_text_of_a_campaign_file_is_executed(
    field: str, payload: str, campaigns: Any, commands: Any, no_profile: Path, tmp_path: Path
) -> None:
    commands(srun="exit 0")
    mark = tmp_path / "executed"
    text = msgspec.json.encode(payload.format(mark=mark)).decode()  # a JSON string is a TOML string
    campaigns.plan()
    file = campaigns.folder / "tiny.toml"
    content = file.read_text()
    match field:
        case "name":
            content = content.replace('name = "tiny"', f"name = {text}")
        case "title":
            content = f"title = {text}\n{content}"
        case "rung":
            content = content.replace('name = "a"', f"name = {text}")
        case "arm":
            content = content.replace('name = "muon"', f"name = {text}")
        case "data":
            content = content.replace(f'path = "{campaigns.text}"', f"path = {text}")
        case "sbatch option":
            content += f"[placement.slurm.sbatch]\n{text} = 1\n"
        case "sbatch value":
            content += f"[placement.slurm.sbatch]\nreservation = {text}\n"
        case "setup" | "environment":
            content += f"[placement.slurm]\n{field} = [{text}]\n"
        case "sbatch":
            content += f"[placement.slurm]\nsbatch = {text}\n"
        case _:
            content += f"[placement.slurm]\n{field} = {text}\n"
    file.write_text(content)
    scripts = []
    with contextlib.suppress(UserError):
        scripts = submit_slurm(plan(load_campaign(file), campaigns.folder / "root"), dry_run=True).scripts()
    for script in scripts:
        # Without the check of the snapshot, which is not there and would end the script early.
        unchecked = "\n".join(line for line in script.splitlines() if not line.startswith("found="))
        assert unchecked != script
        subprocess.run(["bash", "-c", unchecked], capture_output=True, check=False)
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
        assert not any("--wrap" in line for line in directives)
    assert not mark.exists()


def test_setup_lines_come_from_the_profile_alone(campaigns: Any, no_profile: Path) -> None:
    no_profile.write_text('partition = "gpu"\nsetup = ["module load cuda"]\n')
    submission = submit_slurm(campaigns.plan(), dry_run=True)
    assert "\nmodule load cuda\n" in submission.scripts()[0]
    assert "--partition=gpu" in submission.scripts()[0]
    no_profile.chmod(0o666)
    with pytest.raises(UserError, match="chmod go-w"):
        submit_slurm(campaigns.plan(), dry_run=True)


@pytest.mark.parametrize("change", [None, "a module edited", "a module added", "a compiled file", "a linked package"])
def test_a_changed_snapshot_starts_nothing(
    campaigns: Any, no_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    code = take_snapshot(tmp_path / "code")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python", "srun"):
        (shims / name).write_text('#!/bin/bash\ntouch "$0.ran"\n')
        (shims / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shims / "python"))
    script = batch_script(campaigns.plan(), SlurmConfig(), token="t", tasks=1, code=code)
    if change == "a module edited":
        (code / "sweeps" / "local.py").write_text("# edited\n")
    elif change == "a module added":
        (code / "torch.py").write_text("")
    elif change == "a compiled file":
        (code / "sweeps" / "__pycache__").mkdir()
        (code / "sweeps" / "__pycache__" / "plan.cpython-311.pyc").write_text("")
    elif change == "a linked package":
        (code / "torch").symlink_to(tmp_path)
    environment = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    ran = {file.stem for file in shims.glob("*.ran")}
    if change is None:
        assert (done.returncode, ran) == (0, {"python", "srun"}), done.stderr
        assert take_snapshot(tmp_path / "code") == code
    else:
        assert (done.returncode, ran) == (exit_codes.NOT_RECORDED, set())
        assert "files differ from the submitted code" in done.stderr
        with pytest.raises(UserError, match="remove the folder and submit again"):
            take_snapshot(tmp_path / "code")


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("your job 41 used 3 hours\nSubmitted batch job 5", "5"),
        ("Submitted batch job 5 on cluster c2\nsee you at job 41", "5"),
        ("thanks for job 41", None),
    ],
)
def test_the_job_id_is_read_from_sbatchs_own_line(commands: Any, tmp_path: Path, printed: str, job: str | None) -> None:
    commands(sbatch=f"printf '{printed}\n'")
    if job is None:
        with pytest.raises(CommandError, match="thanks for job 41"):
            launch(tmp_path / "script", "")
    else:
        assert launch(tmp_path / "script", "") == job


def test_a_signal_at_the_start_of_a_job_is_refused(campaigns: Any, no_profile: Path) -> None:
    no_profile.write_text("time_minutes = 2\n")
    with pytest.raises(UserError, match="signal_seconds = 120 is the whole time limit, time_minutes = 2"):
        submit_slurm(campaigns.plan(), dry_run=True)


def test_a_snapshot_is_named_by_its_content(tmp_path: Path) -> None:
    first = take_snapshot(tmp_path)
    before = (first / "sweeps" / "local.py").stat().st_mtime_ns
    assert take_snapshot(tmp_path) == first
    assert (first / "sweeps" / "local.py").stat().st_mtime_ns == before
    assert code_digest(first) == first.name == code_digest()
    (first / "sweeps" / "local.py").write_text("# edited\n")
    assert code_digest(first) != first.name


def test_the_script_is_valid_bash(campaigns: Any, no_profile: Path, tmp_path: Path) -> None:
    script = batch_script(campaigns.plan(), SlurmConfig(gpus_per_node=2, memory="16G"), token="t", tasks=3)
    assert subprocess.run(["bash", "-n", "-c", script], check=True)


def test_code_of_a_snapshot_knows_its_commit(tmp_path: Path) -> None:
    folder = take_snapshot(tmp_path)
    program = "from scaling.run.provenance import describe_code; print(describe_code().commit)"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    printed = subprocess.check_output([sys.executable, "-P", "-c", program], env=environment, text=True)
    assert printed.strip() == str(describe_code().commit)
