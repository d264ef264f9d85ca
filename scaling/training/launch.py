"""One run in several processes: rank, share of the batch, Lightning strategy, and launching the ranks on one machine.

SLURM and torchrun start the processes and set each one's rank in the environment. Otherwise `launch_ranks` forks them.
Only rank 0 writes files; decisions are taken by all ranks together.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.errors import UserError
from scaling.spec import Placement, RunSpec
from scaling.training.pool import ProcessExit, ProcessPool
from scaling.training.shutdown import ShutdownRequest
from scaling.units import largest_divisor

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

    from scaling.models.decoder import Decoder


def rank_of(placement: Placement) -> int | None:
    """Rank of this process in the run, from 0; None if the processes are still to be launched."""
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
    """Sequences per process and optimizer step, and sequences per forward pass.

    Raises:
        UserError: The processes do not divide the batch, or the micro-batch does not divide a process's share of it.
    """
    sequences, processes = spec.batch_tokens // spec.model.context, placement.processes
    if sequences % processes:
        larger = -(-sequences // processes) * processes * spec.model.context
        raise UserError(
            f"placement: {processes} processes do not divide the {sequences} sequences of a batch of "
            f"{spec.batch_tokens:,} tokens. "
            f"Use {largest_divisor(sequences, processes)} of them, or a batch of {larger:,}."
        )
    share = sequences // processes
    micro_batch = placement.micro_batch or share
    if share % micro_batch:
        relation = f"each of {processes} processes trains on" if processes > 1 else "a batch holds"
        raise UserError(
            f"placement: micro_batch {micro_batch} does not divide the {share} sequences that {relation}. "
            f"Use one of {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}."
        )
    return share, micro_batch


def strategy_of(placement: Placement) -> Strategy | str:
    """Lightning's strategy by the name in the placement."""
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


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, which is a collective operation; a plain one unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def launch_ranks(path: Path, placement: Placement) -> None:
    """Train a run in the processes that its placement requests, on this machine, and wait for them.

    A stop signal is passed on. If one rank fails, the others are killed: they would block in a collective.

    Raises:
        UserError: A rank failed, with its reason; or the placement spans several machines.
    """
    if placement.nodes > 1:
        raise UserError(
            f"placement: {placement.nodes} nodes are requested, and this process was started alone. "
            "Start one process per device with srun or torchrun, or set nodes = 1."
        )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]  # a free one
    reasons: list[Connection[Any, Any]] = []
    failed: ProcessExit | None = None
    stop = ShutdownRequest()
    with ProcessPool() as pool:
        for rank in range(placement.devices):
            reader, writer = multiprocessing.Pipe(duplex=False)
            pool.start(f"process {rank}", _train_rank, str(path), rank, placement.devices, port, writer)
            writer.close()
            reasons.append(reader)
        with stop.listening():
            while pool.active and failed is None:
                failed = next((ended for ended in pool.wait() if ended.code), None)
                if stop.due():
                    pool.terminate()
    if failed is not None:
        reported = filter(None, map(_reported, reasons))
        raise UserError(next(reported, f"{failed.name} of {placement.devices} ended with code {failed.code}"))


def _reported(reader: Connection[Any, Any]) -> str | None:
    """The reason that a rank sent before it failed; None if it sent none."""
    with contextlib.suppress(EOFError, OSError):
        if reader.poll():
            return str(reader.recv())
    return None


def _train_rank(path: str, rank: int, processes: int, port: int, reason: Connection[Any, Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(processes),
    }
    import torch.distributed

    from scaling.training.loop import train_rank

    try:
        train_rank(path)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as error:
        reason.send(str(error))
        os._exit(2)
    except BaseException as error:
        traceback.print_exc()
        reason.send(f"process {rank}: {type(error).__name__}: {error}")
        os._exit(1)  # at once: a normal exit would wait for the others in the process group
