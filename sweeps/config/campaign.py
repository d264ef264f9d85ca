"""Campaign files: what to compare (``[[arms]]``) at which sizes (``[[rungs]]``, or a ``[ladder]`` that makes them).

`load_campaign` reads a file strictly; `sweeps.planning.plan` turns a campaign into runs. The docstrings of the Structs
are the reference of the file format (`sweeps.config.reference`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from scaling.data.sources.registry import DataConfig, resolve_path
from scaling.errors import ConfigError, unknown_name
from scaling.io import (
    BatchTokens,
    Fraction,
    Layers,
    Line,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Size,
    Strict,
    read_json,
)
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.spec import Evaluation
from sweeps.config.hyperparameter_rules import rule_set
from sweeps.config.placement import PlacementConfig, Word, placements
from sweeps.config.search_space import Values
from sweeps.config.toml import as_value, located, merged, override, read_toml
from sweeps.config.toml_text import KeyPath, key_lines
from sweeps.config.tune import TuneConfig
from sweeps.config.tune import check as check_tuning

Seeds = Annotated[tuple[Seed, ...], msgspec.Meta(max_length=1000)]


class SharedModelConfig(Strict, frozen=True, kw_only=True):
    """``[model]``: the part of the model's configuration that all rungs share."""

    vocabulary: Size
    """Tokens of the vocabulary; at least those of the tokenizer."""
    context: Size
    """Tokens of one training sequence."""
    ffn_multiple: Size = 256
    """Hidden units of SwiGLU are 8/3 of the width, rounded up to a multiple of this."""
    tied: bool = False
    """Use the embedding matrix as the output head too."""
    family: str = "decoder"
    """Model family, a row of ``scaling.models.registry.FAMILIES``; an arm may have another."""
    moe: MoEConfig | None = None
    """Experts in place of the feed-forward, for a family that has them."""
    mla: MLAConfig | None = None
    """Latent attention, for a family that has it."""
    family_options: dict[str, float | int | bool | str] | None = None
    """Options that only this family has."""


class TrainingConfig(Strict, frozen=True, kw_only=True):
    """``[training]``: defaults of every rung."""

    tokens_per_parameter: PositiveFloat | None = None
    """Training tokens for each parameter of the blocks."""
    batch_tokens: BatchTokens | None = None
    """Tokens of one optimizer step, a multiple of `context`."""
    peak_lr: PositiveFloat | None = None
    """Peak learning rate; a rate of the rung or of the arm takes precedence."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward and backward pass."""
    clip_norm: NonNegativeFloat = 1.0
    """Global norm that gradients are clipped to; 0 turns clipping off."""


class RungConfig(Strict, frozen=True, kw_only=True):
    """One ``[[rungs]]``: a model size with its budget."""

    name: Word
    """Name of the rung in tables and figures."""
    layers: Layers
    """Transformer blocks."""
    width: Size
    """Channels of the residual stream, a multiple of `heads`."""
    heads: Size
    """Attention heads."""
    ffn: Size | None = None
    """Hidden units of the feed-forward, instead of those that `ffn_multiple` gives."""
    tokens: Positive | None = None
    """Training tokens; give this or `tokens_per_parameter`, here or in ``[training]``."""
    tokens_per_parameter: PositiveFloat | None = None
    """Training tokens for each parameter of the blocks."""
    batch_tokens: BatchTokens | None = None
    """Tokens of one optimizer step."""
    peak_lr: PositiveFloat | None = None
    """Peak learning rate of the arms that have none of their own."""
    seeds: Seeds | None = None
    """Seeds of this rung, instead of the campaign's."""
    printed: dict[str, Line] = msgspec.field(default_factory=dict)
    """Values as a paper prints them, shown by the plan; nothing is computed from them."""


class LadderConfig(Strict, frozen=True, kw_only=True):
    """``[ladder]``: rungs made by a rule instead of listed."""

    kind: str = "compute-optimal"
    """Kind of ladder, a row of ``sweeps.planning.ladder.LADDERS``: ``compute-optimal`` or ``isoflop``."""
    rule: str
    """Rule that splits compute into size and tokens, a row of ``sweeps.config.hyperparameter_rules``."""
    computes: Annotated[tuple[PositiveFloat, ...], msgspec.Meta(max_length=100)] = ()
    """Training FLOPs (6ND), one rung each; for ``isoflop`` one profile each."""
    sizes: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=100)] = ()
    """Instead of `computes`: parameters of the blocks, one rung each, rounded to the nearest model."""
    points: Annotated[int, msgspec.Meta(ge=3, le=25)] = 5
    """isoflop: sizes in one profile."""
    spread: Annotated[float, msgspec.Meta(gt=1.0, le=1e6)] = 3.0
    """isoflop: a profile reaches from the rule's size / spread to its size * spread."""
    head_size: Size = 64
    """Channels of an attention head."""
    width_per_layer: PositiveFloat = 128.0
    """Ratio of width to layers that models are made to; Moonlight's is 128."""


class WarmStartConfig(Strict, frozen=True, kw_only=True):
    """``[arms.warm_start]``: the arm's runs start from the weights of another arm's runs of the same rung and seed."""

    arm: Word
    """The other arm, listed before this one."""
    method: Literal["copy", "upcycle"] = "copy"
    """``copy`` takes the weights over; ``upcycle`` makes every expert a copy of the feed-forward."""
    count_flops: bool
    """Count the FLOPs of those runs as compute of this arm. Required, because it decides the answer."""


class ArmConfig(Strict, frozen=True, kw_only=True):
    """One ``[[arms]]``: a way of training."""

    name: Word
    """Name of the arm in tables and figures."""
    optimizer: str
    """Optimizer, a row of ``scaling.optim.registry.OPTIMIZERS``."""
    peak_lr: PositiveFloat | dict[str, PositiveFloat] | None = None
    """Peak learning rate, or a table of rates by rung."""
    rule: str | None = None
    """Instead of `peak_lr`: the rule, or rule file, that gives its learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay, instead of the campaign's."""
    options: dict[str, float | int | bool | str] = msgspec.field(default_factory=dict)
    """Options of the optimizer."""
    tuned: bool = False
    """Take its hyper-parameters from the studies of ``[tune]``."""
    reuse: Word | None = None
    """Take over the hyper-parameters of this tuned arm."""
    family: str | None = None
    """Model family of the arm, instead of the campaign's; the next three tables then replace those of ``[model]``."""
    moe: MoEConfig | None = None
    """Experts of the arm's models."""
    mla: MLAConfig | None = None
    """Latent attention of the arm's models."""
    family_options: dict[str, float | int | bool | str] | None = None
    """Options that only the family of the arm has."""
    warm_start: WarmStartConfig | None = None
    """Start from the weights of another arm's runs."""

    def shape_of(self, shape: ModelConfig) -> ModelConfig:
        """The model of this arm at a rung, given the rung's model."""
        if self.family is None:
            return shape
        return msgspec.structs.replace(
            shape, family=self.family, moe=self.moe, mla=self.mla, family_options=self.family_options
        )


class ScheduleConfig(Strict, frozen=True, kw_only=True):
    """``[schedule]``: the learning-rate schedule, with lengths as shares of a run's tokens."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Form of the decay; ``wsd`` is warm-up, stable, decay."""
    warmup: Fraction = 0.01
    """Share of the linear warm-up."""
    decay: Fraction | None = None
    """wsd: share of the final decay."""
    final_fraction: Fraction = 0.1
    """Learning rate at the last token, as a share of the peak."""
    branches: bool = False
    """wsd: train rungs that differ in budget alone as branches of the longest run (`sweeps.planning.branches`)."""


class CampaignFile(Strict, frozen=True, kw_only=True):
    """The whole campaign file. Keys of this table stand at the top of the file, above the first ``[table]``."""

    name: Word
    """Name of the campaign and of its folder of results."""
    title: Line = ""
    """A sentence for tables and reports."""
    extends: str | None = None
    """Campaign file beside this one, or built-in campaign, whose tables this file changes: keys replace keys, and ``[[arms]]``
    and ``[[rungs]]`` of a known name change that entry."""
    data: DataConfig
    """Text to train on."""
    model: SharedModelConfig
    """The part of the model's configuration that all rungs share."""
    arms: Annotated[tuple[ArmConfig, ...], msgspec.Meta(max_length=1000)]
    """Ways of training, at least one; a ratio needs two."""
    rungs: Annotated[tuple[RungConfig, ...], msgspec.Meta(max_length=1000)] = ()
    """Model sizes with their budgets; or use ``[ladder]``."""
    ladder: LadderConfig | None = None
    """Rule that makes the rungs."""
    training: TrainingConfig = TrainingConfig()
    """Defaults of every rung."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    evaluation: Evaluation = Evaluation()
    """Held-out evaluation."""
    seeds: Seeds = (0,)
    """Seeds of every rung: initial parameters and order of the data."""
    hyperparameters: Literal["listed", "rule"] = "listed"
    """``rule``: take tokens, batch and learning rate from the rule that `rule` names."""
    rule: str | None = None
    """Row of ``sweeps.config.hyperparameter_rules``."""
    placement: dict[str, Any] = msgspec.field(default_factory=dict)
    """Execution of runs, read by `sweeps.config.placement`; rungs may replace single fields."""
    tune: TuneConfig | None = None
    """Hyper-parameter search of the tuned arms."""


class Campaign(CampaignFile, frozen=True, kw_only=True):
    """The content of a campaign file, with values that planning adds."""

    file: str
    """Name of the file, for errors."""
    identity: str = ""
    """`campaign_identity`."""
    settings: dict[str, dict[str, Values]] = msgspec.field(default_factory=dict)
    """Hyper-parameters by arm and rung, found by tuning or given by rule files (`sweeps.planning.tuned_settings`)."""
    untuned: bool = False
    """True if `settings` are the middles of the ranges that tuning would search."""

    def placement_of(self, rungs: list[str]) -> dict[str, PlacementConfig]:
        """Placement of every rung by name, overrides applied."""
        return placements(self.placement, rungs, where=self.file, file=CampaignFile)


def built_in() -> list[str]:
    """Names of the campaigns that come with the package."""
    folder = resources.files("sweeps") / "campaigns"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_campaign(
    name_or_path: str | Path, *, hyperparameters: str | None = None, settings: Sequence[str] = ()
) -> Campaign:
    """A campaign by the name of a built-in one, or from a file.

    Relative paths in ``[data]`` are taken from the file's folder.

    Args:
        name_or_path: ``quick``, ``moonlight``, ..., or the path of a TOML file.
        hyperparameters: ``listed`` or ``rule``, instead of the file's value.
        settings: ``table.key=value`` instead of the file's values, such as ``placement.slurm.partition=short``.

    Raises:
        ConfigError: There is no such campaign, or the file has a wrong value.
    """
    path = campaign_path(name_or_path)
    tables = campaign_tables(path, settings=settings)
    if hyperparameters is not None:
        tables["hyperparameters"] = hyperparameters

    def lines() -> dict[KeyPath, int]:  # values of other files and settings have no line in this one
        return key_lines(path.read_text(encoding="utf-8-sig")) if tables == read_toml(path) else {}

    content = as_value(tables, CampaignFile, where=path.name, lines=lines)
    fields = msgspec.structs.asdict(content)
    with located(path.name):
        fields["data"] = content.data.resolved(path.parent)
    fields["arms"] = tuple(
        msgspec.structs.replace(arm, rule=str(resolve_path(path.parent, arm.rule)))
        if arm.rule is not None and arm.rule.endswith(".toml")
        else arm
        for arm in content.arms
    )
    campaign = Campaign(**fields, file=path.name, identity=campaign_identity(tables))
    _check(campaign)
    return campaign


def campaign_path(name_or_path: str | Path) -> Path:
    """The file of a campaign, given by its path or by the name of a built-in one.

    Raises:
        ConfigError: It is no path, and no built-in campaign has the name.
    """
    text = str(name_or_path)
    if Path(text).suffix or "/" in text or os.path.lexists(text):
        return Path(text)
    if text not in built_in():
        raise ConfigError(f"{unknown_name('campaign', text, built_in())} Or give the path of a campaign file.")
    return Path(str(resources.files("sweeps") / "campaigns" / f"{text}.toml"))


def campaign_tables(path: Path, *, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a campaign file, those of the files that it extends included, with ``table.key=value`` settings.

    Raises:
        ConfigError: A file cannot be read, or a chain of files leads back to one of them or into another folder.
    """
    tables, chain = read_toml(path), [path]
    while isinstance(base := tables.pop("extends", None), str):
        after = campaign_path(base if base in built_in() else path.parent / base)
        if after in chain:
            raise ConfigError(f"{path.name}: extends leads from {after.name} back to itself. Remove one of the lines.")
        if base not in built_in() and after.resolve().parent != path.resolve().parent:
            raise ConfigError(f"{path.name}: extends {base!r} lies in another folder. Copy it beside {path.name}.")
        chain.append(after)
        tables = merged(read_toml(after), tables)
    for setting in settings:
        override(tables, setting)
    return tables


def campaign_identity(tables: Mapping[str, Any]) -> str:
    """Hash of the tables of a campaign, ``--set`` applied.

    Equal for files that differ only in comments, layout, order of keys, title or ``[placement]``, which change no number.
    The folder of the file does not count, so results that were copied elsewhere still belong to the campaign.
    """
    content = {key: value for key, value in tables.items() if key not in ("title", "placement")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


COLLECTED_FILE = "campaign.json"


class Collected(Strict, frozen=True):
    """campaign.json: the campaign that a folder of results was collected from."""

    file: str
    identity: str
    """`campaign_identity`."""


def refuse_other(folder: Path, campaign: Campaign) -> None:
    """Refuse tables that were collected from another campaign, or from an earlier version of this one.

    Tables without a campaign.json are accepted.
    """
    table, file = folder / "runs.csv", folder / COLLECTED_FILE
    found = read_json(file, Collected) if table.exists() and file.exists() else None
    if found is not None and found.identity != campaign.identity:
        raise ConfigError(
            f"{table}: collected from {found.file} with another content than {campaign.file} has now. Collect again "
            f"(scaling collect), or give the folder instead of the file to read those tables: {folder}"
        )


def _check(campaign: Campaign) -> None:
    """Check rules that involve several fields."""
    where = campaign.file
    if not campaign.arms:
        raise ConfigError(f"{where}: there are no arms to train. Add [[arms]] with name and optimizer.")
    if bool(campaign.rungs) == (campaign.ladder is not None):
        found = "both [[rungs]] and [ladder]" if campaign.rungs else "neither [[rungs]] nor [ladder]"
        raise ConfigError(f"{where}: {found}. List the rungs one by one, or let one [ladder] make them.")
    if not campaign.seeds or any(rung.seeds == () for rung in campaign.rungs):
        raise ConfigError(f"{where}: a list of seeds is empty, so nothing would be trained. Write seeds = [0].")
    for table, names in (("arms", [a.name for a in campaign.arms]), ("rungs", [r.name for r in campaign.rungs])):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f'{where}, [[{table}]]: name "{twice}" is defined twice. Give each its own name.')
    if campaign.hyperparameters == "rule" and campaign.rule is None:
        raise ConfigError(f'{where}: hyperparameters = "rule" needs the name of a rule. Add: rule = "moonlight".')
    for place, name in [
        ("", campaign.rule),
        (", [ladder]", campaign.ladder.rule if campaign.ladder else None),
        *((f', [[arms]] "{arm.name}"', arm.rule) for arm in campaign.arms),
    ]:
        if name is not None:
            with located(f"{where}{place}"):
                rule_set(name)
    rungs, before = [rung.name for rung in campaign.rungs], list[str]()
    for arm in campaign.arms:
        here = f'{where}, [[arms]] "{arm.name}"'
        if arm.warm_start is not None and arm.warm_start.arm not in before:
            raise ConfigError(
                f'{here}: starts from arm "{arm.warm_start.arm}", and the arms before it are '
                f"{', '.join(before) or 'none'}. Name one of them, or move this arm down."
            )
        if arm.family is None and (arm.moe is not None or arm.mla is not None):
            raise ConfigError(
                f"{here}: has a table moe or mla and no family. "
                'Add family = "mixtral-moe" or "moonlight-moe", or put the table into [model].'
            )
        if arm.rule is not None and arm.peak_lr is not None:
            raise ConfigError(f"{here}: has both peak_lr and rule. Keep one of them.")
        for name in arm.peak_lr if isinstance(arm.peak_lr, dict) and rungs else ():
            if name not in rungs:
                raise ConfigError(f"{here}, peak_lr: {unknown_name('rung', name, rungs)}")
        before.append(arm.name)
    if campaign.schedule.branches and campaign.schedule.kind != "wsd":
        raise ConfigError(f'{where}, [schedule]: branches need kind = "wsd"; "{campaign.schedule.kind}" has no trunk.')
    check_tuning(campaign)
