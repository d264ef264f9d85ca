"""The walls of the house: who may import whom, and what a question on a laptop must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH_FREE = {
    "scaling.spec",
    "scaling.units",
    "scaling.power_rule",
    "scaling.flops",
    "scaling.run.directory",
    "scaling.errors",
}
HEAVY = {"torch", "lightning", "pandas", "scipy", "matplotlib", "optuna", "submitit"}


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", files_of("scaling"), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_run_knows_neither_sweeps_nor_analysis(file: Path) -> None:
    if file.parent.name == "cli":
        return
    assert not [name for name in imports_of(file) if name.split(".")[0] in ("sweeps", "analysis")]


@pytest.mark.parametrize("file", files_of("sweeps"), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_sweeps_do_not_know_what_runs_mean(file: Path) -> None:
    assert not [name for name in imports_of(file) if name.split(".")[0] == "analysis"]


@pytest.mark.parametrize("file", files_of("analysis"), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_analysis_reads_records_and_nothing_else_of_a_run(file: Path) -> None:
    used = {name for name in imports_of(file) if name.split(".")[0] in ("scaling", "sweeps")}
    allowed = {name for name in used if any(name == free or name.startswith(free + ".") for free in TORCH_FREE)}
    assert used - allowed <= {"scaling"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_analysis_opens_without_torch() -> None:
    assert not loaded_by("import analysis, analysis.ratio.study, analysis.ratio.match, analysis.reporting.html") & {
        "torch",
        "lightning",
    }


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by("import scaling.cli") & HEAVY


def test_a_campaign_is_planned_without_torch() -> None:
    assert not loaded_by("import sweeps.config.campaign, sweeps.planning.plan") & {"torch", "lightning"}
