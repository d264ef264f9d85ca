"""Verbs on a table of runs of any origin: fit, audit, report."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from scaling.cli.common import TableName, default_root, next_step, print_json, print_result, root_option
from scaling.errors import ExitCode, UserError
from scaling.spec import as_dict

if TYPE_CHECKING:
    import pandas as pd

    from analysis.data.tuning import TuningTables
    from analysis.fitting.fit import Objective
    from analysis.ratio.study import Study


TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class OnTable:
    """Arguments of a verb on a table of runs."""

    table: Positional[TableName]
    """A CSV or Parquet file with columns arm, params, tokens, flops, loss; a collected campaign, or the folder of its
    runs.csv; or "moonlight" for the ten points of the paper."""
    baseline: str | None = None
    """Arm to compare with; default: "adamw" if there is one."""
    challenger: str | None = None
    """Arm to compare; default: every other one."""
    convention: str = "any"
    """Check of the column flops: "6nd" accepts 6ND within 1 %, "any" one convention throughout an arm, "none"
    everything."""
    family: str | None = None
    """Law family: lines, parallel-lines, shared-floor, ...; default: the one that best predicts rungs that are left
    out of its fit."""
    extrapolate: bool = False
    """Give a ratio, marked as extrapolated, even if the arms' runs have no loss in common."""
    root: Path = field(default_factory=default_root)
    """Folder of results/."""

    @property
    def is_file(self) -> bool:
        """True if the table is given as a path, and not as a campaign, whose name may contain a dot."""
        path = Path(self.table)
        if self.table.endswith(".toml") or (self.root / "results" / self.table / "runs.csv").exists():
            return False
        return bool(path.suffix) and (path.suffix in TABLE_SUFFIXES or path.is_file() or len(path.parts) > 1)

    def results(self) -> Path:
        """Folder for fits, figures and report: that of the table, of the campaign, or one named after the file."""
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
        """The campaign's table, if there is one. For "moonlight", the paper's points are used until a run has finished."""
        file = self.results() / "runs.csv"
        if not file.exists() or (self.table == "moonlight" and _nothing_finished(file)):
            return None
        return file

    def analysis_options(self) -> list[str]:
        """The words of the options that change the analysis."""
        named = [("--baseline", self.baseline), ("--challenger", self.challenger), ("--family", self.family)]
        words = [word for flag, value in named if value is not None for word in (flag, value)]
        return words + (["--extrapolate"] if self.extrapolate else [])

    def read(self) -> pd.DataFrame:
        """The table of runs, with its columns checked."""
        from analysis.data.table import read_table
        from analysis.moonlight import moonlight_table

        convention = None if self.convention == "none" else self.convention
        if self.is_file:
            return read_table(Path(self.table), convention=convention)
        collected = self.collected()
        if collected is not None:
            frame = read_table(collected, convention=convention)
            frame.attrs["name"] = f"campaign {collected.parent.name}"  # not the folder: a report may be passed on
            return frame
        if self.table == "moonlight":
            return moonlight_table()
        raise UserError(
            f"{self.results() / 'runs.csv'}: there is no such table. "
            f"Collect the campaign first (scaling collect {self.table}), or give the path of a CSV or Parquet file."
        )

    def search(self) -> TuningTables | None:
        """The tuning trials, if the results folder has them."""
        import pandas as pd

        from analysis.data.table import read_table
        from analysis.data.tuning import TuningTables
        from scaling.io import read_json
        from sweeps.config.tuning_results import Tuning
        from sweeps.reporting.tuning_table import notes

        file, results = self.results() / "trials.csv", self.results() / "tuning.json"
        if not file.exists():
            return None
        if not results.exists():
            return TuningTables(read_table(file))
        tuning = read_json(results, Tuning, remedy=f"Move it aside and run: scaling tune {self.table}")
        return TuningTables(
            read_table(file), pd.DataFrame([as_dict(row) for row in tuning.budget]), tuple(notes(tuning))
        )

    def fitted(self) -> tuple[Study, pd.DataFrame]:
        """Fits and ratios of the table, and the table."""
        from analysis.ratio.study import fit_table

        frame = self.read()
        study = fit_table(
            frame,
            baseline=self.baseline,
            challenger=self.challenger,
            family=self.family,
            extrapolate=self.extrapolate,
        )
        return study, frame


def _nothing_finished(file: Path) -> bool:
    import pandas as pd

    return not (pd.read_csv(file)["status"] == "finished").any()


def _objective(delta: str | None) -> Objective | Literal["robust"] | None:
    from analysis.fitting.fit import Objective

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
    """Fit a law to each arm, and compute the FLOPs-to-match ratio with its interval."""

    law: str | None = None
    """Fit only this law, to one arm: power, power-floor, surface, ..."""
    delta: str | None = None
    """With --law: Huber threshold on log loss, or "robust" to derive it from the scale of the residuals."""
    arm: str | None = None
    """Arm for --law and --allocation; not needed if the table has one."""
    allocation: bool = False
    """Estimate one arm's compute-optimal N and D by Chinchilla's three approaches, with their known bias."""
    holdout: int | None = None
    """Predict this many of the largest rungs from the others, and score the prediction."""
    json: bool = False
    """Print JSON with all digits."""

    def run(self) -> None:
        """Print the fits; for a campaign without options that change the analysis, also write fits.json."""
        if self.delta is not None and self.law is None:
            raise UserError("--delta needs --law, which is not given. Add --law power, or remove --delta.")
        if self.arm is not None and self.law is None and not self.allocation:
            raise UserError(
                "--arm needs --law or --allocation, and neither is given. Add --law power, or remove --arm."
            )
        if self.holdout is not None and (self.law is not None or self.allocation):
            raise UserError("--holdout cannot be combined with --law and --allocation. Remove these.")
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
        if (
            self.collected() is not None and not self.analysis_options()
        ):  # after printing, because the folder may be read-only
            write_study(study, self.results() / "fits.json")
            if not self.json:
                print(f"Wrote {self.results() / 'fits.json'}")
        if self.json:
            return
        next_step(shlex.join(["scaling", "report", self.table, *root_option(self.root), *self.analysis_options()]))

    def _one_law(self, law: str) -> None:
        from analysis.reporting import terminal
        from analysis.single_arm.fit_arm import fit_arm

        print_result(
            fit_arm(self.read(), law, self.arm, objective=_objective(self.delta)), self.json, terminal.arm_text
        )

    def _allocate(self) -> None:
        from analysis.single_arm.isoflop import allocations, allocations_text

        print_result(allocations(self.read(), self.arm), self.json, allocations_text)

    def _hold_out(self, rungs: int) -> None:
        from analysis.single_arm.holdout import hold_out, holdout_text

        found = hold_out(self.read(), rungs=rungs, baseline=self.baseline, challenger=self.challenger)
        print_result(found, self.json, holdout_text)


@dataclass(frozen=True)
class Audit(OnTable):
    """Check the validity of a comparison: each check passes, warns or fails, with evidence and a remedy."""

    json: bool = False
    """Print JSON instead of sentences."""

    def run(self) -> None:
        """Print the checks; exit status 1 if one fails."""
        from analysis.audit import audit, audit_text

        study, frame = self.fitted()
        search = self.search()
        checks = audit(frame, study, None if search is None else search.trials)
        print_result(checks, self.json, audit_text)
        if any(check.verdict == "fail" for check in checks):
            sys.exit(ExitCode.FAILURE)


@dataclass(frozen=True)
class Report(OnTable):
    """Write a report: a self-contained HTML page, and the figures as SVG, PDF and PNG."""

    def run(self) -> None:
        """Write the page and print its path."""
        page, _ = self.write()
        print(f"Report: {page}")

    def write(self) -> tuple[Path, Study]:
        """Fit, draw and write; the page and the study that it shows."""
        import pandas as pd

        from analysis.reporting.html import write_report

        study, frame = self.fitted()
        folder = self.results()
        curves = folder / "curves.parquet"
        steps = pd.read_parquet(curves) if curves.exists() else None
        page = write_report(study, frame, folder, curves=steps, search=self.search(), title=Path(self.table).stem)
        return page, study
