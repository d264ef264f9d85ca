"""Runs that start from the weights of another: where those are, and what they cost.

The other run's directory lies beside this one. Whether its FLOPs are charged is part of the spec; what was charged is
stated in the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaling.errors import Refusal
from scaling.records import RunDirectory, RunRecord
from scaling.spec import Initial, ModelShape

if TYPE_CHECKING:
    from scaling.models.decoder import Decoder


def parent(directory: RunDirectory, initial: Initial) -> tuple[RunDirectory, RunRecord]:
    """The finished run that another starts from.

    Raises:
        Refusal: It is not there, not finished, or has lost its weights.
    """
    found, record = _finished(directory, initial)
    if not found.weights_file.exists():
        raise Refusal(
            f"{found.weights_file}: the weights are gone, and {directory.path.name} starts from them. Put the file back, "
            "or rename that run's record.json and submit it again."
        )
    return found, record


def _finished(directory: RunDirectory, initial: Initial) -> tuple[RunDirectory, RunRecord]:
    found = RunDirectory(directory.path.parent / initial.run)
    record = found.record() if found.path.is_dir() else None
    if record is None or record.status != "finished":
        state = found.state() if found.path.is_dir() else "nowhere"
        raise Refusal(
            f"{directory.path.name} starts from the weights of run {initial.run}, which is {state}. "
            "Train that run first; a submission of the campaign that wishes for both does so in order."
        )
    return found, record


def charged_flops(directory: RunDirectory, initial: Initial | None) -> dict[str, int]:
    """What the parent cost under every convention, its own parents included where they were charged; empty if not charged."""
    parents = charged_parents(directory, initial)
    return dict(parents[0].flops) if parents else {}


def charged_parents(directory: RunDirectory, initial: Initial | None) -> list[RunRecord]:
    """Records of the runs that a run stands on and pays for, the nearest first.

    Raises:
        Refusal: One of them is not there.
    """
    if initial is None or not initial.charged:
        return []
    where, record = _finished(directory, initial)
    return [record, *charged_parents(where, record.spec.initial)]


def load_initial(directory: RunDirectory, initial: Initial, model: Decoder) -> None:
    """Fill an initialised model with the parent's weights.

    Raises:
        Refusal: As `parent`, or the weights are damaged or of another shape.
    """
    from scaling.models.upcycle import load_weights

    found, record = parent(directory, initial)
    load_weights(model, found.intact_weights(record), how=initial.how)


def check_upcycled(shape: ModelShape) -> None:
    """Refuse a shape whose experts are not the size of the feed-forward, or that has more than copies of it.

    Raises:
        Refusal: As said.
    """
    mixture = shape.mixture
    if mixture is None:
        raise Refusal("upcycling makes experts, and this shape has none. Give the arm a table mixture.")
    if mixture.shared or mixture.granularity != 1:
        raise Refusal(
            f"upcycling copies the whole feed-forward into every routed expert, and this mixture has shared = "
            f"{mixture.shared} and granularity = {mixture.granularity}. Set shared = 0 and granularity = 1."
        )
