"""The command line: one verb a class, its fields the arguments, its docstrings the help.

The only file that sees all three packages. Each verb imports what it needs when it runs, so that ``scaling --help``
answers at once. A `Refusal` becomes one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import tyro
from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, Positional, arg, subcommand

from scaling.errors import Refusal

if TYPE_CHECKING:
    import pandas as pd

    from analysis.study import Study
    from sweeps.dispatch import Outcome
    from sweeps.plan import Plan as CampaignPlan

CampaignName = Annotated[str, arg(metavar="CAMPAIGN")]
TableName = Annotated[str, arg(metavar="TABLE")]


def _root() -> Path:
    return Path(os.environ.get("SCALING_ROOT", "."))


@dataclass(frozen=True)
class _OnCampaign:
    campaign: Positional[CampaignName]
    """Campaign file (TOML), or the name of a built-in one: quick, moonlight, ..."""
    root: Path = field(default_factory=_root)
    """Folder that holds data/, runs/ and results/; the environment variable SCALING_ROOT sets another default."""

    def planned(self, *, hyperparameters: str | None = None) -> CampaignPlan:
        """The campaign's runs against what the disk holds."""
        from sweeps.campaign import load_campaign
        from sweeps.plan import plan

        return plan(load_campaign(self.campaign, hyperparameters=hyperparameters), self.root)


@dataclass(frozen=True)
class Plan(_OnCampaign):
    """Show a campaign's runs and what they will cost; train nothing."""

    hyperparameters: Literal["listed", "law"] | None = None
    """Take tokens, batch and learning rate as the file lists them, or from the law that it names."""
    groups: bool = False
    """Show which parameters each arm's optimizer gets, and by which rule."""
    json: bool = False
    """Print rows for machines instead of the table."""

    def run(self) -> None:
        """Print the plan and write plan.jsonl."""
        from sweeps import show

        plan = self.planned(hyperparameters=self.hyperparameters)
        plan.write()
        if self.json:
            _print_json({"runs": show.plan_rows(plan), "totals": show.plan_totals(plan)})
        elif self.groups:
            show.groups(plan)
        else:
            show.plan(plan)
            _next(f"scaling submit {self.campaign}")


@dataclass(frozen=True)
class Submit(_OnCampaign):
    """Train what is missing of a campaign; finished runs stay as they are."""

    executor: Literal["local"] = "local"
    """Where the runs execute."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Runs at once on this machine; by default one for each core, since each run takes one thread."""
    retry: Literal["none", "failed", "diverged", "all"] = "none"
    """Which runs that ended badly are tried again."""

    def run(self) -> None:
        """Prepare the data if need be, then train."""
        from sweeps.dispatch import run_local

        outcome = run_local(self.planned(), workers=self.workers, retry=self.retry)
        _report_outcome(outcome)
        _next(f"scaling collect {self.campaign}" if outcome.complete else f"scaling status {self.campaign}")


@dataclass(frozen=True)
class Status(_OnCampaign):
    """Show how far a campaign is, from the files of its runs."""

    json: bool = False
    """Print rows for machines instead of the table."""

    def run(self) -> None:
        """Print the table."""
        from sweeps import status

        plan = self.planned()
        if self.json:
            _print_json(status.rows(plan))
        else:
            status.show(plan)


@dataclass(frozen=True)
class Collect(_OnCampaign):
    """Gather the records of a campaign into runs.csv and curves.parquet."""

    def run(self) -> None:
        """Write both files."""
        from sweeps.collect import collect

        plan = self.planned()
        table = collect(plan)
        finished = int((table["status"] == "finished").sum())
        print(f"{plan.results / 'runs.csv'}: {finished} of {len(table)} runs finished.")
        _next(f"scaling fit {self.campaign}")


@dataclass(frozen=True)
class _OnTable:
    table: Positional[TableName]
    """A CSV or Parquet file with columns arm, params, tokens, flops, loss; a campaign that was collected; or
    "moonlight" for the ten points of the paper."""
    baseline: str | None = None
    """Arm that is compared against; "adamw" where there is one."""
    challenger: str | None = None
    """Arm that is compared; every other one by default."""
    root: Path = field(default_factory=_root)
    """Folder that holds results/ of campaigns."""

    @property
    def is_file(self) -> bool:
        """Whether the table is named by its path, and not by a campaign."""
        return bool(Path(self.table).suffix) and not self.table.endswith(".toml")

    def results(self) -> Path:
        """Where fits, figures and report of this table go: the campaign's folder, or one named after the file."""
        if self.is_file:
            return Path(self.table).with_suffix("")
        if self.table.endswith(".toml"):
            from sweeps.campaign import load_campaign

            return self.root / "results" / load_campaign(self.table).name
        return self.root / "results" / self.table

    def read(self) -> pd.DataFrame:
        """The table of runs, its columns checked."""
        from analysis.load import read_table
        from analysis.reference import moonlight_table

        if self.is_file:
            return read_table(Path(self.table))
        collected = self.results() / "runs.csv"
        if collected.exists():
            frame = read_table(collected)
            frame.attrs["name"] = f"campaign {collected.parent.name}"  # a page that is sent on names no folder
            return frame
        if self.table == "moonlight":
            return moonlight_table()
        raise Refusal(
            f"{collected}: there is no such table. Collect the campaign first (scaling collect {self.table}), "
            "or give the path of a CSV or Parquet file."
        )

    def fitted(self) -> tuple[Study, pd.DataFrame]:
        """The table's fits and ratios, and the table."""
        from analysis.study import fit_table

        frame = self.read()
        return fit_table(frame, baseline=self.baseline, challenger=self.challenger), frame


@dataclass(frozen=True)
class Fit(_OnTable):
    """Fit a law to each arm and give the FLOPs-to-match ratio with its interval."""

    json: bool = False
    """Print everything with full precision."""

    def run(self) -> None:
        """Print the fits; for a campaign, write fits.json too."""
        from analysis import summary
        from analysis.study import write_study

        study, _ = self.fitted()
        if (self.results() / "runs.csv").exists():
            write_study(study, self.results() / "fits.json")
        if self.json:
            _print_json(study)
        else:
            summary.show(study)
            _next(f"scaling report {self.table}")


@dataclass(frozen=True)
class Report(_OnTable):
    """Write the report: one HTML page that needs no network, and the figures as SVG, PDF and PNG."""

    def run(self) -> None:
        """Write the page and say where it is."""
        print(f"Report: {self.write()[0]}")

    def write(self) -> tuple[Path, Study]:
        """Fit, draw, write; the page and what it shows."""
        import pandas as pd

        from analysis.report import write_report

        study, frame = self.fitted()
        folder = self.results()
        curves = folder / "curves.parquet"
        steps = pd.read_parquet(curves) if curves.exists() else None
        return write_report(study, frame, folder, curves=steps, title=Path(self.table).stem), study


@dataclass(frozen=True)
class Demo:
    """Run the built-in campaign `quick` from plan to report; minutes on two cores, and nothing twice."""

    root: Path = field(default_factory=_root)
    """Folder that holds data/, runs/ and results/."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Runs at once."""

    def run(self) -> None:
        """Plan, train what is missing, collect, fit, report."""
        from analysis import summary
        from sweeps import show
        from sweeps.collect import collect
        from sweeps.dispatch import run_local

        planned = _OnCampaign("quick", self.root).planned()
        show.plan(planned)
        outcome = run_local(planned, workers=self.workers, retry="failed")
        _report_outcome(outcome)
        if outcome.stopped:
            return
        collect(outcome.plan)
        page, study = Report("quick", root=self.root).write()
        summary.show(study)
        print(f"Report: {page}")


@dataclass(frozen=True)
class Prepare(_OnCampaign):
    """Write the token shards of a campaign's [data]; goes on where it was stopped."""

    def run(self) -> None:
        """Prepare, and say what there is."""
        from scaling.units import human
        from sweeps.plan import with_data

        plan = with_data(self.planned())
        manifest = plan.manifest
        assert manifest is not None
        print(
            f"{plan.data}: {human(manifest.train.tokens)} training and {human(manifest.validation.tokens)} validation "
            f"tokens, vocabulary {manifest.vocabulary:,}."
        )
        _next(f"scaling submit {self.campaign}")


@dataclass(frozen=True)
class Verify(_OnCampaign):
    """Check every shard of a campaign against the SHA-256 in its manifest."""

    def run(self) -> None:
        """Read all shards once."""
        from scaling.data.shards import verify

        plan = self.planned()
        verify(plan.data)
        print(f"{plan.data}: every shard is what its manifest says.")


@dataclass(frozen=True)
class Data:
    """Prepare or verify the token shards of a campaign."""

    verb: Annotated[Prepare, subcommand("prepare")] | Annotated[Verify, subcommand("verify")]

    def run(self) -> None:
        """Run the verb below."""
        self.verb.run()


@dataclass(frozen=True)
class Train:
    """Train one run directory, from its last resume point if there is one. What a submitted job calls."""

    run_dir: Positional[Annotated[Path, arg(metavar="RUN_DIR")]]
    """Directory with spec.json and placement.json, as `submit` writes it."""

    def run(self) -> None:
        """Train, and say what came out."""
        from scaling.train import train

        record = train(self.run_dir)
        if record is None:
            print("stopped at a resume point; the same command continues")
            sys.exit(STOPPED)
        print(f"{record.status}, held-out loss {record.validation_loss} nats per token")


STOPPED = 75
"""Exit status of a run that was asked to stop and can continue: EX_TEMPFAIL."""

VERBS = (
    Annotated[Plan, subcommand("plan")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Collect, subcommand("collect")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
)


def _report_outcome(outcome: Outcome) -> None:
    """Say what one submission did, and exit with status 1 if runs failed, 130 if it was interrupted."""
    parts = [f"{len(outcome.trained)} trained", f"{len(outcome.present)} were there"]
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    parts += [f"{len(outcome.stopped)} interrupted"] if outcome.stopped else []
    print(f"{outcome.plan.campaign.name}: {', '.join(parts)}.")
    for run, reason in outcome.failed.items():
        print(f"  {run} failed: {reason}")


def _print_json(value: Any) -> None:
    """A value, msgspec's or plain, with all its digits."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _next(command: str) -> None:
    print(f"Next: {command}")


def main() -> None:
    """Entry point of the console script."""
    verb = tyro.cli(
        VERBS,
        prog="scaling",
        description="How much training compute does one way of training save over another at the same loss?",
        config=(OmitSubcommandPrefixes, FlagCreatePairsOff),
    )
    try:
        verb.run()
    except Refusal as refusal:
        print(f"scaling: {refusal}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("scaling: interrupted; the same command continues.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left (`| head`); that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
