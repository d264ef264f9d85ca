"""Tokens a second and MFU of a training step: this harness against a plain PyTorch loop of the same model, in turns.

On a CPU, as part of ``make bench``::

    python tests/bench/bench_train.py

On a GPU the same file measures Moonlight's smallest and largest rung, small rungs and packed ones, bf16 and compiled::

    python tests/bench/bench_train.py --cuda
    python tests/bench/bench_train.py --cuda --only 339M-2048,small,packing

Both sides take the same batches through the same model with the same optimizer settings (AdamW, clipping at 1). MFU
counts 6 x (blocks + head) + causal attention against the device's dense peak. Other work on
the machine changes the time of a step, so only ratios within one call count; sides take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import msgspec
import torch
from tiny import make_spec

from scaling.data.batches import Batches
from scaling.data.prepare import prepare
from scaling.data.shards import manifest_hash
from scaling.data.sources.registry import DataConfig
from scaling.flops import count_parameters, train_flops_per_token
from scaling.model_config import ModelConfig
from scaling.models.registry import build_model
from scaling.run.directory import RunDirectory
from scaling.spec import Evaluation, Placement, RunSpec
from scaling.training.loop import train
from scaling.units import human

ROUNDS = 3
PEAK_BF16 = 989.4e12
"""NVIDIA H100 and H200, dense, from the data sheet."""


def shape(layers: int, width: int, *, vocabulary: int, context: int, head: int = 64) -> ModelConfig:
    return ModelConfig(layers=layers, width=width, heads=width // head, vocabulary=vocabulary, context=context)


def run_spec(model: ModelConfig, data: Path, *, windows: int, steps: int, precision: str) -> RunSpec:
    spec = make_spec(shape=model, steps=steps, windows=windows, peak_lr=1e-4, manifest=manifest_hash(data))
    return msgspec.structs.replace(
        spec,
        data=msgspec.structs.replace(spec.data, repeat=True),
        evaluation=Evaluation(tokens=model.context, times=0),
        precision=precision,
    )


def harness(spec: RunSpec, data: Path, *, device: str, micro_batch: int | None, compiled: bool) -> float:
    """Tokens a second after the first fifth of the steps, the run as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / spec.id)
        placement = Placement(
            data=str(data), device=device, micro_batch=micro_batch, compile=compiled, checkpoint_seconds=1e9
        )
        directory.create(spec, placement)
        train(directory.path, progress=False)
        rows = [row for row in directory.metrics() if spec.steps // 5 < row.step < spec.steps]
        return statistics.median(row.tokens_per_second for row in rows)


def plain(spec: RunSpec, data: Path, *, device: str, micro_batch: int | None, compiled: bool) -> float:
    """The same for a loop without a harness: model, torch's AdamW, and nothing else."""
    model = build_model(spec.model)
    model.initialise(0)
    model.to(device)
    windows = spec.batch_tokens // spec.model.context
    micro_batch = micro_batch or windows
    vocabulary = spec.model.vocabulary

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1]).float().view(-1, vocabulary)
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:].reshape(-1))

    step_loss = torch.compile(loss_of) if compiled else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = Batches(data, context=spec.model.context, sequences=windows, repeat=True)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=spec.precision == "bf16")
    every = max(1, spec.steps // 200)
    rates, since = [], time.perf_counter()
    for step in range(spec.steps):
        for part in torch.split(torch.from_numpy(batches.at(step)), micro_batch):
            with autocast:
                loss = step_loss(part.to(device)) * len(part) / windows
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            float(loss.detach())
            now = time.perf_counter()
            if step > spec.steps // 5:
                rates.append(every * spec.batch_tokens / (now - since))
            since = now
    return statistics.median(rates)


def compare(
    name: str, spec: RunSpec, data: Path, *, device: str, micro_batch: int | None = None, compiled: bool = False
) -> None:
    """Both sides in turns, and one line."""
    ours, theirs = [], []
    torch.set_num_threads(1 if device == "cpu" else 8)
    for turn in range(ROUNDS):
        for side in (harness, plain) if turn % 2 else (plain, harness):
            rate = side(spec, data, device=device, micro_batch=micro_batch, compiled=compiled)
            (ours if side is harness else theirs).append(rate)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    mine, other = statistics.median(ours), statistics.median(theirs)
    overhead = spec.batch_tokens / mine - spec.batch_tokens / other
    line = (
        f"{name:>12}  {human(count_parameters(spec.model).blocks):>7}  {human(mine):>7} tokens/s  "
        f"plain {human(other):>7}  ratio {mine / other:5.3f}  {overhead * 1e6:+8.0f} us a step"
    )
    if device == "cuda":
        per_token = train_flops_per_token(spec.model, "attention")
        line += f"  MFU {mine * per_token / PEAK_BF16:6.1%}  plain {other * per_token / PEAK_BF16:6.1%}"
        line += f"  {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB"
        torch.cuda.reset_peak_memory_stats()
    print(line, flush=True)


def _must_succeed(directory: RunDirectory, code: int) -> None:
    assert code == 0, f"{directory.path} ended with code {code}"


def packed(spec: RunSpec, data: Path, *, device: str, runs: int = 4) -> None:
    """So many small runs at once against one after another, all in processes of their own."""
    from scaling.training.pool import side_by_side, train_in_process

    seconds = {}
    for at_once in (1, runs):
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for seed in range(runs):
                seeded = msgspec.structs.replace(spec, seed=seed)
                directory = RunDirectory(Path(folder) / seeded.id)
                directory.create(seeded, Placement(data=str(data), device=device, checkpoint_seconds=1e9))
                paths.append(directory.path)
            since = time.perf_counter()
            side_by_side(paths, at_once=at_once, work=train_in_process, ended=_must_succeed)
            seconds[at_once] = time.perf_counter() - since
    print(
        f"{runs} runs packed: {seconds[runs]:.1f} s, one after another {seconds[1]:.1f} s, "
        f"{seconds[1] / seconds[runs]:.2f} times",
        flush=True,
    )


def on_cpu(data: Path) -> None:
    rungs = {"21k": (3, 24, 8), "151k": (3, 64, 8), "0.8M": (4, 128, 64)}
    for name, (layers, width, head) in rungs.items():
        model = msgspec.structs.replace(shape(layers, width, vocabulary=256, context=128, head=head), ffn_multiple=8)
        steps = 60 if width < 128 else 20
        compare(name, run_spec(model, data, windows=8, steps=steps, precision="fp32"), data, device="cpu")


def on_cuda(data: Path, only: set[str]) -> None:
    def wanted(name: str) -> bool:
        return not only or name in only

    large = {
        "339M-2048": (12, 1536, 2048, 32),
        "339M-8192": (12, 1536, 8192, 8),
        "1.59B-2048": (20, 2560, 2048, 16),
    }
    for name, (layers, width, context, micro_batch) in large.items():
        if wanted(name):
            model = shape(layers, width, vocabulary=50_304, context=context, head=128)
            spec = run_spec(model, data, windows=micro_batch, steps=40, precision="bf16")
            compare(name, spec, data, device="cuda", micro_batch=micro_batch, compiled=True)
    small = {"0.8M": (4, 128), "3M": (6, 192), "6M": (8, 256), "14M": (8, 384)}
    for name, (layers, width) in small.items():
        if wanted("small"):
            model = shape(layers, width, vocabulary=8192, context=512)
            spec = run_spec(model, data, windows=64, steps=400, precision="bf16")
            compare(name, spec, data, device="cuda", compiled=True)
    if wanted("packing"):
        model = shape(4, 128, vocabulary=8192, context=512)
        packed(run_spec(model, data, windows=64, steps=400, precision="bf16"), data, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU instead of the CPU")
    parser.add_argument("--only", default="", help="comma-separated: 339M-2048, 339M-8192, 1.59B-2048, small, packing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(DataConfig(source="python-library", train_tokens=4_000_000), data, progress=False)
        if arguments.cuda:
            if not torch.cuda.is_available():
                sys.exit("bench_train: torch sees no GPU here; run it where there is one, or without --cuda.")
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, compiled")
            on_cuda(data, set(filter(None, arguments.only.split(","))))
        else:
            print(f"one thread of this CPU, fp32, torch {torch.__version__}")
            on_cpu(data)
            print("GPU figures: python tests/bench/bench_train.py --cuda")


if __name__ == "__main__":
    main()
