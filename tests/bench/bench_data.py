"""Tokens per second of `Batches.at` against the same sequences cut from one memory map by a plain loop.

Run: ``python tests/bench/bench_data.py``. Ratios are of one process on one core and can be compared between machines;
tokens per second cannot. Neither side may be slower than a device that trains: 10 million tokens/s feeds the smallest
model on a large GPU.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from scaling.data.batches import Batches
from scaling.data.shards import HEADER_BYTES, MANIFEST, Manifest, SplitInfo
from scaling.data.tokenizer import ByteTokenizer
from scaling.data.writer import ShardWriter, ShardWriterState
from scaling.io import write_json

TOKENS = 40_000_000
SHAPES = ((128, 16), (512, 128), (2048, 256), (8192, 64))
"""Context and sequences of a step: the demo, the small GPU rungs, Moonlight's first rungs, long contexts."""


def write(folder: Path) -> None:
    """One training shard of random tokens."""
    writer = ShardWriter(folder, "train", ShardWriterState())
    writer.add(np.random.default_rng(0).integers(0, 50_000, TOKENS).astype(np.uint16), TOKENS)
    empty = SplitInfo(shards=(), documents=0, bytes=0)
    manifest = Manifest(
        source="text",
        options={},
        config_hash="",
        tokenizer=ByteTokenizer.info,
        train=writer.finish(),
        validation=empty,
        document_ends="",
    )
    write_json(folder / MANIFEST, manifest)


def rate(batch_of, tokens: int) -> float:
    """Tokens per second, the best of five rounds of half a second, warm."""
    batch_of(0)
    best = 0.0
    for _ in range(5):
        start, step = time.perf_counter(), 0
        while time.perf_counter() - start < 0.5:
            step += 1
            batch_of(step % 50)
        best = max(best, step * tokens / (time.perf_counter() - start))
    return best


def main() -> None:
    """Print one line a shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        stream = np.memmap(folder / "train-00000.bin", dtype="<u2", mode="r", offset=HEADER_BYTES)
        start = time.perf_counter()
        Batches(folder, context=512, sequences=1).at(0)
        print(f"open and first batch: {time.perf_counter() - start:.3f} s for {TOKENS // 512:,} sequences")
        for context, sequences in SHAPES:
            batches = Batches(folder, context=context, sequences=sequences, repeat=True)
            order = np.random.default_rng(0).permutation((TOKENS - 1) // context)

            def plain(
                step: int, context: int = context, sequences: int = sequences, order: np.ndarray = order
            ) -> np.ndarray:
                rows = order[step * sequences % (len(order) - sequences) :][:sequences]
                return np.stack([stream[row * context : (row + 1) * context + 1] for row in rows]).astype(np.int64)

            ours, theirs = rate(batches.at, sequences * context), rate(plain, sequences * context)
            print(
                f"context {context:5d} x {sequences:3d} sequences: {ours / 1e6:7.1f} M tokens/s, "
                f"plain {theirs / 1e6:7.1f} M, ratio {ours / theirs:.2f}, {sequences * context / ours * 1e3:.3f} ms a step"
            )


if __name__ == "__main__":
    main()
