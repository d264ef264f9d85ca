"""The command line: one class per verb; its fields are the arguments, its docstrings the help.

This is the only package that imports scaling, sweeps and analysis. Each verb imports what it needs when it runs, so that
``scaling --help`` takes a fraction of a second. An error that the user can act on (`UserError`, or one of the operating
system) becomes one sentence on stderr and exit status 2; any other exception is a defect and ends in a traceback. Exit
statuses are in `scaling.errors.ExitCode`.

Environment variables, and other state of the process, that the program reads or sets:

* ``SCALING_ROOT``: default of ``--root`` (`scaling.cli.common.default_root`).
* ``SCALING_SLURM_PROFILE``: the user's file of SLURM settings (`sweeps.config.placement`).
* ``OMP_NUM_THREADS``, ``MKL_NUM_THREADS``: set for worker processes to the placement's threads, since OpenMP reads them
  only when it is loaded (`scaling.training.pool.ProcessPool`). `train` also calls ``torch.set_num_threads``.
* ``CUDA_VISIBLE_DEVICES``: respected, and set for each of several runs that share a machine's GPUs
  (`scaling.training.pool.train_in_process`).
* ``TORCHINDUCTOR_CACHE_DIR``: set to ``<root>/cache/inductor`` for compiled runs, unless the user has set it
  (`scaling.training.loop`).
* ``LOCAL_RANK``, ``NODE_RANK``, ``GROUP_RANK``, ``SLURM_PROCID``, ``SLURM_NTASKS``: the rank of a process in its run
  (`scaling.training.launch.rank_of`); ``MASTER_ADDR``, ``MASTER_PORT`` and ``WORLD_SIZE`` are set for launched ranks.
* Handlers of SIGTERM, SIGINT and SIGUSR2 are replaced while a run trains (`scaling.training.shutdown`).
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
from scaling.cli.start import Diff, Explain, Init
from scaling.cli.tables import Audit, Fit, Report
from scaling.errors import ExitCode, UserError, os_error_sentence, plain

VERBS: dict[str, tuple[type, str]] = {
    "demo": (Demo, "scaling demo --root /tmp/demo"),
    "campaigns": (Campaigns, "scaling campaigns"),
    "init": (Init, "scaling init mine --data book.txt"),
    "plan": (Plan, "scaling plan quick --set 'seeds=[0,1]'"),
    "explain": (Explain, "scaling explain quick/muon/21k/0 peak_lr"),
    "diff": (Diff, "scaling diff quick mine.toml"),
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
"""Class of each verb, and the example at the end of its help."""

DESCRIPTION = """Measure how much training compute one way of training saves over another at the same loss.

Start with: scaling campaigns. scaling VERB --help explains a verb and gives an example; scaling --version prints the
version; scaling --tyro-print-completion bash (or zsh, tcsh) prints a completion script for your shell."""


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
        sys.stdout.flush()  # here, so that the handlers below see a full disk or a closed pipe
    except UserError as error:
        print(f"scaling: {plain(str(error))}", file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)
    except KeyboardInterrupt:
        print("scaling: interrupted; the same command continues.", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        _flush_or_discard_output()  # the reader has ended (`| head`), which is no error
    except OSError as error:
        _flush_or_discard_output()
        print(f"scaling: {os_error_sentence(error)}", file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)


def _subcommands(words: list[str]) -> Any:
    """The verbs as a union for tyro; the help of the requested verb ends with its example."""
    verbs = []
    for name, (kind, example) in VERBS.items():
        description = f"{kind.__doc__}\n\nExample: {example}" if words[:1] == [name] else None
        verbs.append(Annotated[kind, subcommand(name, description=description)])
    return functools.reduce(operator.or_, verbs)


def _flush_or_discard_output() -> None:
    """Flush stdout, or discard it if that fails, because the interpreter would flush it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
