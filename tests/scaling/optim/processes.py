"""Functions run in several gloo processes, forked from one server that has imported torch once."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# What a worker would import for seconds: a DistributedDataParallel and the first optimizer step want torch._dynamo.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "scaling.optim.muon",
    ]
)
SECONDS = 120


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of ``function(*arguments)`` in each of `world` processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            CONTEXT.Process(target=_work, args=(rank, world, Path(folder), function, arguments))
            for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
        hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors, errors[0]
        assert not hung, f"processes {hung} of {world} still ran after {SECONDS} s"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world)]


def _work(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(function(*arguments), folder / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
