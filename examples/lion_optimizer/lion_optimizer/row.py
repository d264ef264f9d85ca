"""The row: options, parameter groups and search range. Planning reads it, so torch is imported only by the update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaling.io import Strict
from scaling.optim.options import Beta
from scaling.optim.registry import DECAY, Algorithm, GroupRule, OptimizerRecipe
from scaling.optim.search_space import SearchRange
from scaling.spec import OptimizerSpec

if TYPE_CHECKING:
    from lion_optimizer.update import Lion


class LionOptions(Strict, frozen=True):
    """Values that a campaign may set under ``options``; the defaults are the paper's."""

    beta1: Beta = 0.9
    """Interpolation between momentum and gradient whose sign is the update."""
    beta2: Beta = 0.99
    """Decay of the momentum."""


def _update() -> Lion:
    from lion_optimizer.update import Lion

    return Lion()


LION = Algorithm(name="lion", update=_update)


def _rules(options: LionOptions) -> tuple[GroupRule, ...]:
    return (GroupRule(pattern=".*", algorithm=LION),)


def _groups(spec: OptimizerSpec, options: LionOptions) -> dict[str, dict[str, Any]]:
    return {
        LION.name: {
            "lr": spec.peak_lr,
            "weight_decay": spec.weight_decay,
            "beta1": options.beta1,
            "beta2": options.beta2,
        }
    }


LION_ROW = OptimizerRecipe(
    label="Lion",
    options=LionOptions,
    rules=_rules,
    groups=_groups,
    # The paper recommends a rate 3 to 10 times below AdamW's.
    search=(SearchRange(name="peak_lr", scale="log", low=3e-5, high=3e-3, least=1e-7, most=1.0), DECAY),
)
