"""One weight of an exported model: what of ours it is made of, read from the file when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scaling.spec import ModelShape

if TYPE_CHECKING:
    from torch import Tensor


def as_it_is(*parts: Tensor) -> Tensor:
    """The one weight that it is made of."""
    return parts[0]


@dataclass(frozen=True)
class HubWeight:
    """A weight by its name on the other side."""

    name: str
    sources: tuple[str, ...]
    """Our weights, in the order that `make` takes them."""
    make: Callable[..., Tensor] = as_it_is
    expert: int | None = None
    """Of a stack of experts, which one."""

    def read(self, file: Any) -> Tensor:
        """The tensor, from an open safetensors file; of a stack only the expert's matrix is read."""
        slices = [file.get_slice(name) for name in self.sources]
        parts = [part[:] if self.expert is None else part[self.expert : self.expert + 1][0] for part in slices]
        return self.make(*parts).contiguous()

    def elements(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Numbers in it."""
        return sum(math.prod(shapes[name][0 if self.expert is None else 1 :]) for name in self.sources)


def outside_blocks(shape: ModelShape) -> list[HubWeight]:
    """Embedding, last norm and head, which all families call alike; a tied head is not written."""
    weights = [
        HubWeight("model.embed_tokens.weight", ("embedding.weight",)),
        HubWeight("model.norm.weight", ("norm.weight",)),
    ]
    return weights if shape.tied else [*weights, HubWeight("lm_head.weight", ("head.weight",))]
