"""Verbs about a table of runs, whoever made it: fit, audit, report."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from scaling.cli.common import TableName, default_root, next_step, print_json, under
from scaling.errors import UserError, plain
from scaling.spec import as_dict

if TYPE_CHECKING:
    import pandas as pd

    from analysis.data.table import RunsTable
    from analysis.data.tuning import TuningTables
    from analysis.fitting.objective import Objective
    from analysis.ratio.study import Study


TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class OnTable:
    """A verb about a table of runs."""

    table: Positional[TableName]
    """A CSV or Parquet file with columns arm, params, tokens, flops, loss; a campaign that was collected, or a folder
    with its runs.csv; or "moonlight" for the ten points of the paper."""
    baseline: str | None = None
    """Arm that is compared against; "adamw" where there is one."""
    challenger: str | None = None
    """Arm that is compared; every other one by default."""
    convention: str = "any"
    """What the column flops is held to: "6nd" to 6ND within 1 %, "any" to one count throughout an arm, "none" to
    nothing."""
    family: str | None = None
    """Laws that the arms share: lines, parallel-lines, shared-floor, ...; without it the one that predicts rungs left
    out best."""
    extrapolate: bool = False
    """Give a ratio, marked as extrapolated, even where the arms' runs have no loss in common."""
    root: Path = field(default_factory=default_root)
    """Folder that holds results/ of campaigns."""

    @property
    def is_file(self) -> bool:
        """Whether the table is named by its path, and not by a campaign, whose name may have a dot in it."""
        path = Path(self.table)
        if self.table.endswith(".toml") or (self.root / "results" / self.table / "runs.csv").exists():
            return False
        return bool(path.suffix) and (path.suffix in TABLE_SUFFIXES or path.is_file() or len(path.parts) > 1)

    def results(self) -> Path:
        """Where fits, figures and report of this table go: its folder, the campaign's, or one named after the file."""
        if (Path(self.table) / "runs.csv").exists():
            return Path(self.table)
        if self.is_file:
            return Path(self.table).with_suffix("")
        from sweeps.config.campaign import built_in, load_campaign, refuse_other

        if self.table.endswith(".toml") or self.table in built_in():
            campaign = load_campaign(self.table)
            folder = self.root / "results" / campaign.name
            refuse_other(folder, campaign)
            return folder
        return self.root / "results" / self.table

    def collected(self) -> Path | None:
        """The campaign's table, where it has one; the paper's points stand until a campaign of that name has a run."""
        file = self.results() / "runs.csv"
        if not file.exists() or (self.table == "moonlight" and _nothing_finished(file)):
            return None
        return file

    def chosen(self) -> list[str]:
        """Options that ask for another answer than the table's own, as they are written."""
        named = [("--baseline", self.baseline), ("--challenger", self.challenger), ("--family", self.family)]
        words = [word for flag, value in named if value is not None for word in (flag, value)]
        return words + (["--extrapolate"] if self.extrapolate else [])

    def read(self, columns: tuple[str, ...] | None = None) -> RunsTable:
        """The checked table of runs; `columns` are the counts that it needs, all of them when not given."""
        from analysis.data.table import COUNTS, read_table
        from analysis.moonlight import moonlight_table

        convention = None if self.convention == "none" else self.convention
        columns = COUNTS if columns is None else columns
        if self.is_file:
            return read_table(Path(self.table), convention=convention, columns=columns)
        collected = self.collected()
        if collected is not None:
            table = read_table(collected, convention=convention, columns=columns)
            # A page that is sent on names no folder.
            return replace(table, name=f"campaign {collected.parent.name}")
        if self.table == "moonlight":
            return moonlight_table()
        raise UserError(
            f"{self.results() / 'runs.csv'}: there is no such table. Collect the campaign first (scaling collect {self.table}), "
            "or give the path of a CSV or Parquet file."
        )

    def search(self) -> TuningTables | None:
        """The search for settings, where the folder of the results has its trials."""
        import pandas as pd

        from analysis.data.table import read_table
        from analysis.data.tuning import TuningTables
        from scaling.io import read_json
        from sweeps.config.tuning_results import Tuning
        from sweeps.reporting.tuning_table import notes

        file, facts = self.results() / "trials.csv", self.results() / "tuning.json"
        if not file.exists():
            return None
        if not facts.exists():
            return TuningTables(read_table(file).frame)
        tuning = read_json(facts, Tuning, remedy=f"Move it aside and run: scaling tune {self.table}")
        return TuningTables(
            read_table(file).frame, pd.DataFrame([as_dict(row) for row in tuning.budget]), tuple(notes(tuning))
        )

    def fitted(self) -> tuple[Study, pd.DataFrame]:
        """The table's fits and ratios, and the table."""
        from analysis.ratio.study import fit_table

        table = self.read()
        study = fit_table(
            table,
            baseline=self.baseline,
            challenger=self.challenger,
            family=self.family,
            extrapolate=self.extrapolate,
        )
        return study, table.frame


def _nothing_finished(file: Path) -> bool:
    import pandas as pd

    return not (pd.read_csv(file)["status"] == "finished").any()


def _objective(delta: str | None) -> Objective | Literal["robust"] | None:
    from analysis.fitting.objective import Objective

    if delta is None:
        return None
    if delta == "robust":
        return "robust"
    with contextlib.suppress(ValueError):
        value = float(delta)
        if 0.0 < value < math.inf:
            return Objective(function="huber", delta=value)
    raise UserError(f'--delta {delta}: give a number above 0 such as 1e-3, or "robust".')


@dataclass(frozen=True)
class Fit(OnTable):
    """Fit a law to each arm and give the FLOPs-to-match ratio with its interval."""

    law: str | None = None
    """Fit this law alone to one arm: power, power-floor, surface, ..."""
    delta: str | None = None
    """With --law: Huber's threshold on log loss, or "robust" to tie it to the scale of the residuals."""
    arm: str | None = None
    """The arm of --law and --allocation; not needed where the table has one."""
    allocation: bool = False
    """Give one arm's compute-optimal N and D by all three of Chinchilla's approaches, with their known bias."""
    holdout: int | None = None
    """Leave out so many of the largest rungs, predict them from the rest, and score the prediction."""
    json: bool = False
    """Print everything with full precision."""

    def run(self) -> None:
        """Print the fits; for a campaign, write fits.json too, unless options ask for something else than its own answer."""
        if self.delta is not None and self.law is None:
            raise UserError("--delta belongs to --law, which is not given. Add --law power, or leave --delta out.")
        if self.arm is not None and self.law is None and not self.allocation:
            raise UserError("--arm belongs to --law, which is not given. Add --law power, or leave --arm out.")
        if self.holdout is not None and (self.law is not None or self.allocation):
            raise UserError("--holdout scores laws of both arms. Leave out --law and --allocation.")
        if self.law is not None:
            self._one_law(self.law)
        elif self.allocation:
            self._allocate()
        elif self.holdout is not None:
            self._hold_out(self.holdout)
        else:
            self._ratio()

    def _ratio(self) -> None:
        from analysis.ratio.study import write_study
        from analysis.reporting import terminal

        study, _ = self.fitted()
        if self.json:
            print_json(study)
        else:
            terminal.show(study)
        if self.collected() is not None and not self.chosen():  # after the answer, for the folder may be read-only
            write_study(study, self.results() / "fits.json")
            if not self.json:
                print(f"Wrote {self.results() / 'fits.json'}")
        if self.json:
            return
        next_step(shlex.join(["scaling", "report", self.table, *under(self.root), *self.chosen()]))

    def _one_law(self, law: str) -> None:
        from analysis.fitting.laws import LAWS
        from analysis.reporting import terminal
        from analysis.single_arm.fit_arm import fit_arm

        found = fit_arm(self.read(LAWS.row(law).columns), law, self.arm, objective=_objective(self.delta))
        if self.json:
            print_json(found)
        else:
            print(plain(terminal.arm_text(found)))

    def _allocate(self) -> None:
        from analysis.single_arm.isoflop import allocations, allocations_text

        found = allocations(self.read(), self.arm)
        if self.json:
            print_json(found)
        else:
            print(plain(allocations_text(found)))

    def _hold_out(self, rungs: int) -> None:
        from analysis.single_arm.holdout import hold_out, holdout_text

        found = hold_out(self.read(), rungs=rungs, baseline=self.baseline, challenger=self.challenger)
        if self.json:
            print_json(found)
        else:
            print(plain(holdout_text(found)))


@dataclass(frozen=True)
class Audit(OnTable):
    """Run the checks that a sceptic would: each passes, warns or fails, with its evidence and the remedy."""

    json: bool = False
    """Print the checks for machines."""

    def run(self) -> None:
        """Print the checks; status 1 if one fails."""
        from analysis.audit import audit, audit_text

        study, frame = self.fitted()
        search = self.search()
        checks = audit(frame, study, None if search is None else search.trials)
        if self.json:
            print_json(checks)
        else:
            print(plain(audit_text(checks)))
        if any(check.verdict == "fail" for check in checks):
            sys.exit(1)


@dataclass(frozen=True)
class Report(OnTable):
    """Write the report: one HTML page that needs no network, and the figures as SVG, PDF and PNG."""

    def run(self) -> None:
        """Write the page and say where it is."""
        page, _ = self.write()
        print(f"Report: {page}")

    def write(self) -> tuple[Path, Study]:
        """Fit, draw, write; the page and what it shows."""
        import pandas as pd

        from analysis.reporting.html import write_report

        study, frame = self.fitted()
        folder = self.results()
        curves = folder / "curves.parquet"
        steps = pd.read_parquet(curves) if curves.exists() else None
        page = write_report(study, frame, folder, curves=steps, search=self.search(), title=Path(self.table).stem)
        return page, study
