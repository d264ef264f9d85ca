"""The status of a campaign: totals, reasons, time left, and the progress of a local submission."""

from __future__ import annotations

import msgspec
import pytest
from recorded import write_record
from rich.console import Console, RenderableType

from scaling.io import append_line, write_json
from scaling.run.directory import RunDirectory
from scaling.run.progress import ProgressReporter
from scaling.run.provenance import describe_code
from scaling.run.record import MetricsRow
from sweeps.local import CampaignProgress
from sweeps.planning.plan import CampaignPlan
from sweeps.reporting.plan_table import plan_table
from sweeps.reporting.status import status_table
from tests.sweeps.conftest import Campaigns


def text(shown: RenderableType, *, height: int = 100) -> list[str]:
    console = Console(width=200, height=height)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().splitlines()


def fail_all(plan: CampaignPlan, reason: str = "no GPU") -> None:
    for run in plan.runs:
        directory = plan.directory(run)
        directory.create(run.spec, run.placement)
        directory.note("end", step=0, outcome="failed", reason=reason)


def test_totals_precede_a_table_that_fits_the_terminal(campaigns: Campaigns) -> None:
    plan = campaigns.plan()
    write_record(plan.directory(plan.runs[0]), plan.runs[0].spec, 3.0)
    lines = text(status_table(plan, totals_first=True, height=9))
    assert lines[0] == "4 runs: 1 finished, 3 planned."
    assert "of training left" in lines[1]
    assert sum(run.id in line for line in lines for run in plan.runs) == 3
    assert "Not shown: 1 finished; --json prints every run." in lines


def test_equal_reasons_are_one_line(campaigns: Campaigns) -> None:
    plan = campaigns.plan()
    fail_all(plan)
    lines = [line for line in text(status_table(plan)) if "no GPU" in line or "--retry failed" in line]
    assert lines[0] == "4 runs failed: no GPU"
    assert len(lines) == 2


@pytest.mark.parametrize("reported", [False, True])
def test_time_left_uses_speeds_of_active_runs(campaigns: Campaigns, reported: bool) -> None:
    plan = campaigns.plan()
    directory = plan.directory(plan.runs[0])
    directory.create(plan.runs[0].spec, plan.runs[0].placement)
    if reported:
        row = MetricsRow(
            step=50, tokens=6_400, flops=0, train_loss=3.0, learning_rate=0.1, grad_norm=None, tokens_per_second=100.0,
            mfu=None,
        )  # fmt: skip
        append_line(directory.metrics_file, row)
    left = next(line for line in text(status_table(plan)) if "of training left" in line)
    assert ("at assumed speed" in left) != reported


def test_plan_and_status_name_runs_of_other_code(campaigns: Campaigns) -> None:
    plan = campaigns.plan()
    here = describe_code()
    for run, files in zip(plan.runs, (here.files, {}, *[here.files | {"scaling/flops.py": "0"}] * 2), strict=True):
        directory: RunDirectory = plan.directory(run)
        write_record(directory, run.spec, 3.0)
        record = directory.record()
        assert record is not None
        code = msgspec.structs.replace(here, commit="abc", files=files)
        write_json(directory.record_file, msgspec.structs.replace(record, code=code))
    for shown in (plan_table(plan), status_table(plan)):
        said = [line for line in text(shown) if "commit abc" in line]
        assert len(said) == 2
        assert any(line.startswith("1 run was recorded without hashes") for line in said)
        assert any("2 runs were trained by other code" in line and "1 file differs" in line for line in said)


def test_progress_counts_flops_and_names_ended_runs(
    campaigns: Campaigns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ProgressReporter, "due", True)
    plan = campaigns.plan()
    first, *others = plan.runs
    total = sum(run.spec.budget.flops for run in plan.runs)
    with ProgressReporter("tiny", total, bar=False) as reporter:
        progress = CampaignProgress(plan, reporter)
        progress.update([first], others)
        write_record(plan.directory(first), first.spec, 3.0)
        progress.update([], others)
    assert capsys.readouterr().err.splitlines() == [
        "tiny: 0%, ended 0 of 4 runs; adamw a/0 0%",
        "adamw a/0 finished at 100%, loss 3.000",
        f"tiny: {first.spec.budget.flops / total:.0%}, ended 1 of 4 runs",
    ]
