"""The documents: links, commands and examples work as printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scaling import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "results/*/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "tables.md"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CHEAP = ("scaling campaigns", "scaling plan", "scaling fit moonlight", "scaling audit results", "scaling --version")
"""Commands of documents that need no earlier command and take seconds."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return BLOCK.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Lines of a page's blocks that call the command line, without comments and prompts."""
    lines = [line.strip().removeprefix("$ ") for language, text in blocks(page) for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.join(shlex.split(part, comments=True)) for part in parts if part.startswith("scaling ")]


def environment(*paths: Path) -> dict[str, str]:
    """Variables of a process that imports from `paths` and from this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"}


def run(words: list[str], folder: Path, *paths: Path) -> str:
    """Output of a Python process that must succeed."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment(*paths), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert not broken


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for verb, _ in cli.VERBS.values():
        for kind in (verb, *getattr(verb, "__subclasses__", list)()):
            monkeypatch.setattr(kind, "run", lambda self: None, raising=False)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.main()


@pytest.mark.parametrize("command", [command for command in commands(ROOT / "README.md") if command.startswith(CHEAP)])
def test_commands_of_the_readme_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    cli.main()
    assert capsys.readouterr().out


def sections(page: Path) -> dict[str, list[tuple[str, str]]]:
    """Fenced blocks by the second-level heading above them."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    found = {title: BLOCK.findall(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: inside for title, inside in found.items() if any(language == "python" for language, _ in inside)}


EXTENDING = sections(ROOT / "docs" / "extending.md")


@pytest.mark.parametrize("section", EXTENDING)
def test_examples_of_extending_run(section: str, tmp_path: Path) -> None:
    """Python blocks of a section run as one program; a TOML block is the file that its first line names."""
    program = ""
    for language, text in EXTENDING[section]:
        if language == "toml" and (name := re.match(r"# ([\w.-]+\.toml)$", text.partition("\n")[0])):
            (tmp_path / name[1]).write_text(text)
        elif language == "python":
            program += text
    (tmp_path / "example.py").write_text(program)
    run(["-W", "error", "example.py"], tmp_path)


def install(package: Path, site: Path) -> None:
    """Put a package and its entry points into a folder, as an installer does, without a build."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    shutil.copytree(package / module, site / module)
    metadata = site / f"{module}-{project['version']}.dist-info"
    metadata.mkdir()
    name = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(name)
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{point} = {value}" for point, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_the_outside_optimizer_trains(tmp_path: Path) -> None:
    example = ROOT / "examples" / "lion_optimizer"
    install(example, tmp_path / "site")
    scaling = ["-m", "scaling"]
    campaign = [str(example / "campaign.toml"), "--root", str(tmp_path), "--set", "training.tokens_per_parameter=2"]
    groups = run([*scaling, "plan", *campaign, "--groups"], tmp_path, tmp_path / "site")
    assert len(re.findall(r"^\S+ .* lion ", groups, re.MULTILINE)) == 12
    run([*scaling, "submit", *campaign], tmp_path, tmp_path / "site")
    assert "6 of 6 runs finished" in run([*scaling, "collect", *campaign], tmp_path, tmp_path / "site")


def test_the_foreign_table_gives_its_planted_ratio() -> None:
    folder = ROOT / "examples" / "foreign_table"
    printed = run(["fit.py", "export.csv"], folder)
    ratio, low, high = map(float, re.findall(r"needs (\S+) times .*?interval (\S+) to (\S+)\)", printed)[0])
    assert low < 1 / 1.4 < high
    assert ratio == pytest.approx(1 / 1.4, rel=0.02)
    assert "row 21 (other): crashed" in printed
