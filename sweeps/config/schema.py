"""JSON schema of the campaign file, generated from the types that read it, for editors that complete and check TOML.

    python -m sweeps.config.schema > sweeps/campaign.schema.json

A campaign names it in its first line, ``#:schema campaign.schema.json``, which taplo and the TOML extensions of editors
read. The schema checks types, bounds and names of keys; rules that involve several fields are checked by `load_campaign`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from scaling.data.sources.registry import SOURCES
from scaling.models.registry import FAMILIES
from scaling.optim.registry import OPTIMIZERS
from sweeps.config.campaign import CampaignFile
from sweeps.config.placement import PlacementConfig
from sweeps.config.reference import descriptions
from sweeps.config.reference import tables as documented_tables

REGISTRIES = (
    ("ArmConfig", "optimizer", OPTIMIZERS),
    ("ArmConfig", "family", FAMILIES),
    ("SharedModelConfig", "family", FAMILIES),
    ("DataConfig", "source", SOURCES),
)
"""Fields that name a row of a registry, which editors complete; a name with a colon is an import path."""


def campaign_schema() -> dict[str, Any]:
    """The schema of a whole campaign file, draft 2020-12, with the docstring of each key as its description."""
    (file, placement), tables = msgspec.json.schema_components(
        [CampaignFile, PlacementConfig], ref_template="#/$defs/{name}"
    )
    for documented in documented_tables().values():
        table, words = tables[documented.cls.__name__], descriptions(documented.cls)
        table["description"] = words[""]
        for name, field in table["properties"].items():
            field["description"] = words.get(name, "")
    # `rungs` of [placement] is read by hand, because a rung's table replaces single fields.
    tables["CampaignFile"]["properties"]["placement"] = placement
    tables["PlacementConfig"]["properties"]["rungs"] = {"type": "object", "additionalProperties": placement}
    for struct, field, rows in REGISTRIES:
        names = {"anyOf": [{"enum": sorted(rows)}, {"type": "string", "pattern": ":"}]}
        tables[struct]["properties"][field] |= names
        tables[struct]["properties"][field].pop("type", None)
    # A file that extends another may leave out every table.
    tables["CampaignFile"]["anyOf"] = [{"required": ["extends"]}, {"required": tables["CampaignFile"].pop("required")}]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Campaign file"}
    return {**head, **file, "$defs": {name: _portable(table) for name, table in sorted(tables.items())}}


def _portable(value: Any) -> Any:
    """The schema for editors: their regular expressions end with ``$`` alone, and TOML has no null."""
    if isinstance(value, dict):
        if isinstance(options := value.get("anyOf"), list):
            kept = [_portable(option) for option in options if option != {"type": "null"}]
            rest = {name: item for name, item in value.items() if name not in ("anyOf", "default")}
            return {**rest, **(kept[0] if len(kept) == 1 else {"anyOf": kept})}
        return {
            name: _portable(item) for name, item in value.items() if name != "default" or item not in (None, {}, ())
        }
    if isinstance(value, str):
        return value.replace(r"\Z", "$")
    return [_portable(item) for item in value] if isinstance(value, list | tuple) else value


def schema_text() -> str:
    """The schema as a JSON file."""
    return msgspec.json.format(msgspec.json.encode(campaign_schema()), indent=1).decode() + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
