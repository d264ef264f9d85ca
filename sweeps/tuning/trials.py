"""The studies of a campaign in one Optuna journal file, safe against kills, races and torn lines.

A lock that the kernel holds is around every write, so a killed process leaves none behind. Optuna appends to whatever
the file ends with: after a line that a kill cut short, the next record would be glued to it and lost without a word.
So the end of the file is fixed first, under the lock. A trial is written whole, in one record: there is no half-asked
trial to repair.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import JournalStorage
    from optuna.study import Study


class Journal:
    """Optuna studies by name in one file; every access that writes goes through `held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storage: JournalStorage | None = None
        self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the journal: one process asks and tells at a time. The kernel lets go when the process dies."""
        if self._held:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._held = True
            fix(self.path)
            yield
        finally:
            self._held = False
            os.close(descriptor)

    def study(self, name: str) -> Study:
        """The study of that name, made if it is not there; call it while the journal is `held`."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(study_name=name, storage=self._open(), load_if_exists=True, direction="minimize")

    def names(self) -> list[str]:
        """Studies that are there."""
        import optuna

        return optuna.get_all_study_names(self._open()) if self.path.exists() else []

    def set_aside(self) -> None:
        """Keep the file under another name and begin a new one; call it while the journal is `held`."""
        number = sum(1 for _ in self.path.parent.glob(f"{self.path.name}.aside-*")) + 1
        self.path.rename(self.path.with_name(f"{self.path.name}.aside-{number}"))
        self._storage = None

    def _open(self) -> JournalStorage:
        if self._storage is None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

            class HeldAlready(JournalFileOpenLock):
                """Optuna's own lock is a file that a killed process leaves behind; ours is held around it."""

                def acquire(self) -> bool:
                    return True

                def release(self) -> None:
                    return None

            self._storage = JournalStorage(JournalFileBackend(str(self.path), lock_obj=HeldAlready(str(self.path))))
        return self._storage


def fix(path: Path) -> int:
    """Cut a torn last line off, and return its length in bytes; 0 where the file is whole."""
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return 0
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return 0
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
            return size - whole
    except FileNotFoundError:
        return 0


def add_running(study: Study, values: dict[str, float], distributions: dict[str, Any], run: str) -> int:
    """Write a trial that is to be run, in one record; its number."""
    from optuna.trial import TrialState, create_trial

    number = len(study.get_trials(deepcopy=False))
    study.add_trial(
        create_trial(state=TrialState.RUNNING, params=values, distributions=distributions, user_attrs={"run": run})
    )
    return number


def tell(study: Study, number: int, loss: float | None, *, pruned_at: int | None = None) -> None:
    """Tell a running trial its loss; None fails it, so that another is asked in its place.

    Args:
        study: The study.
        number: The trial's.
        loss: Held-out loss, nats per token.
        pruned_at: Tokens of the smaller budget that it was left at; the loss is the one there.
    """
    from optuna.trial import TrialState

    if loss is None:
        study.tell(number, state=TrialState.FAIL)
    elif pruned_at is None:
        study.tell(number, loss)
    else:
        # One record, so that a kill cannot leave half of it: Optuna's own way writes the loss and the state apart.
        trial = study.get_trials(deepcopy=False)[number]
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.PRUNED, values=[loss])
