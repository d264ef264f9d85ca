"""One run in several processes: which of them this is, starting them on one machine, and their strategies by name.

Under SLURM or torchrun the processes are there already and say their number in the environment. Otherwise `start` forks
them from a server that has imported the training code once. Only the first process writes; all of them decide together.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import socket
import traceback
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.errors import UserError
from scaling.spec import Placement, RunSpec
from scaling.training.shutdown import ShutdownRequest

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

    from scaling.models.decoder import Decoder


POLL_SECONDS = 0.2


def rank_of(placement: Placement) -> int | None:
    """Number of this process among the run's, from 0; None where they have yet to be started."""
    if placement.processes == 1:
        return 0
    environment = os.environ
    if "LOCAL_RANK" in environment:
        node = int(environment.get("NODE_RANK", environment.get("GROUP_RANK", "0")))
        return node * placement.devices + int(environment["LOCAL_RANK"])
    if environment.get("SLURM_NTASKS") == str(placement.processes):
        return int(environment["SLURM_PROCID"])
    return None


def share_of_batch(spec: RunSpec, placement: Placement) -> tuple[int, int]:
    """Windows of one optimizer step for each process, and windows of one forward pass.

    Raises:
        UserError: The batch does not divide over the processes, or a process's share over its micro-batches.
    """
    windows, processes = spec.batch_tokens // spec.model.context, placement.processes
    if windows % processes:
        fitting = [count for count in range(1, processes + 1) if windows % count == 0]
        raise UserError(
            f"placement: {processes} processes do not divide the {windows} windows of a batch of {spec.batch_tokens:,} "
            f"tokens. Use {fitting[-1]} of them, or a batch of {-(-windows // processes) * processes * spec.model.context:,}."
        )
    share = windows // processes
    micro_batch = placement.micro_batch or share
    if share % micro_batch:
        of = f"a process's share of the {windows} windows" if processes > 1 else "the windows"
        raise UserError(
            f"placement: micro_batch {micro_batch} does not divide the {share} windows of a batch; {of} is {share}: "
            f"use one of {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}."
        )
    return share, micro_batch


def strategy_of(placement: Placement) -> Strategy | str:
    """Lightning's strategy for the placement's name of it."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.nn.parallel import DistributedDataParallel

    if placement.processes == 1:
        return "auto"
    if placement.strategy in ("ddp", "zero1"):
        # Buffers are equal everywhere by computation, or counts that the first process's must not overwrite.
        # torch 2.15 renamed the argument and warns about the old name.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        sync: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DDPStrategy(**sync, gradient_as_bucket_view=True)
    return ModelParallelStrategy(
        data_parallel_size=placement.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(model: Decoder, mesh: DeviceMesh, *, precision: str) -> None:
    """Apply FSDP2 in place: each block gathers its own parameters; parameters and optimizer state stay fp32.

    With bf16 the mathematics is autocast's, as in one process and under DDP: matrices of the blocks are gathered in
    bf16, which is where autocast would cast them, and activations keep their format. Norms and routers, embedding and
    head are gathered in fp32. Autocast over fp32 gathering would keep a bf16 copy of every block for the backward pass.
    """
    import torch
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from scaling.models.moe import Router

    mesh = mesh["data_parallel"]
    if precision == "bf16":
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard([part for part in block.modules() if isinstance(part, nn.RMSNorm | Router)], mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=low)
    else:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in full, which all processes must ask for; a plain one as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def begin(process: ForkServerProcess) -> None:
    """Start a process from the fork server.

    Raises:
        UserError: The server ended before it could fork.
    """
    try:
        process.start()
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "the server process that forks training processes was killed before it started one "
            f"({type(error).__name__}), perhaps because the machine is out of memory. "
            "Free some memory or train fewer runs at once, and run the same command again; it continues from here."
        ) from None


def start(path: Path, placement: Placement) -> None:
    """Train a run in the processes that its placement requests, on this machine, and wait for them.

    A stop signal is passed on. When one process fails the others are ended, for they would wait for it for ever.

    Raises:
        UserError: A process failed, with its reason; or the placement spans several machines.
    """
    if placement.nodes > 1:
        raise UserError(
            f"placement: {placement.nodes} nodes are wished for, and this process was started alone. "
            "Start one process a device with srun or torchrun, or set nodes = 1."
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scaling.training.loop"])
    port = _free_port()
    workers: list[ForkServerProcess] = []
    reasons: list[Connection[Any, Any]] = []
    stop, told = ShutdownRequest(), False
    try:
        for rank in range(placement.devices):
            reader, writer = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(str(path), rank, placement.devices, port, writer))
            begin(worker)
            writer.close()
            workers.append(worker)
            reasons.append(reader)
        with stop.listening():
            while any(worker.is_alive() for worker in workers):
                connection.wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=POLL_SECONDS)
                if stop.due() and not told:
                    told = True
                    for worker in workers:
                        worker.terminate()
                if any(worker.exitcode for worker in workers):
                    break
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    failed = [rank for rank, worker in enumerate(workers) if worker.exitcode]
    said = [reason for reason in map(_reason, reasons) if reason is not None]
    if failed:
        fallback = f"process {failed[0]} of {placement.devices} ended with code {workers[failed[0]].exitcode}"
        raise UserError(next(iter(said), fallback))


def _reason(reader: Connection[Any, Any]) -> str | None:
    """What a process said before it failed; None where it ended without a word."""
    with contextlib.suppress(EOFError, OSError):
        if reader.poll():
            return str(reader.recv())
    return None


def _work(path: str, rank: int, processes: int, port: int, said: Connection[Any, Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
    }
    import torch.distributed

    from scaling.training.loop import train_one_process

    try:
        train_one_process(path)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        said.send(str(error))
        os._exit(2)
    except BaseException as error:
        traceback.print_exc()
        said.send(f"process {rank}: {type(error).__name__}: {error}")
        os._exit(1)  # at once: a normal exit would wait for the others in the process group


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
