import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from scaling.data.batches import Batches, NotEnoughTokens, held_out
from scaling.data.shards import DOCUMENT_ENDS, END, MANIFEST, Manifest, Shard, SplitInfo, header, read_manifest
from scaling.data.sources.documents import Split
from scaling.data.tokenizer import ByteTokenizer
from scaling.errors import UserError
from scaling.io import write_json


def write_streams(folder: Path, cuts: list[int], validation: int = 50) -> Path:
    """Shards of the given sizes in which each token is its own position, so that a batch shows where it came from."""

    def split(split_name: Split, sizes: list[int]) -> SplitInfo:
        shards, start = [], 0
        for number, size in enumerate(sizes):
            name = f"{split_name}-{number}.bin"
            content = header(size) + np.arange(start, start + size, dtype="<u2").tobytes()
            (folder / name).write_bytes(content)
            shards.append(Shard(file=name, tokens=size, sha256=""))
            start += size
        return SplitInfo(shards=tuple(shards), documents=1, bytes=start)

    np.array([[validation, validation]], dtype=END).tofile(folder / DOCUMENT_ENDS)

    manifest = Manifest(
        source="text",
        options={},
        config_hash="",
        tokenizer=ByteTokenizer.info,
        train=split("train", cuts),
        validation=split("validation", [validation]),
        document_ends="",
    )
    write_json(folder / MANIFEST, manifest)
    return folder


streams = st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(lambda cuts: sum(cuts) > 40)


@settings(deadline=None, max_examples=60)
@given(cuts=streams, context=st.integers(1, 33), sequences=st.integers(1, 5), seed=st.integers(0, 2**64 - 1))
def test_sequences_of_an_epoch_partition_the_stream(cuts, context, sequences, seed):
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(
            write_streams(Path(folder), cuts), context=context, sequences=sequences, seed=seed, repeat=True
        )
        per_epoch = (sum(cuts) - 1) // context
        rows = np.concatenate([batches.at(step) for step in range(-(-per_epoch // sequences))])[:per_epoch]
    assert (np.diff(rows, axis=1) == 1).all()  # each is one stretch of the stream
    assert sorted(rows[:, 1:].ravel()) == list(range(1, per_epoch * context + 1))


@settings(deadline=None, max_examples=30)
@given(cuts=streams, step=st.integers(0, 50), seed=st.integers(0, 5), world=st.integers(1, 4))
def test_restarted_and_divided_runs_read_the_same_batch(cuts, step, seed, world):
    with tempfile.TemporaryDirectory() as folder:
        write_streams(Path(folder), cuts)

        def opened() -> Batches:
            return Batches(folder, context=4, sequences=6, seed=seed, repeat=True)

        walked = opened()
        for earlier in range(step):
            walked.at(earlier)
        batch = walked.at(step)
        assert (opened().at(step) == batch).all()
        parts = [opened().at(step, rank=rank, world=world) for rank in range(world)]
    together = np.empty_like(batch)
    for rank, part in enumerate(parts):
        together[rank::world] = part
    assert (together == batch).all()


def test_other_shard_sizes_change_no_batch(tmp_path):
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder, cuts in zip(folders, ([301], [7, 0, 294]), strict=True):
        folder.mkdir()
        write_streams(folder, cuts)
    one, three = (Batches(folder, context=10, sequences=5, seed=1) for folder in folders)
    assert all((one.at(step) == three.at(step)).all() for step in range(one.steps))


def test_batch_size_does_not_change_the_order(tmp_path):
    write_streams(tmp_path, [601])
    small, large = (Batches(tmp_path, context=10, sequences=sequences, seed=3) for sequences in (4, 12))
    assert (np.concatenate([small.at(step) for step in range(3)]) == large.at(0)).all()


def test_order_of_a_seed_is_fixed(tmp_path):
    # Changed numbers mean that old runs cannot be repeated.
    write_streams(tmp_path, [101])
    batches = Batches(tmp_path, context=10, sequences=10, seed=0, repeat=True)
    assert [int(row[0]) // 10 for row in batches.at(0)] == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert [int(row[0]) // 10 for row in batches.at(1)] == [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]


def test_orders_differ_between_seeds_and_epochs(tmp_path):
    write_streams(tmp_path, [4001])
    seeds = (0, 1, 2, 2**32, 2**33, 2**32 + 1, 2**64 - 1)
    orders = {
        tuple(Batches(tmp_path, context=10, sequences=400, seed=seed, repeat=True).at(epoch)[:, 0])
        for seed in seeds
        for epoch in range(3)
    }
    assert len(orders) == 3 * len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_rejected(tmp_path, seed):
    write_streams(tmp_path, [101])
    with pytest.raises(UserError, match=f"seed {seed} is out of range"):
        Batches(tmp_path, context=10, sequences=10, seed=seed)


def test_a_run_longer_than_the_stream_is_rejected_at_the_start(tmp_path):
    write_streams(tmp_path, [1000])
    with pytest.raises(NotEnoughTokens, match=r"50 steps .* need 2,000 training tokens; .* 990 .*24 steps.*repeat"):
        Batches(tmp_path, context=10, sequences=4, steps=50)
    assert Batches(tmp_path, context=10, sequences=4, steps=24).steps == 24
    assert Batches(tmp_path, context=10, sequences=4, steps=50, repeat=True).epochs(50) == pytest.approx(200 / 99)
    with pytest.raises(NotEnoughTokens, match="25 steps"):
        Batches(tmp_path, context=10, sequences=4).at(24)


def test_a_context_longer_than_the_stream_is_rejected(tmp_path):
    write_streams(tmp_path, [100])
    with pytest.raises(NotEnoughTokens, match="do not fill one sequence of context 100"):
        Batches(tmp_path, context=100, sequences=1, repeat=True)


def test_held_out_samples_are_fixed_and_nested(tmp_path):
    write_streams(tmp_path, [100], validation=101)
    starts = [held_out(tmp_path, context=10, tokens=tokens).sequences[:, 0] // 10 for tokens in (35, 100)]
    # Changed numbers mean that old losses cannot be compared with new ones.
    assert starts[1].tolist() == [1, 3, 8, 6, 2, 0, 7, 5, 4, 9]
    assert starts[0].tolist() == starts[1][:3].tolist()


def test_bytes_and_documents_of_the_held_out_sample(tmp_path):
    write_streams(tmp_path, [100], validation=101)
    # Four documents of 26, 25, 25 and 25 tokens with 1, 2, 3 and 4 bytes a token.
    tokens = np.array([26, 51, 76, 101])
    sizes = np.array([1, 2, 3, 4])
    lengths = np.diff(tokens, prepend=0)
    np.stack([tokens, np.cumsum(lengths * sizes)], axis=1).astype(END).tofile(tmp_path / DOCUMENT_ENDS)
    manifest = read_manifest(tmp_path)
    write_json(tmp_path / MANIFEST, replace(manifest, validation=replace(manifest.validation, documents=4)))
    of_token = np.repeat(np.arange(4), lengths)
    for requested in (1, 2, 4, 10):
        held = held_out(tmp_path, context=10, tokens=requested * 10)
        documents = of_token[held.sequences[:, 1:].ravel()]
        assert held.bytes_per_token == pytest.approx(sizes[documents].mean())
        assert held.documents == len(set(documents.tolist()))


@pytest.mark.parametrize("tokens", [9, 50])
def test_an_evaluation_larger_than_the_split_is_rejected(tmp_path, tokens):
    write_streams(tmp_path, [100], validation=41)
    with pytest.raises(NotEnoughTokens, match=r"holds 4 \(40 tokens\)"):
        held_out(tmp_path, context=10, tokens=tokens)
