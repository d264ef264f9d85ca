"""The command line: sentences instead of tracebacks, help, names of runs, next steps, and whole pipelines."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import tuned
from tiny import BOTH_ARMS, ON_CPU, campaign_head, rung_table

from scaling import cli
from scaling.cli.common import find_run, next_step
from scaling.cli.tables import Report
from sweeps.config.campaign import built_in
from sweeps.local import LocalOutcome


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit status of ``scaling ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["scaling", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


CAMPAIGN = (
    "seeds = [0]"
    + campaign_head("tiny", training="tokens_per_parameter = 2")
    + BOTH_ARMS
    + rung_table("a")
    + rung_table("b", width=24)
    + rung_table("c", layers=2, width=24)
    + ON_CPU
)

TABLE = """arm,params,tokens,flops,loss
adamw,1000,20000,1.2e8,3.0
adamw,2000,40000,4.8e8,2.8
adamw,4000,80000,1.92e9,2.6
muon,1000,20000,1.2e8,2.9
muon,2000,40000,4.8e8,2.7
muon,4000,80000,1.92e9,2.5
"""

TUNE = """
trials = 2
rungs = ["a"]
[tune.search.peak_lr]
low = 1e-3
high = 1e-1
"""


@pytest.fixture
def campaign(tiny_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CAMPAIGN.format(text=tiny_text))
    return path


CAMPAIGN_FAULTS = {
    "misspelt key": (("batch_tokens =", "batch_token ="), ["tiny.toml", "training", "batch_token", "batch_tokens"]),
    "wrong type": (("batch_tokens = 128", "batch_tokens = 1e9"), ["tiny.toml", "training", "batch_tokens"]),
    "impossible shape": (("width = 16\nheads = 2", "width = 16\nheads = 3"), ["tiny.toml", '"a"', "16", "3"]),
    "missing data": (('path = "', 'path = "/nowhere'), ["tiny.toml", "[data]", "nowhere"]),
    "unknown optimizer": (('optimizer = "muon"', 'optimizer = "muonn"'), ["tiny.toml", '"muonn"', '"muon"']),
    "unknown word": (
        ('device = "cpu"', 'device = "tpu"'),
        ["tiny.toml", "[placement]", "'tpu'", '"auto", "cpu", "cuda"'],
    ),
    "no TOML": (("[model]", "[model"), ["tiny.toml", "TOML"]),
    "ragged batch": (("batch_tokens = 128", "batch_tokens = 100"), ["tiny.toml", "100", "context 16"]),
}


@pytest.mark.parametrize(("change", "expected"), CAMPAIGN_FAULTS.values(), ids=CAMPAIGN_FAULTS.keys())
def test_a_faulty_campaign_is_one_sentence(
    campaign: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    expected: list[str],
) -> None:
    campaign.write_text(campaign.read_text().replace(*change, 1))
    assert run(monkeypatch, "plan", campaign, "--root", tmp_path) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("\n") == 1, "one line"
    assert [part for part in expected if part not in message] == []


TABLE_FAULTS = {
    "NaN": (("1.92e9,2.6", "1.92e9,"), ["runs.csv", "loss"]),
    "missing column": (("loss", "perplexity"), ["runs.csv: column loss is missing", "--map loss=COLUMN"]),
    "not a number": (("4.8e8,2.8", "4.8e8,two"), ["runs.csv", "loss"]),
    "negative compute": (("1.2e8,3.0", "-1.2e8,3.0"), ["runs.csv", "flops"]),
}


@pytest.mark.parametrize(("change", "expected"), TABLE_FAULTS.values(), ids=TABLE_FAULTS.keys())
def test_a_faulty_table_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    expected: list[str],
) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(TABLE.replace(*change, 1))
    assert run(monkeypatch, "fit", table) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--law", "power", "--arm", "muon", "--delta", "nan"), "--delta nan: give a number above 0"),
        (("--law", "power", "--arm", "muon", "--delta", "-1"), "--delta -1: give a number above 0"),
        (("--delta", "0.01"), "--delta needs --law"),
        (("--holdout", "0"), "at least one rung is left out"),
        (("--law", "surface", "--arm", "muon"), "these runs carry no law surface"),
    ],
)
def test_inconsistent_fit_options_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert run(monkeypatch, "fit", "moonlight", *words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert expected in message


def test_a_fit_is_printed_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "runs.csv"
    table.write_bytes((Path(__file__).parents[1] / "results" / "demo" / "runs.csv").read_bytes())
    (tmp_path / "fits.json").mkdir()
    assert run(monkeypatch, "fit", tmp_path) == 2
    output = capsys.readouterr()
    assert "FLOPs" in output.out
    assert re.fullmatch(rf"scaling: .*{tmp_path}/fits.json: Is a directory. There is a folder .*\n", output.err)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/dev/null", "Not a directory. There is a file where"),
        ("/tmp/" + 300 * "a", "File name too long. Use a shorter"),
    ],
)
def test_an_operating_system_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: str, expected: str
) -> None:
    assert run(monkeypatch, "plan", "quick", "--root", root) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert root in message
    assert expected in message


def test_names_of_runs(
    campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", campaign, "--json", "--root", tmp_path) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    chosen = next(row for row in rows if (row["arm"], row["rung"], row["seed"]) == ("muon", "b", 0))
    for row in rows:
        (tmp_path / "runs" / row["run"]).mkdir(parents=True)
    directory = tmp_path / "runs" / chosen["run"]
    for name in (chosen["run"], chosen["run"][:8], str(directory), f"{campaign}/muon/b/0"):
        assert find_run(name, tmp_path) == directory
    for name in (
        "",
        "zz",
        "nowhere/muon/b",
        "/no/such/place",
        f"{campaign}/muon/b/7",
        f"{campaign}/muonn/b/0",
        300 * "a",
    ):
        assert run(monkeypatch, "logs", name, "--root", tmp_path) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert message.startswith("scaling: "), message


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_example_of_each_verb_can_be_run(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, example = cli.VERBS[verb]
    words = shlex.split(example)
    assert words[:2] == ["scaling", verb]
    assert run(monkeypatch, verb, "--help") == 0
    assert f"Example: {example}" in capsys.readouterr().out
    ran: list[object] = []
    monkeypatch.setattr(kind, "run", lambda self: ran.append(self))
    assert run(monkeypatch, *words[1:]) == 0
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("called", "on_path", "expected"),
    [
        (".venv/bin/scaling", None, ".venv/bin/scaling"),
        (".venv/bin/scaling", "/usr/bin/scaling", "scaling"),
        ("/code/scaling/__main__.py", None, f"{sys.executable} -m scaling"),
    ],
)
def test_a_next_step_can_be_run_in_the_shell(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    called: str,
    on_path: str | None,
    expected: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: on_path)
    monkeypatch.setattr(sys, "argv", [called, "plan"])
    next_step("scaling submit scaling.toml")
    assert capsys.readouterr().out == f"Next: {expected} submit scaling.toml\n"


def test_the_demo_ends_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sweeps.local.run_local", lambda planned, **options: LocalOutcome(
        plan=planned, trained=(), present=(), failed={}, stopped=()))  # fmt: skip
    monkeypatch.setattr("sweeps.reporting.collect.collect", lambda planned: None)
    monkeypatch.setattr("analysis.reporting.terminal.show", lambda study: None)
    monkeypatch.setattr(Report, "write", lambda self: (tmp_path / "report.html", None))
    monkeypatch.setattr(sys, "argv", [".venv/bin/scaling", "demo", "--root", str(tmp_path)])
    cli.main()
    *_, hint, last = capsys.readouterr().out.splitlines()
    assert hint.startswith("To put the command scaling on the PATH of this shell: source ")
    assert last == f"Next: .venv/bin/scaling status quick --root {tmp_path}"


def test_version_and_campaigns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert re.fullmatch(r"scaling \S.*\n", capsys.readouterr().out)
    assert run(monkeypatch, "campaigns") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-2]] == built_in()


def test_fits_json_is_written_only_without_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    kept = Path(__file__).parents[1] / "results" / "demo"
    (folder / "runs.csv").write_bytes((kept / "runs.csv").read_bytes())
    assert run(monkeypatch, "fit", folder, "--family", "lines") == 0
    assert f"Next: scaling report {folder} --family lines" in capsys.readouterr().out
    assert not (folder / "fits.json").exists()
    assert run(monkeypatch, "fit", folder) == 0
    assert f"Wrote {folder / 'fits.json'}" in capsys.readouterr().out


def test_moonlight_is_the_paper_until_a_run_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "collect", "moonlight", "--root", tmp_path) == 0
    assert f"Next: scaling submit moonlight --root {tmp_path}" in capsys.readouterr().out
    assert run(monkeypatch, "fit", "moonlight", "--root", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]["adamw"]["points"] == 5


def test_plan_of_moonlight_is_table_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "moonlight", "--json", "--root", tmp_path) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    for arm in ("adamw", "muon"):
        of_arm = [row for row in rows if row["arm"] == arm]
        # Moonlight, arXiv:2502.16982, Table 2; its labels 399M, 1.1B and 1.5B are misprinted or cut short.
        assert [
            (
                row["rung"],
                row["heads"],
                row["layers"],
                row["width"],
                row["tokens"],
                row["peak_lr"],
                row["batch_sequences"],
            )
            for row in of_arm
        ] == [
            ("399M", 12, 12, 1536, 8_920_000_000, 9.503e-4, 96),
            ("545M", 14, 14, 1792, 14_040_000_000, 9.143e-4, 128),
            ("822M", 16, 16, 2048, 20_760_000_000, 8.825e-4, 160),
            ("1.1B", 18, 18, 2304, 28_540_000_000, 8.561e-4, 192),
            ("1.5B", 20, 20, 2560, 38_910_000_000, 8.305e-4, 256),
        ]
        assert [row["parameters_text"] for row in of_arm] == ["339.7M", "545.9M", "822.1M", "1146.6M", "1586.0M"]


def test_the_pipeline_trains_each_run_once(
    campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", tmp_path]
    assert run(monkeypatch, "submit", campaign, "--workers", "2", *root) == 0
    assert "6 trained, 0 were done before" in capsys.readouterr().out
    assert run(monkeypatch, "submit", campaign, *root) == 0
    assert "0 trained, 6 were done before" in capsys.readouterr().out
    assert run(monkeypatch, "collect", campaign, *root) == 0
    table = pd.read_csv(tmp_path / "results" / "tiny" / "runs.csv")
    assert (table["status"] == "finished").all()
    assert table.groupby("cell")["arm"].nunique().eq(2).all()
    assert run(monkeypatch, "fit", campaign, "--json", *root) == 0
    study = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert study
    assert run(monkeypatch, "report", campaign, *root) == 0
    page = (tmp_path / "results" / "tiny" / "report.html").read_text()
    assert "<svg" in page
    assert re.findall(r'(?:src|xlink:href|url\()\s*=?\s*["\']?https?:|<link|<script[^>]+src', page) == []


def test_fit_rejects_the_table_of_another_campaign(
    campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert run(monkeypatch, "collect", campaign, "--root", root, "--set", "seeds=[3]") == 0
    assert run(monkeypatch, "fit", campaign, "--root", root) == 2
    message = capsys.readouterr().err
    assert "collected from tiny.toml with another content than tiny.toml has now" in message
    assert run(monkeypatch, "cancel", campaign, "--root", root) == 0
    assert "none of its runs is queued or running on SLURM" in capsys.readouterr().out


def test_a_stopped_search_exits_1(monkeypatch: pytest.MonkeyPatch, tiny_text: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny-tuned.toml"
    file.write_text(tuned.CAMPAIGN.format(text=tiny_text, tune=TUNE))
    monkeypatch.setattr(
        "sweeps.local.run_local",
        lambda plan, **_: LocalOutcome(plan=plan, trained=(), present=(), failed={}, stopped=("a run",)),
    )
    assert run(monkeypatch, "tune", file, "--root", tmp_path / "root") == 1
    assert run(monkeypatch, "tune", file, "--root", tmp_path / "root", "--status") == 0


def test_a_campaign_name_can_contain_a_dot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "v1.5"
    folder.mkdir(parents=True)
    (folder / "runs.csv").write_text(TABLE)
    assert run(monkeypatch, "fit", "v1.5", "--root", tmp_path, "--json") == 0
    assert (folder / "fits.json").exists()
    capsys.readouterr()
    assert run(monkeypatch, "fit", "v1.6", "--root", tmp_path) == 2
    assert "Collect the campaign first" in capsys.readouterr().err
