"""Verbs on a table of runs of any origin: fit, audit, report."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional, UseAppendAction

from scaling.cli.common import ID_DIGITS, TableName, default_root, next_step, print_json, print_result, root_option
from scaling.errors import ExitCode, UserError, plain
from scaling.io import read_json
from scaling.spec import as_dict

if TYPE_CHECKING:
    import pandas as pd

    from analysis.data.table import RunsTable
    from analysis.data.tuning import TuningTables
    from analysis.fitting.objective import Objective
    from analysis.ratio.study import Study
    from sweeps.config.campaign import Campaign

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".gz")


@dataclass(frozen=True)
class OnTable:
    """Arguments of a verb on a table of runs."""

    table: Positional[TableName]
    """CSV, JSON lines or Parquet file of runs, or a folder of such; a collected campaign or its folder; or "moonlight"."""
    baseline: str | None = None
    """Arm to compare with; default: "adamw" if there is one."""
    challenger: str | None = None
    """Arm to compare; default: every other one."""
    convention: str = "any"
    """Check of the column flops: "6nd" accepts 6ND within 1 %, "any" one convention per arm, "none" everything."""
    family: str | None = None
    """Law family: lines, parallel-lines, shared-floor, ...; default: the best predictor of rungs left out of its fit."""
    extrapolate: bool = False
    """Give a ratio, marked as extrapolated, even if the arms' runs have no loss in common."""
    map: UseAppendAction[tuple[str, ...]] = ()
    """COLUMN=NAME: the table's name for arm, params, tokens, flops, loss, ..., as in loss=val/loss; can be repeated."""
    last: str | None = None
    """Column that names the run, where runs have several rows: the last row with a loss is used."""
    root: Path = field(default_factory=default_root)
    """Folder of results/."""

    @property
    def is_file(self) -> bool:
        """True if the table is given as a path, and not as a campaign, whose name may contain a dot."""
        path = Path(self.table)
        if path.is_dir() and not (path / "runs.csv").exists():
            return True
        if self.table.endswith(".toml") or (self.root / "results" / self.table / "runs.csv").exists():
            return False
        return bool(path.suffix) and (path.suffix in TABLE_SUFFIXES or path.is_file() or len(path.parts) > 1)

    def results(self) -> Path:
        """Folder for fits, figures and report: that of the table, of the campaign, or one named after the file."""
        from analysis.data.foreign import stem

        if (Path(self.table) / "runs.csv").exists():
            return Path(self.table)
        if self.is_file:
            path = Path(self.table)
            return path / "results" if path.is_dir() else path.with_name(stem(path))
        from sweeps.config.campaign import built_in, load_campaign, refuse_other

        if self.table.endswith(".toml") or self.table in built_in():
            campaign = load_campaign(self.table)
            folder = self.root / "results" / campaign.name
            refuse_other(folder, campaign)
            return folder
        return self.root / "results" / self.table

    def collected(self) -> Path | None:
        """The campaign's table, if there is one. For "moonlight", the paper's points are used until a run has finished."""
        import pandas as pd

        file = self.results() / "runs.csv"
        if not file.exists():
            return None
        return file if self.table != "moonlight" or (pd.read_csv(file)["status"] == "finished").any() else None

    def analysis_options(self) -> list[str]:
        """The words of the options that change the analysis."""
        named = [("--baseline", self.baseline), ("--challenger", self.challenger), ("--family", self.family)]
        named += [*(("--map", name) for name in self.map), ("--last", self.last)]
        words = [word for flag, value in named if value is not None for word in (flag, value)]
        return words + (["--extrapolate"] if self.extrapolate else [])

    def read(self, columns: tuple[str, ...] | None = None) -> RunsTable:
        """The checked table of runs; `columns` are the counts that it needs, all of them when not given."""
        from analysis.data.table import COUNTS, read_table
        from analysis.ratio.moonlight import moonlight_table

        file = Path(self.table) if self.is_file else self.collected()
        if file is not None:
            convention = None if self.convention == "none" else self.convention
            names = dict(self._named(entry) for entry in self.map)
            counts = COUNTS if columns is None else columns
            table = read_table(file, convention=convention, columns=counts, names=names, last=self.last)
            if table.assumed:  # not on stdout, which may be JSON
                print(plain(f"{file}: {table.assumed}."), file=sys.stderr)
            # A page that is sent on names no folder.
            return table if self.is_file else replace(table, name=f"campaign {file.parent.name}")
        if self.table == "moonlight":
            return moonlight_table()
        raise UserError(
            f"{self.results() / 'runs.csv'}: there is no such table. "
            f"Collect the campaign first (scaling collect {self.table}), or give the path of a CSV or Parquet file."
        )

    def _named(self, entry: str) -> tuple[str, str]:
        column, equals, name = entry.partition("=")
        if not (column and equals and name):
            raise UserError(
                f"--map {entry}: write COLUMN=NAME, the column of a table of runs and the file's name for it."
            )
        return column, name

    def search(self) -> TuningTables | None:
        """The tuning trials, if the results folder has them."""
        import pandas as pd

        from analysis.data.table import read_table
        from analysis.data.tuning import TuningTables
        from sweeps.config.tuning_results import Tuning
        from sweeps.reporting.tuning_table import notes

        file, results = self.results() / "trials.csv", self.results() / "tuning.json"
        if not file.exists():
            return None
        trials = read_table(file).frame
        if not results.exists():
            return TuningTables(trials)
        tuning = read_json(results, Tuning, remedy=f"Move it aside and run: scaling tune {self.table}")
        return TuningTables(trials, pd.DataFrame([as_dict(row) for row in tuning.budget]), tuple(notes(tuning)))

    def fitted(self) -> tuple[Study, pd.DataFrame]:
        """Fits and ratios of the table, from fits.json if they are there for this table and these options, and the table."""
        from analysis.ratio.study import load_or_fit

        table, arms = self.read(), {"baseline": self.baseline, "challenger": self.challenger}
        study = load_or_fit(table, self.results(), **arms, family=self.family, extrapolate=self.extrapolate)
        return study, table.frame


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
        from analysis.fitting.laws import LAWS
        from analysis.reporting import terminal
        from analysis.single_arm.fit_arm import fit_arm
        from analysis.single_arm.holdout import hold_out, holdout_text
        from analysis.single_arm.isoflop import allocations, allocations_text

        if self.delta is not None and self.law is None:
            raise UserError("--delta needs --law. Add --law power, or remove --delta.")
        if self.arm is not None and self.law is None and not self.allocation:
            raise UserError("--arm needs --law or --allocation. Add --law power, or remove --arm.")
        if self.holdout is not None and (self.law is not None or self.allocation):
            raise UserError("--holdout cannot be combined with --law and --allocation. Remove these.")
        if self.law is not None:
            found = fit_arm(self.read(LAWS.row(self.law).columns), self.law, self.arm, objective=_objective(self.delta))
            print_result(found, self.json, terminal.arm_text)
        elif self.allocation:
            print_result(allocations(self.read(), self.arm), self.json, allocations_text)
        elif self.holdout is not None:
            held = hold_out(self.read(), rungs=self.holdout, baseline=self.baseline, challenger=self.challenger)
            print_result(held, self.json, holdout_text)
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
        options, file = self.analysis_options(), self.results() / "fits.json"
        # After the answer, because the folder may be read-only.
        if written := self.collected() is not None and not options:
            write_study(study, file)
        if self.json:
            return
        if written:
            print(f"Wrote {file}")
        next_step(shlex.join(["scaling", "report", self.table, *root_option(self.root), *options]))


@dataclass(frozen=True)
class Audit(OnTable):
    """Check the validity of a comparison: each check passes, warns or fails, with evidence and a remedy."""

    json: bool = False
    """Print JSON instead of sentences."""

    def run(self) -> None:
        """Print the checks; exit status 1 if one fails."""
        from analysis.audit import audit, audit_text

        (study, frame), search = self.fitted(), self.search()
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
        """Fit, draw and write; the page and its study."""
        import pandas as pd

        from analysis.reporting.html import write_report

        study, frame = self.fitted()
        folder = self.results()
        curves = folder / "curves.parquet"
        steps = pd.read_parquet(curves) if curves.exists() else None
        campaign = self.campaign(frame)
        title = (campaign.title or campaign.name) if campaign is not None else None
        facts = provenance(frame, self.root, campaign)
        page = write_report(study, frame, folder, curves=steps, search=self.search(), title=title, facts=facts)
        return page, study

    def campaign(self, frame: pd.DataFrame) -> Campaign | None:
        """The campaign that the table was collected from; None for other tables, and where its file is gone."""
        from sweeps.config.campaign import COLLECTED_FILE, Collected, built_in, load_campaign

        if self.collected() is None:  # such as the paper's points, which no campaign of that name trained
            return None
        identity, named = self.results() / COLLECTED_FILE, set(frame.get("campaign", ()))
        names = [read_json(identity, Collected).file] if identity.exists() else []
        names += [self.table] if self.table.endswith(".toml") else []
        names += [name for name in (self.table, *named) if name in built_in()]
        for name in names:
            with contextlib.suppress(UserError):
                campaign = load_campaign(name)
                if not named or campaign.name in named:
                    return campaign
        return None


def provenance(frame: pd.DataFrame, root: Path, campaign: Campaign | None = None) -> dict[str, str]:
    """Date, commit and data of a table's runs, from the records under the root.

    Args:
        frame: The checked table; its columns `run` and `manifest` are read.
        root: Folder that holds runs/.
        campaign: The campaign, which names the source of the data.
    """
    from scaling.run.directory import RunDirectory

    records, sources = [], set() if campaign is None else {campaign.data.source}
    for run in frame["run"].dropna().astype(str).unique() if "run" in frame else ():
        if set(run) <= ID_DIGITS:  # a foreign table may name its runs by paths
            with contextlib.suppress(UserError):
                records.append(RunDirectory(root / "runs" / run).record())
    known = [record for record in records if record is not None]
    sources |= {record.spec.data.source for record in known}
    days = sorted(datetime.fromtimestamp(record.finished_at, UTC).date().isoformat() for record in known)
    commits = {
        (record.code.commit or "unknown")[:12] + (" with uncommitted changes" if record.code.dirty else "")
        for record in known
    }
    manifests = set(frame["manifest"].dropna().astype(str)) if "manifest" in frame else set()
    facts = {
        "Date": " to ".join(dict.fromkeys(days[:1] + days[-1:])),
        "Commit": ", ".join(sorted(commits)),
        "Data": ", ".join([*sorted(sources), *(f"manifest {manifest[:12]}" for manifest in sorted(manifests))]),
    }
    return {name: fact or "not recorded" for name, fact in facts.items()}
