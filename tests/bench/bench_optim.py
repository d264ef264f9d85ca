"""Times of an optimizer step: ours, torch's Muon and AdamW, in one run, so that their ratios are comparable.

    make bench                                                            CPU: 12 layers of width 768, and small models
    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/bench_optim.py --layers 2    the same in seconds, two layers
    .venv/bin/python tests/bench/bench_optim.py --cuda                    a GPU alone: Moonlight's 339.7M and 1.59B shapes
                                                                          and small rungs

On a CPU both wall and CPU seconds are printed: other work on the machine lengthens the first and hardly the second.
Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaling.data.prepare import prepare
from scaling.data.shards import manifest_hash
from scaling.flops import train_flops
from scaling.model_config import ModelConfig, ffn_width
from scaling.models.decoder import Decoder
from scaling.optim.newton_schulz.matmul import gram, quadratic
from scaling.optim.optimizer import GroupedOptimizer
from scaling.optim.optimizer_flops import update_flops
from scaling.optim.registry import build
from scaling.run.directory import RunDirectory
from scaling.spec import Budget, Evaluation, OptimizerSpec, Placement, RunSpec
from scaling.training.loop import train
from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import plan

MOONLIGHT = {"339.7M": (12, 1536), "1.59B": (20, 2560)}
RUNGS = {"0.8M": (4, 128), "1.9M": (6, 160), "5.3M": (8, 256)}


def matrices(layers: int, width: int, hidden: int, device: str) -> list[tuple[str, nn.Parameter]]:
    """The matrices of a decoder's blocks, with gradients."""
    shapes = {f"attention.{name}": (width, width) for name in ("query", "key", "value", "output")}
    shapes |= {f"feed_forward.{name}": (hidden, width) for name in ("gate", "up")}
    shapes["feed_forward.down"] = (width, hidden)
    named = []
    for layer in range(layers):
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.randn(shape, device=device) * 0.02)
            parameter.grad = torch.randn(shape, device=device)
            named.append((f"blocks.{layer}.{name}.weight", parameter))
    return named


def arms(named: list[tuple[str, nn.Parameter]], **options: str) -> dict[str, torch.optim.Optimizer]:
    """Ours and torch's over the same parameters."""
    parameters = [parameter for _, parameter in named]
    return {
        "ours": build(OptimizerSpec(name="muon", peak_lr=1e-4, options=dict(options)), named),
        "torch.optim.Muon": torch.optim.Muon(parameters, lr=1e-4, adjust_lr_fn="match_rms_adamw"),
        "AdamW, fused": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    }


def timed(steps: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each, after one round to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (statistics.median(w for w, _ in t), statistics.median(c for _, c in t)) for name, t in taken.items()}


def report(title: str, seconds: dict[str, tuple[float, float]], flops: int = 0) -> None:
    """A line for each arm; ratios against torch's Muon."""
    print(f"\n{title}")
    base = seconds.get("torch.optim.Muon", next(iter(seconds.values())))
    for name, (wall, cpu) in seconds.items():
        rate = f"{flops / wall / 1e9:8.0f} GFLOP/s of the plain products" if flops and "AdamW" not in name else ""
        print(f"  {name:18s} {wall * 1e3:10.2f} ms wall {cpu * 1e3:10.2f} ms CPU   "
              f"{base[0] / wall:5.2f} x wall {base[1] / max(cpu, 1e-9):5.2f} x CPU {rate}")  # fmt: skip


def ceiling() -> float:
    """FLOP/s of one thread in the best of several large bf16 products."""
    x = torch.randn(2048, 2048).bfloat16()
    out = torch.empty_like(x)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, x, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best / torch.get_num_threads()


def products_alone(shapes: Iterable[tuple[int, ...]]) -> float:
    """CPU seconds of the products of five steps, nothing else: the best of several for each shape.

    From wall-clock and the number of threads: the system counts CPU time of several threads too late for milliseconds.
    """
    total = 0.0
    for (rows, columns), count in Counter((shape[0], shape[1]) for shape in shapes).items():
        x = torch.randn(1, rows, columns).bfloat16()
        square = x.new_empty(1, min(rows, columns), min(rows, columns))
        factor, out = torch.randn(square.shape).bfloat16(), torch.empty_like(x)
        left, right = (x, factor) if rows > columns else (factor, x)
        for product in (
            functools.partial(gram, x, square),
            functools.partial(quadratic, factor, -4.775, 2.0315, square),
            functools.partial(torch.baddbmm, x, left, right, beta=3.4445, out=out),
        ):
            best = float("inf")
            for _ in range(8):
                start = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - start)
            total += 5 * count * best
    return total * torch.get_num_threads()


def bench_wide(layers: int, rounds: int) -> None:
    """12 layers of width 768: 84.9M parameters, both in bf16."""
    named = matrices(layers, 768, 2048, "cpu")
    optimizers = arms(named, ns_dtype="bf16")
    seconds = timed({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, "cpu")
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    flops = update_flops(OptimizerSpec(name="muon", peak_lr=1.0), shapes)
    report(f"{layers} layers of width 768, {sum(p.numel() for _, p in named) / 1e6:.1f}M parameters", seconds, flops)
    torchs = seconds["torch.optim.Muon"][1]
    rate, floor = ceiling(), products_alone(shapes.values())
    halved = sum(5 * (3 * min(shape) ** 2 * max(shape) + min(shape) ** 3) for shape in shapes.values())
    print(f"  bounds, by CPU time: the best large bf16 product runs at {rate / 1e9:.0f} GFLOP/s, torch's Muon at "
          f"{flops / torchs / 1e9:.0f} ({flops / torchs / rate:.0%})\n"
          f"    whole products at that speed       {flops / rate * 1e3:7.0f} ms, {torchs * rate / flops:.2f} x torch's Muon\n"
          f"    symmetric ones halved to the entry {halved / rate * 1e3:7.0f} ms, {torchs * rate / halved:.2f} x\n"
          f"    our products, timed alone          {floor * 1e3:7.0f} ms, {torchs / floor:.2f} x; "
          f"ours took {seconds['ours'][1] / floor:.2f} of that with all the rest")  # fmt: skip
    ours = optimizers["ours"]
    assert isinstance(ours, GroupedOptimizer)
    state = sum(tensor.nbytes for each in ours.state.values() for tensor in each.values())
    theirs = sum(t.nbytes for each in optimizers["torch.optim.Muon"].state.values() for t in each.values())
    print(
        f"  state {state / 2**20:.0f} MiB (torch's Muon {theirs / 2**20:.0f}), workspace {ours.workspace.bytes / 2**20:.1f} MiB"
    )


def whole_step(model: Decoder, windows: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad()
    model.loss(windows).backward()
    optimizer.step()


def bench_small(rounds: int) -> None:
    """Whole training steps of small decoders: what the Muon arm costs beside the AdamW arm."""
    for (layers, width), tokens in [((2, 32), 2048), ((4, 64), 2048), ((2, 32), 8192), ((4, 64), 8192)]:
        shape = ModelConfig(layers=layers, width=width, heads=width // 16, vocabulary=512, context=128, ffn_multiple=8)
        model = Decoder(shape)
        model.initialise(0)
        windows = torch.randint(512, (tokens // 128, 129))
        steps: dict[str, Callable[[], object]] = {}
        for name in ("adamw", "muon"):
            optimizer = build(OptimizerSpec(name=name, peak_lr=1e-4), model.named_parameters())
            steps |= {
                f"{name}: whole": functools.partial(whole_step, model, windows, optimizer),
                f"{name}: step": optimizer.step,
            }
        seconds = timed(steps, rounds, "cpu")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        ratio = seconds["muon: whole"][1] / seconds["adamw: whole"][1]
        print(f"\n{layers} layers of width {width}, {parameters / 1e3:.0f}k parameters, {tokens:,} tokens a step")
        for name, (wall, cpu) in seconds.items():
            print(f"  {name:14s} {wall * 1e3:8.2f} ms wall {cpu * 1e3:8.2f} ms CPU")
        print(f"  Muon arm / AdamW arm {ratio:.3f} (CPU time)")


def bench_campaign(rounds: int, batch_tokens: int = 8192, steps: int = 24) -> None:
    """Whole runs of the quick campaign at a larger batch, as a user runs them: time per step from what they logged.

    Arms take turns; a step's time is the median over the logged steps of all turns but the first fifth of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        campaign = load_campaign("quick", settings=[f"training.batch_tokens={batch_tokens}"])
        prepare(msgspec.structs.replace(campaign.data, train_tokens=4_000_000), Path(folder) / "data", progress=False)
        planned = plan(campaign, Path(folder))
        print(f"\nquick campaign, {batch_tokens:,} tokens a step: seconds of a step, Muon arm against AdamW arm")
        for rung in planned.rungs:
            pair = [next(r.spec for r in planned.runs if r.rung == rung.name and r.arm == a) for a in ("adamw", "muon")]
            wall, cpu = ({spec.optimizer.name: [] for spec in pair} for _ in range(2))
            for turn in range(rounds + 1):
                for spec in pair:
                    seconds, work = run_briefly(spec, Path(folder), steps)
                    if turn:
                        wall[spec.optimizer.name] += seconds
                        cpu[spec.optimizer.name].append(work)
            (adamw, muon), (adamw_cpu, muon_cpu) = (
                [statistics.median(each) for each in of.values()] for of in (wall, cpu)
            )
            over = "" if muon_cpu / adamw_cpu <= 1.15 else "   above 1.15"
            print(f"  {rung.name:>5s}  AdamW {adamw * 1e3:7.1f} ms  Muon {muon * 1e3:7.1f} ms  {muon / adamw:.3f} wall  "
                  f"{muon_cpu / adamw_cpu:.3f} CPU{over}", flush=True)  # fmt: skip


def run_briefly(spec: RunSpec, folder: Path, steps: int) -> tuple[list[float], float]:
    """Wall seconds of the logged steps of a short run like `spec`, and its CPU seconds a step."""
    tokens = steps * spec.batch_tokens
    shortened = msgspec.structs.replace(
        spec,
        budget=Budget(tokens=tokens, flops=train_flops(spec.model, tokens)),
        schedule=msgspec.structs.replace(spec.schedule, warmup_tokens=tokens // 10),
        data=msgspec.structs.replace(spec.data, repeat=True, manifest=manifest_hash(folder / "data")),
        evaluation=Evaluation(tokens=spec.model.context, times=0),
    )
    with tempfile.TemporaryDirectory() as runs:
        directory = RunDirectory(Path(runs) / shortened.id)
        directory.create(shortened, Placement(data=str(folder / "data"), device="cpu", checkpoint_seconds=1e9))
        record = train(directory.path, progress=False)
        assert record is not None
        assert record.cpu_seconds is not None
        rows = [row for row in directory.metrics() if row.step > steps // 5]
        return [spec.batch_tokens / row.tokens_per_second for row in rows], record.cpu_seconds / steps


def bench_cuda(rounds: int) -> None:
    """Moonlight's smallest and largest shapes, and small rungs."""
    print(f"\n{torch.cuda.get_device_name()}")
    for label, (layers, width) in {**MOONLIGHT, **RUNGS}.items():
        named = matrices(layers, width, ffn_width(width, 256 if label in MOONLIGHT else 8), "cuda")
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        flops = update_flops(OptimizerSpec(name="muon", peak_lr=1.0), shapes)
        seconds = timed({name: each.step for name, each in arms(named).items()}, rounds, "cuda")
        report(f"{label}: {layers} layers of width {width}", seconds, flops)


def check_flops() -> None:
    """Assert that our FLOPs of a step are those that torch counts of its own Muon."""
    named = matrices(1, 64, 176, "cpu")
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon([parameter for _, parameter in named]).step()
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    assert counter.get_total_flops() == update_flops(OptimizerSpec(name="muon", peak_lr=1.0), shapes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="the GPU's section alone")
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}, torch {torch.__version__}, load {load:.2f}"
    )
    check_flops()
    if chosen.cuda:
        if not torch.cuda.is_available():
            sys.exit("bench_optim: torch sees no GPU here; run it where there is one, or without --cuda.")
        bench_cuda(chosen.rounds)
    else:
        bench_wide(chosen.layers, chosen.rounds)
        bench_small(5 * chosen.rounds)
        bench_campaign(chosen.rounds)
        print("\nGPU figures: python tests/bench/bench_optim.py --cuda")
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")
