"""The layout of the packages: which folder imports which, and what a question on a laptop must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("scaling", "sweeps", "analysis")

ORDER = {
    "scaling": (
        *("errors", "units", "io", "registry", "console", "power_rule", "model_config", "models", "flops", "spec"),
        *("optim.newton_schulz", "optim.distributed", "optim"),
        *("run", "data.sources", "data", "export", "evaluation", "training", "cli", "__main__"),
    ),
    "sweeps": ("config", "planning", "local", "slurm", "tuning", "reporting"),
    "analysis": (
        *("data", "fitting", "uncertainty", "ratio"),
        *("single_arm", "power", "audit", "figures", "reporting"),
    ),
}
"""Folders and loose modules of each package: one imports only those before it, and never the package itself."""

VALUES = {
    f"scaling.{name}"
    for name in (
        "errors",
        "units",
        "io",
        "registry",
        "console",
        "model_config",
        "flops",
        "spec",
        "power_rule",
        "schedule",
    )
}
MAX_LOOSE_MODULES = 10
HEAVY = {"torch", "lightning", "pandas", "scipy", "matplotlib", "optuna", "submitit"}


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports_of(file: Path) -> set[str]:
    """Modules of the three packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return found & MODULES.keys()


def folder_of(module: str) -> str:
    """The folder of a module; a loose module of a package, and a package itself, stand for themselves."""
    if MODULES[module].name == "__init__.py" or module.count(".") == 1:
        return module
    return module.rpartition(".")[0]


def place_of(folder: str) -> int | None:
    """Position of a folder in `ORDER`; the longest name that fits counts."""
    package, _, rest = folder.partition(".")
    fitting = [name for name in ORDER[package] if rest == name or rest.startswith(f"{name}.")]
    return ORDER[package].index(max(fitting, key=len)) if fitting else None


def edges() -> dict[tuple[str, str], list[str]]:
    """Folder-level imports, each with the modules that cause it."""
    found = defaultdict(list)
    for module, file in MODULES.items():
        for imported in imports_of(file):
            one, other = folder_of(module), folder_of(imported)
            if one != other:
                found[one, other].append(f"{module} imports {imported}")
    return found


def test_folders_import_in_the_stated_order() -> None:
    wrong = []
    for (one, other), causes in edges().items():
        if one in PACKAGES or one.partition(".")[0] != other.partition(".")[0]:
            continue
        mine, theirs = place_of(one), place_of(other)
        if mine is None or theirs is None or theirs >= mine:
            wrong += causes
    assert not wrong


def test_every_folder_has_its_place() -> None:
    folders = {folder_of(module) for module in MODULES} - set(PACKAGES)
    assert not [folder for folder in sorted(folders) if place_of(folder) is None]


def test_few_modules_are_loose() -> None:
    loose = [name for name, file in MODULES.items() if name.count(".") == 1 and file.name != "__init__.py"]
    assert len([name for name in loose if name != "scaling.__main__"]) <= MAX_LOOSE_MODULES


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("scaling", {"scaling"}), ("sweeps", {"scaling", "sweeps"}), ("analysis", {"analysis", *VALUES})],
)
def test_packages_know_only_those_below(package: str, allowed: set[str]) -> None:
    wrong = {
        f"{module} imports {imported}"
        for module, file in MODULES.items()
        if module.partition(".")[0] == package and not module.startswith(("scaling.cli", "scaling.__main__"))
        for imported in imports_of(file)
        if imported not in allowed and imported.partition(".")[0] not in allowed
    }
    assert not wrong


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_analysis_opens_without_torch() -> None:
    every = ", ".join(module for module in MODULES if module.partition(".")[0] == "analysis")
    assert not loaded_by(f"import {every}") & {"torch", "lightning"}


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by("import scaling.cli") & HEAVY


def test_a_campaign_is_planned_without_torch_or_optuna() -> None:
    every = ", ".join(module for module in MODULES if module.startswith(("sweeps.config.", "sweeps.planning.")))
    assert not loaded_by(f"import {every}") & {"torch", "lightning", "optuna"}
