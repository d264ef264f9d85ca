"""The command line: one verb a class, its fields the arguments, its docstrings the help.

The only package that imports all three others. Each verb imports what it needs when it runs, so that ``scaling --help``
answers at once. An error that the user can act on (`UserError`, or one of the operating system) becomes one sentence on
stderr and exit status 2; anything else is a defect of this program and ends in a traceback.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, subcommand

from scaling.cli.campaigns import Campaigns, Collect, Demo, Plan, Status, Submit, Tune
from scaling.cli.cluster import Cancel, Clean, Doctor, Logs
from scaling.cli.common import version
from scaling.cli.compare import Compare
from scaling.cli.design import Design
from scaling.cli.runs import Data, Evaluate, Export, Train
from scaling.cli.tables import Audit, Fit, Report
from scaling.errors import UserError, os_error_sentence, plain

VERBS: dict[str, tuple[type, str]] = {
    "demo": (Demo, "scaling demo --root /tmp/demo"),
    "campaigns": (Campaigns, "scaling campaigns"),
    "plan": (Plan, "scaling plan quick --set 'seeds=[0,1]'"),
    "design": (Design, "scaling design quick --width 0.05 --budget-gpu-hours 2"),
    "tune": (Tune, "scaling tune quick-tuned --status"),
    "submit": (Submit, "scaling submit my.toml --executor slurm --dry-run"),
    "status": (Status, "scaling status quick --watch"),
    "collect": (Collect, "scaling collect quick"),
    "fit": (Fit, "scaling fit my_runs.csv --baseline adamw --challenger muon"),
    "compare": (Compare, "scaling compare update-rms"),
    "audit": (Audit, "scaling audit quick"),
    "report": (Report, "scaling report quick"),
    "doctor": (Doctor, "scaling doctor my.toml --probe"),
    "logs": (Logs, "scaling logs quick/muon/21k/0 --follow"),
    "cancel": (Cancel, "scaling cancel my.toml --arm muon"),
    "clean": (Clean, "scaling clean quick --dry-run"),
    "data": (Data, "scaling data prepare my.toml"),
    "train": (Train, "scaling train quick/muon/21k/0"),
    "evaluate": (Evaluate, "scaling evaluate quick/muon/21k/0 --text book.txt"),
    "export": (Export, "scaling export quick/muon/21k/0 my-model"),
}
"""Each verb's class and an example of its use, which ends its help."""

DESCRIPTION = """How much training compute does one way of training save over another at the same loss?

Begin with: scaling campaigns. scaling VERB --help explains a verb and gives an example; scaling --version names the
version; scaling --tyro-print-completion bash (or zsh, tcsh) prints a completion script for your shell."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main() -> None:
    """Entry point of the console script."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"scaling {version()}")
        return
    try:
        verb = tyro.cli(
            _subcommands(words),
            prog="scaling",
            description=DESCRIPTION,
            config=(OmitSubcommandPrefixes, FlagCreatePairsOff),
        )
        verb.run()
        sys.stdout.flush()  # here, where a full disk or a reader that has left can still be handled
    except UserError as error:
        print(f"scaling: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("scaling: interrupted; the same command continues.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _finish_output()  # the reader has left (`| head`), which is no error
    except OSError as error:
        _finish_output()
        print(f"scaling: {os_error_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _subcommands(words: list[str]) -> Any:
    """The verbs as a union that tyro understands; an example ends the help of the verb that is asked for."""
    verbs = []
    for name, (kind, example) in VERBS.items():
        description = f"{kind.__doc__}\n\nExample: {example}" if words[:1] == [name] else None
        verbs.append(Annotated[kind, subcommand(name, description=description)])
    return functools.reduce(operator.or_, verbs)


def _finish_output() -> None:
    """Print what was printed so far, or discard it where it cannot be, so that the interpreter does not fail at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
