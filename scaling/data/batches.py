"""Which tokens an optimizer step sees: a pure function of (seed, step).

Nothing here has state that could be lost with a process: a run that was killed asks for batch k again and gets what
it would have got, both arms of a comparison get the same batches in the same order, and so does any number of
processes, each taking its rows of the same global batch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scaling.data.shards import TokenStream, document_ends
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
        seed: Decides the order; from 0 to 2**64 - 1, and each has its own.
        repeat: Go on into further epochs, each in its own order, where the stream ends.
        steps: How many steps the run will take, checked here rather than after hours of training.

    Raises:
        NotEnoughTokens: The stream holds fewer windows than `steps` need and `repeat` is False, or not even one.
        DataError: The folder cannot be read, or the seed is out of range.
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
        if not 0 <= seed < 2**64:
            raise DataError(
                f"seed {seed} is out of range: seeds are whole numbers from 0 to 2**64 - 1. Use one of them."
            )
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


class HeldOut(NamedTuple):
    """Sequences that a held-out loss is measured on."""

    windows: npt.NDArray[np.int64]
    """Shape ``(sequences, context + 1)``, in the order of the sample."""
    bytes_per_token: float
    """UTF-8 bytes of the evaluated targets over their number; the tokens of a document share its bytes equally."""
    documents: int
    """Documents that at least one target belongs to."""


def held_out(folder: Path | str, *, context: int, tokens: int) -> HeldOut:
    """A sample of the validation split, the same for every run with this context.

    The split is cut into sequences as training text is, and the first ones of a fixed permutation are taken, so that
    a small evaluation samples the whole split and a larger one contains every smaller one. The permutation depends on
    the number of sequences alone: not on the run's seed, nor on how many tokens are evaluated.

    Args:
        folder: RowSharding and manifest.
        context: Inputs of a sequence.
        tokens: Targets wanted; whole sequences of them are taken.

    Raises:
        NotEnoughTokens: The split holds fewer, or `tokens` is less than one sequence.
    """
    folder = Path(folder)
    stream = TokenStream(folder, "validation")
    wanted = tokens // context
    there = max(len(stream) - 1, 0) // context
    if not 0 < wanted <= there:
        raise NotEnoughTokens(
            f"data folder {folder}: an evaluation on {tokens:,} tokens takes {wanted:,} windows of context {context:,}; "
            f"at least one is needed and the validation split holds {there:,} ({there * context:,} tokens). "
            "Change the evaluation's tokens, or hold out more: a larger validation_fraction or train_tokens in [data]."
        )
    starts = _permutation(there, _HELD_OUT)[:wanted] * context
    windows = np.empty((wanted, context + 1), dtype=np.int64)
    for row, start in zip(windows, starts.tolist(), strict=True):
        stream.read_into(row, start)
    ends = document_ends(folder)  # shape (documents, 2): tokens and bytes up to the end of each
    # Targets of a sequence are the tokens from start + 1 up to, not including, start + context + 1.
    first_token, past_token = starts + 1, starts + context + 1
    bytes_before = functools.partial(np.interp, xp=np.append(0, ends[:, 0]), fp=np.append(0, ends[:, 1]))
    size = float(np.sum(bytes_before(past_token) - bytes_before(first_token)))
    opened = np.zeros(len(ends) + 1, dtype=np.int64)
    np.add.at(opened, np.searchsorted(ends[:, 0], first_token, side="right"), 1)
    np.add.at(opened, np.searchsorted(ends[:, 0], past_token - 1, side="right") + 1, -1)
    return HeldOut(windows, size / (wanted * context), int(np.count_nonzero(np.cumsum(opened))))


_HELD_OUT = np.random.SeedSequence(0, spawn_key=(1,))
"""Entropy of the held-out permutation: NumPy's second child of seed 0, set before any loss was measured with it. Orders of
training have no spawn key, so none of them is this one."""


@functools.lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Window numbers of one epoch in the order of training, shape ``(windows,)``.

    Two are kept, for a batch that lies across two epochs.
    """
    # NumPy pads entropy with zeros to four words of 32 bits, so words of a fixed number keep (seed, epoch) apart; a
    # seed of two words followed by the epoch would give seed 2**32 in epoch 0 the order of seed 0 in epoch 1.
    words = [seed % 2**32, epoch % 2**32, seed // 2**32, epoch // 2**32]
    return _permutation(windows, np.random.SeedSequence(words))


def _permutation(count: int, entropy: np.random.SeedSequence) -> npt.NDArray[np.int64]:
    """Numbers below `count` in random order, shape ``(count,)``.

    Sorted random keys rather than ``Generator.permutation``: NumPy promises to keep the raw stream of a bit generator
    for ever, and not what its methods make of it.
    """
    return np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable")
