"""Verbs on campaign files: init, explain, diff."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from scaling.cli.common import RunName, default_root, find_run, next_step, planned_run, print_json, rich_table
from scaling.errors import UserError, plain


@dataclass(frozen=True)
class Init:
    """Write a commented campaign for this machine, and the JSON schema that editors check it with."""

    name: Positional[Annotated[str, arg(metavar="NAME")]] = "campaign"
    """Name of the campaign; the file is NAME.toml in the current folder."""
    template: Annotated[str, arg(name="from")] = "quick"
    """Built-in campaign, or campaign file, that it starts from: quick, moonlight, ..."""
    data: str | None = None
    """File, folder or glob of text to train on; default: the data of the template."""
    tokenizer: Path | None = None
    """Tokenizers JSON file; default: bytes."""

    def run(self) -> None:
        """Write both files; a campaign file that exists is kept, and the schema is written again."""
        from sweeps.planning.starter import write_starter

        for path in write_starter(
            Path(f"{self.name}.toml"), template=self.template, data=self.data, tokenizer=self.tokenizer
        ):
            print(plain(f"Wrote {path}"))
        next_step(f"scaling plan {self.name}.toml")


@dataclass(frozen=True)
class Explain:
    """Show the origin of each value of a run: a line of the campaign file, a rule, tuning, or a default."""

    named: Positional[RunName]
    """CAMPAIGN/ARM/RUNG/SEED, such as quick/muon/21k/0."""
    wanted: Positional[Annotated[str, arg(metavar="FIELD")]] = ""
    """A value, such as peak_lr, or a table, such as optimizer; default: every value."""
    root: Path = field(default_factory=default_root)
    """Folder of runs/; the environment variable SCALING_ROOT sets another default."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Print field, value and origin."""
        from sweeps.planning.explain import explain, explain_field

        campaign, *parts = self.named.rsplit("/", 3)
        if len(parts) != 3:
            raise UserError(
                f'"{self.named}" is no run of a campaign. Write CAMPAIGN/ARM/RUNG/SEED, as in quick/muon/21k/0.'
            )
        plan, run = planned_run(campaign, *parts, root=self.root)
        origins = explain(plan, run, campaign)
        if self.wanted:
            origins = explain_field(origins, self.wanted)
        if self.json:
            print_json([origin._asdict() for origin in origins])
        else:
            _print_table(("field", "value", "origin"), [[o.field, _shown(o.value), o.origin] for o in origins])


@dataclass(frozen=True)
class Diff:
    """Show the values that differ between two campaigns, or between two runs."""

    first: Positional[Annotated[str, arg(metavar="A")]]
    """Campaign or run, named as for other verbs."""
    second: Positional[Annotated[str, arg(metavar="B")]]
    """The other one, of the same kind."""
    root: Path = field(default_factory=default_root)
    """Folder of runs/; the environment variable SCALING_ROOT sets another default."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Print the differing values; arms and rungs are matched by name."""
        left, right = (dict(_leaves(self._tables(name))) for name in (self.first, self.second))
        keys = dict.fromkeys((*left, *right))
        rows = [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]
        if self.json:
            print_json([{"field": key, "first": a, "second": b} for key, a, b in rows])
        elif not rows:
            print("No value differs.")
        else:
            _print_table(("field", self.first, self.second), [[key, _shown(a), _shown(b)] for key, a, b in rows])

    def _tables(self, name: str) -> dict[str, Any]:
        from scaling.run.directory import RunDirectory
        from scaling.spec import as_dict
        from sweeps.config.campaign import built_in, campaign_path, campaign_tables, load_campaign

        if name in built_in() or (name.endswith(".toml") and os.path.lexists(name)):
            load_campaign(name)  # refuses a file that is no campaign
            return campaign_tables(campaign_path(name))
        campaign, *parts = name.rsplit("/", 3)
        if len(parts) == 3 and not os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
            return as_dict(planned_run(campaign, *parts, root=self.root)[1].spec)
        return as_dict(RunDirectory(find_run(name, self.root)).spec())


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their dotted paths; entries of a list of tables are named instead of numbered."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{path}.{entry.get('name', number)}")
    else:
        yield path, value


def _shown(value: Any) -> str:
    from sweeps.config.toml_text import toml_value

    return "" if value is None else f"{value:g}" if isinstance(value, float) else toml_value(value)


def _print_table(head: tuple[str, ...], rows: list[list[str]]) -> None:
    from scaling.console import console
    from sweeps.reporting.console import wide_enough

    wide_enough(console()).print(rich_table(head, rows, left=len(head)))
