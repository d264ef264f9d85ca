"""The command line: one verb a class, its fields the arguments, its docstrings the help.

The only package that sees all three others. Each verb imports what it needs when it runs, so that ``scaling --help``
answers at once. A `Refusal` becomes one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, subcommand

from scaling.cli.campaigns import Collect, Demo, Plan, Status, Submit, Tune
from scaling.cli.cluster import Cancel, Clean, Doctor, Logs
from scaling.cli.compare import Compare
from scaling.cli.design import Design
from scaling.cli.runs import Data, Evaluate, Export, Train
from scaling.cli.tables import Audit, Fit, Report
from scaling.errors import Refusal, plain

VERBS = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Design, subcommand("design")]
    | Annotated[Tune, subcommand("tune")]
    | Annotated[Submit, subcommand("submit")]
    | Annotated[Status, subcommand("status")]
    | Annotated[Collect, subcommand("collect")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Audit, subcommand("audit")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Logs, subcommand("logs")]
    | Annotated[Cancel, subcommand("cancel")]
    | Annotated[Clean, subcommand("clean")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Export, subcommand("export")]
)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Entry point of the console script."""
    try:
        verb = tyro.cli(
            VERBS,
            prog="scaling",
            description="How much training compute does one way of training save over another at the same loss?",
            config=(OmitSubcommandPrefixes, FlagCreatePairsOff),
        )
        verb.run()
    except Refusal as refusal:
        print(f"scaling: {plain(str(refusal))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("scaling: interrupted; the same command continues.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`| head`); that is not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
