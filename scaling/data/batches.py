"""Batches of token sequences: a pure function of seed and step.

There is no state that a killed process could lose: a resumed run reads batch k as if it had not been killed, both arms
of a comparison read the same batches in the same order, and several processes each take their rows of the same batch.
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

    The stream is cut into sequences of `context` inputs, each with one more token for its targets, so every token but
    the first is a target at most once per epoch. The order of the sequences is a permutation that depends only on seed
    and epoch; the batch size only groups them.

    Args:
        folder: Token shards with their manifest.
        context: Inputs per sequence.
        sequences: Sequences per optimizer step, over all processes.
        seed: From 0 to 2**64 - 1; each has its own order.
        repeat: Continue with further epochs, each in its own order, when the stream ends.
        steps: Steps of the run, checked here rather than after hours of training.

    Raises:
        NotEnoughTokens: The stream holds fewer sequences than `steps` need and `repeat` is False, or none.
        DataError: The folder cannot be read, or the seed is out of range.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        context: int,
        sequences: int,
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
        self.sequences = sequences
        self.seed = seed
        self.repeat = repeat
        self._stream = TokenStream(self.folder, "train")
        self.per_epoch = max(len(self._stream) - 1, 0) // context
        """Whole sequences in the stream."""
        if not self.per_epoch:
            raise NotEnoughTokens(
                f"data folder {self.folder}: {len(self._stream):,} training tokens do not fill one sequence of context "
                f"{context:,} and its target. Prepare more text, or use a shorter context."
            )
        if steps is not None:
            self._check(steps)

    @property
    def steps(self) -> int:
        """Whole batches in one epoch."""
        return self.per_epoch // self.sequences

    def epochs(self, steps: int) -> float:
        """Passes over the stream that `steps` steps take."""
        return steps * self.sequences / self.per_epoch

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> npt.NDArray[np.int64]:
        """Token sequences of one optimizer step, inputs and targets overlapping by one.

        Args:
            step: Number of the optimizer step, from 0.
            rank: Number of the process, which gets rows ``rank::world`` of the batch.
            world: Number of processes.

        Returns:
            Shape ``(sequences, context + 1)``, int64; for one of several processes
            ``(ceil((sequences - rank) / world), context + 1)``.

        Raises:
            NotEnoughTokens: The stream ends before this step and `repeat` is False.
        """
        if step < 0 or not 0 <= rank < world:
            raise ValueError(f"no batch of step {step} for rank {rank} of {world}")
        if not self.repeat:
            self._check(step + 1)
        numbers = range(step * self.sequences + rank, (step + 1) * self.sequences, world)
        batch = np.empty((len(numbers), self.context + 1), dtype=np.int64)
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for row, number in zip(batch, numbers, strict=True):
            if number // self.per_epoch != epoch:
                epoch = number // self.per_epoch
                order = _order(self.per_epoch, self.seed, epoch)
            sequence = int(order[number % self.per_epoch])
            self._stream.read_into(row, sequence * self.context)
        return batch

    def _check(self, steps: int) -> None:
        if not self.repeat and steps > self.steps:
            raise NotEnoughTokens(
                f"data folder {self.folder}: {steps:,} steps of {self.sequences:,} sequences of context {self.context:,} "
                f"need {steps * self.sequences * self.context:,} training tokens; the stream holds "
                f"{self.per_epoch * self.context:,} in whole sequences ({self.steps:,} steps). "
                "Prepare more text, shorten the runs, or set repeat = true in [data] for several epochs."
            )


class HeldOut(NamedTuple):
    """Sequences on which a held-out loss is measured."""

    sequences: npt.NDArray[np.int64]
    """Shape ``(sequences, context + 1)``, in the order of the sample."""
    bytes_per_token: float
    """UTF-8 bytes of the evaluated targets over their number; a document's bytes count equally for each of its tokens."""
    documents: int
    """Documents that at least one target belongs to."""


def held_out(folder: Path | str, *, context: int, tokens: int) -> HeldOut:
    """A sample of the validation split that is the same for every run with this context.

    The split is cut into sequences as training text is, and the sample is the beginning of a fixed permutation. So a
    small sample covers the whole split, and a larger one contains every smaller one. The permutation depends only on
    the number of sequences, not on the run's seed or the size of the sample.

    Args:
        folder: Token shards with their manifest.
        context: Inputs per sequence.
        tokens: Targets of the sample, rounded down to whole sequences.

    Raises:
        NotEnoughTokens: The split holds fewer tokens, or `tokens` is less than one sequence.
    """
    folder = Path(folder)
    stream = TokenStream(folder, "validation")
    requested = tokens // context
    available = max(len(stream) - 1, 0) // context
    if not 0 < requested <= available:
        raise NotEnoughTokens(
            f"data folder {folder}: an evaluation on {tokens:,} tokens takes {requested:,} sequences of context "
            f"{context:,}; at least one is needed and the validation split holds {available:,} "
            f"({available * context:,} tokens). Change the evaluation's tokens, or hold out more with a larger "
            "validation_fraction or train_tokens in [data]."
        )
    starts = _permutation(available, HELD_OUT_ENTROPY)[:requested] * context
    sequences = np.empty((requested, context + 1), dtype=np.int64)
    for row, start in zip(sequences, starts.tolist(), strict=True):
        stream.read_into(row, start)
    ends = document_ends(folder)  # shape (documents, 2): tokens and bytes up to the end of each
    # Targets of a sequence are the tokens from start + 1 up to, not including, start + context + 1.
    first_token, past_token = starts + 1, starts + context + 1
    bytes_before = functools.partial(np.interp, xp=np.append(0, ends[:, 0]), fp=np.append(0, ends[:, 1]))
    size = float(np.sum(bytes_before(past_token) - bytes_before(first_token)))
    # A document counts if a sequence's targets touch it: +1 at the document of the first target, -1 after the document
    # of the last, so the running sum is the number of sequences that touch each document.
    opened = np.zeros(len(ends) + 1, dtype=np.int64)
    np.add.at(opened, np.searchsorted(ends[:, 0], first_token, side="right"), 1)
    np.add.at(opened, np.searchsorted(ends[:, 0], past_token - 1, side="right") + 1, -1)
    return HeldOut(sequences, size / (requested * context), int(np.count_nonzero(np.cumsum(opened))))


HELD_OUT_ENTROPY = np.random.SeedSequence(0, spawn_key=(1,))
"""Entropy of the held-out permutation. Orders of training have no spawn key, so none of them equals this one."""


@functools.lru_cache(maxsize=2)
def _order(sequences: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Sequence numbers of one epoch in training order, shape ``(sequences,)``; two are cached, since a batch can span both."""
    # NumPy pads entropy with zeros to four words of 32 bits, so words of a fixed number keep (seed, epoch) apart; a
    # seed of two words followed by the epoch would give seed 2**32 in epoch 0 the order of seed 0 in epoch 1.
    words = [seed % 2**32, epoch % 2**32, seed // 2**32, epoch // 2**32]
    return _permutation(sequences, np.random.SeedSequence(words))


def _permutation(count: int, entropy: np.random.SeedSequence) -> npt.NDArray[np.int64]:
    """Numbers below `count` in random order, shape ``(count,)``.

    Sorted random keys rather than ``Generator.permutation``: NumPy guarantees that the raw stream of a bit generator
    never changes, and gives no such guarantee for the methods that use it.
    """
    return np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable")
