"""Which tokens an optimizer step sees: a pure function of (seed, step).

Nothing here has state that could be lost with a process: a run that was killed asks for batch k again and gets what
it would have got, both arms of a comparison get the same batches in the same order, and so does any number of
processes, each taking its rows of the same global batch.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scaling.data.shards import TokenStream
from scaling.data.sources.documents import Split
from scaling.errors import DataError


class NotEnoughTokens(DataError):
    """A run or an evaluation needs more tokens than the stream holds."""


class Batches:
    """Training batches by step.

    The stream is cut into windows of `context` inputs, each ending one token later for its targets, so that every
    token but the first is a target at most once an epoch. Windows are visited in a permutation that depends on the
    seed and the epoch alone: another batch size cuts the same sequence of windows elsewhere.

    Args:
        folder: RowSharding and manifest.
        context: Inputs of a window.
        windows: Windows of one optimizer step, all processes together.
        seed: Decides the order.
        repeat: Go on into further epochs, each in its own order, where the stream ends.
        steps: How many steps the run will take, checked here rather than after hours of training.

    Raises:
        NotEnoughTokens: The stream holds fewer windows than `steps` need and `repeat` is False, or not even one.
        DataError: The folder cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        context: int,
        windows: int,
        seed: int = 0,
        repeat: bool = False,
        steps: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.context = context
        self.windows = windows
        self.seed = seed
        self.repeat = repeat
        self._stream = TokenStream(self.folder, "train")
        self.per_epoch = max(len(self._stream) - 1, 0) // context
        """Whole windows of the stream."""
        if not self.per_epoch:
            raise NotEnoughTokens(
                f"data folder {self.folder}: {len(self._stream):,} training tokens do not fill one window of context "
                f"{context:,} and its target. Prepare more text, or use a shorter context."
            )
        if steps is not None:
            self._check(steps)

    @property
    def steps(self) -> int:
        """Whole batches of one epoch."""
        return self.per_epoch // self.windows

    def epochs(self, steps: int) -> float:
        """Times the stream is gone over in so many steps."""
        return steps * self.windows / self.per_epoch

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> npt.NDArray[np.int64]:
        """Token windows of one optimizer step, inputs and targets overlapping by one.

        Args:
            step: Number of the optimizer step, from 0.
            rank: With several processes, which one asks; it gets rows ``rank::world`` of the same batch.
            world: Number of processes.

        Returns:
            Shape ``(windows, context + 1)``, int64; of one process ``(ceil((windows - rank) / world), context + 1)``.

        Raises:
            NotEnoughTokens: The stream ends before this step and `repeat` is False.
        """
        if step < 0 or not 0 <= rank < world:
            raise ValueError(f"no batch of step {step} for rank {rank} of {world}")
        if not self.repeat:
            self._check(step + 1)
        numbers = range(step * self.windows + rank, (step + 1) * self.windows, world)
        batch = np.empty((len(numbers), self.context + 1), dtype=np.int64)
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for row, number in zip(batch, numbers, strict=True):
            if number // self.per_epoch != epoch:
                epoch = number // self.per_epoch
                order = _order(self.per_epoch, self.seed, epoch)
            window = int(order[number % self.per_epoch])
            self._stream.read_into(row, window * self.context)
        return batch

    def _check(self, steps: int) -> None:
        if not self.repeat and steps > self.steps:
            raise NotEnoughTokens(
                f"data folder {self.folder}: {steps:,} steps of {self.windows:,} windows of context {self.context:,} "
                f"need {steps * self.windows * self.context:,} training tokens; the stream holds "
                f"{self.per_epoch * self.context:,} in whole windows ({self.steps:,} steps). "
                "Prepare more text, shorten the runs, or set repeat = true in [data] to go over it again."
            )


def held_out(folder: Path | str, *, context: int, tokens: int) -> npt.NDArray[np.int64]:
    """The first windows of the validation split, the same for every run with this context.

    Args:
        folder: RowSharding and manifest.
        context: Inputs of a window.
        tokens: Targets wanted; whole windows of them are taken.

    Returns:
        Shape ``(tokens // context, context + 1)``, int64.

    Raises:
        NotEnoughTokens: The split holds fewer, or `tokens` is less than one window.
    """
    stream = TokenStream(Path(folder), _VALIDATION)
    wanted = tokens // context
    there = max(len(stream) - 1, 0) // context
    if not 0 < wanted <= there:
        raise NotEnoughTokens(
            f"data folder {folder}: an evaluation on {tokens:,} tokens takes {wanted:,} windows of context {context:,}; "
            f"at least one is needed and the validation split holds {there:,} ({there * context:,} tokens). "
            "Change the evaluation's tokens, or hold out more: a larger validation_fraction or train_tokens in [data]."
        )
    windows = np.empty((wanted, context + 1), dtype=np.int64)
    for number, row in enumerate(windows):
        stream.read_into(row, number * context)
    return windows


_VALIDATION: Split = "validation"


@functools.lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Window numbers of one epoch in the order of training, shape ``(windows,)``.

    Sorted random keys rather than ``Generator.permutation``: NumPy promises to keep the raw stream of a bit generator
    for ever, and not what its methods make of it. Two are kept, for a batch that lies across two epochs.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(windows)
    return np.argsort(keys, kind="stable")
