"""Stands in for scaling/training/loop.py in the code snapshot of tests about SLURM: steps that are counted, not trained.

Each step's loss is a hash of the one before, so a run that repeats, skips or loses a step ends with other numbers. It
keeps the promises of the real one: the run's claim, a checkpoint at a step boundary when a signal asks for it, attempts
noted, metrics a line a step, the record last. A step takes `checkpoint_seconds` of the placement; a checkpoint is
written every tenth.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from scaling.flops import CONVENTIONS, train_flops
from scaling.io import append_line, write_atomic, write_json
from scaling.run.directory import RunDirectory
from scaling.run.record import Code, Device, MetricsRow, RunRecord

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def loss_after(value: str) -> float:
    return int(value[:8], 16) / 16**8


def train(run_dir, *, progress=None):
    directory = RunDirectory(run_dir)
    with directory.claim():
        if directory.record() is not None:
            return directory.record()
        broken = directory.path.parent.parent / "broken-node"
        if broken.exists() and broken.read_text() == os.environ["SLURMD_NODENAME"]:
            raise RuntimeError("this node is broken")
        spec = directory.spec()
        step, value = newest(directory, spec.id)
        directory.note("start", step=step)
        requested = []
        before = {number: signal.signal(number, lambda *_: requested.append(1)) for number in SIGNALS}
        pause = directory.placement().checkpoint_seconds
        while step < spec.steps:
            fault(directory, step)
            time.sleep(pause)
            step, value = step + 1, hashlib.sha256(f"{value} {step}".encode()).hexdigest()
            append_line(directory.metrics_file, row(spec, step, value))
            if requested or step % 10 == 0:
                save(directory, step, value)
            if requested and step < spec.steps:
                directory.note("end", step=step, outcome="preempted")
                return None
        for number, handler in before.items():
            signal.signal(number, handler)
        write_json(directory.record_file, record(directory, spec, value))
        directory.note("end", step=step, outcome="finished")
        return directory.record()


def fault(directory, step):
    """Faults that a test requests by a file in the run directory; each strikes at a step."""
    for name in ("raise", "kill"):
        order = directory.path / f"fault-{name}"
        if order.exists() and step == int(order.read_text()):
            if name == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            directory.note("end", step=step, outcome="failed", reason="requested by the test")
            sys.exit("requested by the test")


def newest(directory, run):
    for point in sorted(directory.checkpoints.glob("step-*.ckpt"), reverse=True):
        content = point.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] == point.name.split(".")[1]:
            state = json.loads(content)
            return state["step"], state["value"]
    return 0, hashlib.sha256(run.encode()).hexdigest()


def save(directory, step, value):
    content = json.dumps({"step": step, "value": value}).encode()
    name = f"step-{step:08d}.{hashlib.sha256(content).hexdigest()[:16]}.ckpt"
    write_atomic(directory.checkpoints / name, content)


def row(spec, step, value):
    tokens = step * spec.batch_tokens
    return MetricsRow(
        step=step, tokens=tokens, flops=train_flops(spec.model, tokens), train_loss=loss_after(value),
        learning_rate=0.0, grad_norm=None, tokens_per_second=1.0, mfu=None,
    )  # fmt: skip


def record(directory, spec, value):
    tokens = spec.steps * spec.batch_tokens
    return RunRecord(
        spec=spec, status="finished", validation_loss=loss_after(value), train_loss=loss_after(value), tokens=tokens,
        flops={name: train_flops(spec.model, tokens, name) for name in CONVENTIONS}, parameters={}, groups={},
        bytes_per_token=1.0, seconds=1.0, tokens_per_second=1.0, mfu=None, device=Device(name="none", kind="cpu"),
        code=Code(commit=None, dirty=None, versions={}), manifest=str(spec.data.manifest),
        attempts=sum(attempt.event == "start" for attempt in directory.attempts()), finished_at=time.time(),
    )  # fmt: skip


assert Path(__file__).name == "loop.py", "this file is only for code snapshots"
