"""Initial weights from a run's file: copied, or upcycled so that every expert is a copy of the feed-forward.

Weights are read a tensor at a time into the parameters themselves, in a sharded model only the rows or experts of this
process, so that no second copy of either model exists.

Source: "Llama 3 Meets MoE", arXiv:2412.09952, Section 3: experts copied without noise, a random router, top-k before
softmax. Then the weights of a token sum to one and the first forward pass is the dense model's, to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaling.errors import UserError
from scaling.models.decoder import Decoder
from scaling.models.registry import check_upcycled

EXPERTS, ROUTER = ".experts.", ".router."


@torch.no_grad()
def load_weights(model: Decoder, file: Path, *, method: Literal["copy", "upcycle"]) -> None:
    """Fill a model, sharded or not, from a run's safetensors.

    Args:
        model: Initialised; ``upcycle`` keeps its routers.
        file: Weights of a model of the same shape, or of the dense one that ``upcycle`` starts from.
        method: ``upcycle`` makes every expert a copy of the feed-forward.

    Raises:
        UserError: The file is not whole, or belongs to a model of another shape.
    """
    from safetensors import SafetensorError, safe_open

    if method == "upcycle":
        check_upcycled(model.shape)
    sources = _sources(model, method)
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            _check(file, sources, shapes)
            for tensor, name in sources.values():
                _fill(tensor, weights.get_slice(name), shapes[name])
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}). Train that run again.") from None


def _sources(model: Decoder, method: str) -> dict[str, tuple[Tensor, str]]:
    """Tensors to fill by name, each with the name of its source in the file."""
    if method == "copy":
        return {name: (tensor, name) for name, tensor in model.saved_tensors().items()}
    # experts.gate is made from gate.weight beside it.
    return {
        name: (tensor, f"{name.replace(EXPERTS, '.')}.weight" if EXPERTS in name else name)
        for name, tensor in model.named_parameters()
        if ROUTER not in name
    }


def _check(file: Path, sources: dict[str, tuple[Tensor, str]], shapes: dict[str, tuple[int, ...]]) -> None:
    for tensor, name in sources.values():
        wanted = tuple(tensor.shape[-len(shapes[name]) :]) if name in shapes else tuple(tensor.shape)
        if shapes.get(name) != wanted:
            found = "x".join(map(str, shapes[name])) if name in shapes else "absent"
            raise UserError(
                f"{file}: weight {name} is {found}, and this run's shape makes it {'x'.join(map(str, wanted))}. "
                "Start from a run of the same layers, width, heads, feed-forward and vocabulary."
            )
    extra = sorted(shapes.keys() - {name for _, name in sources.values()})
    if extra:
        raise UserError(
            f"{file}: weight {extra[0]} is not part of this run's model. Start from a run of the same layers and family."
        )


def _fill(tensor: Tensor, source: Any, shape: tuple[int, ...]) -> None:
    """Fill one weight, or the local part of it."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(source[:].expand_as(tensor))
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    here = tensor.to_local()
    if not here.numel():
        return
    if here.ndim > len(shape):  # whole experts are sharded, and each is a copy of the source
        here.copy_(source[:].expand_as(here))
        return
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    here.copy_(source[offset[0] : offset[0] + size[0]])
