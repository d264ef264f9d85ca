"""Where each study begins to look: the optimizer's rows, with what the campaign says instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from scaling.errors import Refusal
from scaling.optim.search import Search
from sweeps.rules import rule
from sweeps.tomlfile import located
from sweeps.tuning.space import Dimension, Values, centred, known_searches
from sweeps.tuning.table import TuneTable

if TYPE_CHECKING:
    from sweeps.campaign import ArmTable, Campaign
    from sweeps.ladder import Rung


def middles(campaign: Campaign, rungs: Sequence[Rung]) -> dict[str, dict[str, Values]]:
    """The middle of every range by arm and rung: what a plan shows before anything was tuned."""
    return {
        arm.name: {
            rung.name: {d.name: d.at(0.5, rung.shape.context) for d in dimensions_of(campaign, arm, rung)}
            for rung in rungs
        }
        for arm in campaign.arms
        if arm.tuned
    }


def _ranging(row: Search, low: float, high: float, *, where: str) -> Search:
    """The row with another range, its limits moved where the range passes them.

    Raises:
        Refusal: The range is not in order, or the row's scale cannot hold it.
    """
    with located(where):
        return msgspec.structs.replace(row, low=low, high=high, least=min(row.least, low), most=max(row.most, high))


def dimensions_of(campaign: Campaign, arm: ArmTable, rung: Rung) -> tuple[Dimension, ...]:
    """What is searched for an arm at a rung: the optimizer's rows, with what ``[tune.search]`` says instead.

    Raises:
        Refusal: A range is not in order, or nothing is left to search.
    """
    table = campaign.tune or TuneTable()
    rows = known_searches(arm.optimizer)
    found = []
    for name, row in rows.items():
        wished = table.search.get(name)
        if table.search and wished is None:
            continue
        if name == "batch_tokens":
            # The row's range is for large models; the campaign's own batch says more.
            least, most = float(rung.shape.context), rung.tokens / 8
            low, high = max(rung.batch_tokens / 4, least), min(rung.batch_tokens * 4.0, most)
            row = msgspec.structs.replace(
                row, low=low, high=max(high, low * 1.01), least=least, most=max(most, low * 1.01)
            )
        values: tuple[float, ...] = ()
        if wished is not None and wished.low is not None and wished.high is not None:
            row = _ranging(row, wished.low, wished.high, where=f"{campaign.file}, [tune.search]")
        elif wished is not None and wished.values:
            values = wished.values
            _ranging(row, values[0], values[-1], where=f"{campaign.file}, [tune.search]")
        elif wished is not None and wished.rule is not None:
            law = getattr(rule(wished.rule), name)
            row = centred(row, law.at(compute=rung.compute, parameters=rung.parameters, tokens=rung.tokens))
        found.append(Dimension(search=row, values=values))
    if not found:
        raise Refusal(f'{campaign.file}, [tune.search]: names nothing that {arm.optimizer} of arm "{arm.name}" has.')
    return tuple(found)
