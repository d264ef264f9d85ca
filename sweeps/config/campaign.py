"""A campaign file: the requested runs as a researcher writes them, read strictly.

The file says what to compare (``[[arms]]``) at which sizes (``[[rungs]]`` one by one, or a ``[ladder]`` that makes
them); `sweeps.planning.plan` turns it into runs. The built-in campaigns are examples of every table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from scaling.data.sources.registry import DataConfig, beside
from scaling.errors import ConfigError, unknown_name
from scaling.io import read_json
from scaling.spec import (
    BatchTokens,
    Evaluation,
    Fraction,
    Layers,
    Line,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
    Size,
    Strict,
)
from sweeps.config.hyperparameter_rules import rule_set
from sweeps.config.placement import PlacementConfig, Word, placements
from sweeps.config.search_space import Values
from sweeps.config.toml import as_value, located, override, read_toml
from sweeps.config.tune import TuneConfig
from sweeps.config.tune import check as check_tuning

Seeds = Annotated[tuple[Seed, ...], msgspec.Meta(max_length=1000)]


class SharedModelConfig(Strict, frozen=True, kw_only=True):
    """``[model]``: what all rungs share."""

    vocabulary: Size
    context: Size
    ffn_multiple: Size = 256
    """The hidden width of SwiGLU is 8/3 of the width, rounded up to a multiple of this."""
    tied: bool = False
    family: str = "decoder"
    """Row of ``scaling.models.registry.FAMILIES``; an arm may have another."""
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None


class TrainingConfig(Strict, frozen=True, kw_only=True):
    """``[training]``: what every rung has unless it says otherwise."""

    tokens_per_parameter: PositiveFloat | None = None
    """Budget in tokens for each parameter of the blocks."""
    batch_tokens: BatchTokens | None = None
    peak_lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: NonNegativeFloat = 1.0
    """Global norm that gradients are clipped to; 0 clips nothing."""


class RungConfig(Strict, frozen=True, kw_only=True):
    """One ``[[rungs]]``: a model size with its budget."""

    name: Word
    layers: Layers
    width: Size
    heads: Size
    ffn: Size | None = None
    """Hidden units of the feed-forward, where they are not what `ffn_multiple` gives."""
    tokens: Positive | None = None
    tokens_per_parameter: PositiveFloat | None = None
    batch_tokens: BatchTokens | None = None
    peak_lr: PositiveFloat | None = None
    seeds: Seeds | None = None
    """Seeds of this rung, where it is to be repeated more or less often than the others."""
    printed: dict[str, Line] = msgspec.field(default_factory=dict)
    """Values as a paper prints them, carried along beside the true ones and never computed with."""


class LadderConfig(Strict, frozen=True, kw_only=True):
    """``[ladder]``: rungs made by a rule instead of listed."""

    kind: Literal["compute-optimal", "isoflop"] = "compute-optimal"
    rule: str
    """Row of ``sweeps.config.hyperparameter_rules.RULES`` that says how to split compute into size and tokens."""
    computes: Annotated[tuple[PositiveFloat, ...], msgspec.Meta(max_length=100)] = ()
    """Training FLOPs (6ND), one rung each; for ``isoflop`` one profile each."""
    sizes: Annotated[tuple[Positive, ...], msgspec.Meta(max_length=100)] = ()
    """Or parameters of the blocks, one rung each; each is rounded to the nearest model."""
    points: Annotated[int, msgspec.Meta(ge=3, le=25)] = 5
    """isoflop: sizes in one profile."""
    spread: Annotated[float, msgspec.Meta(gt=1.0, le=1e6)] = 3.0
    """isoflop: the profile reaches from the rule's size / spread to its size * spread."""
    head_size: Size = 64
    width_per_layer: PositiveFloat = 128.0
    """Proportion that models are made to; Moonlight's is 128."""


class WarmStartConfig(Strict, frozen=True, kw_only=True):
    """``initial`` of an arm: its runs start from the weights of another arm's runs of the same rung and seed."""

    arm: Word
    how: Literal["copy", "upcycle"] = "copy"
    charged: bool
    """Whether the FLOPs of those runs are part of this arm's compute. Without a default: it decides the answer."""


class ArmConfig(Strict, frozen=True, kw_only=True):
    """One ``[[arms]]``: a way of training. `peak_lr` is one rate, or a table of rates by rung."""

    name: Word
    optimizer: str
    peak_lr: PositiveFloat | dict[str, PositiveFloat] | None = None
    rule: str | None = None
    """Or the row of RULES that its learning rate follows."""
    weight_decay: NonNegativeFloat | None = None
    options: dict[str, float | int | bool | str] = msgspec.field(default_factory=dict)
    """Options of the optimizer, as ``scaling.optim.registry`` names them."""
    tuned: bool = False
    """Whether the studies of ``[tune]`` decide its hyper-parameters."""
    reuse: Word | None = None
    """Or the tuned arm whose hyper-parameters it takes over."""
    family: str | None = None
    """Row of FAMILIES, where the arm's models are of another than ``[model]`` says; then the next two count alone."""
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    warm_start: WarmStartConfig | None = None

    def shape_of(self, shape: ModelConfig) -> ModelConfig:
        """A rung's shape as this arm has it."""
        if self.family is None:
            return shape
        return msgspec.structs.replace(shape, family=self.family, moe=self.moe, mla=self.mla)


class ScheduleConfig(Strict, frozen=True, kw_only=True):
    """``[schedule]``: the learning rate's course, its lengths as shares of the run's tokens."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: Fraction = 0.01
    decay: Fraction | None = None
    """Share of the final decay; only wsd has it."""
    final_fraction: Fraction = 0.1
    """Share of the peak that is left at the last token."""
    branches: bool = False
    """wsd: rungs of one model with several budgets are branches of the longest (`sweeps.planning.branches`)."""


class CampaignFile(Strict, frozen=True, kw_only=True):
    """Everything that a campaign file may say."""

    name: Word
    title: Line = ""
    """A sentence for tables and reports."""
    data: DataConfig
    model: SharedModelConfig
    arms: Annotated[tuple[ArmConfig, ...], msgspec.Meta(max_length=1000)]
    rungs: Annotated[tuple[RungConfig, ...], msgspec.Meta(max_length=1000)] = ()
    ladder: LadderConfig | None = None
    training: TrainingConfig = TrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: Evaluation = Evaluation()
    seeds: Seeds = (0,)
    hyperparameters: Literal["listed", "rule"] = "listed"
    """``rule`` takes tokens, batch and learning rate from the row of RULES that `rule` names."""
    rule: str | None = None
    placement: dict[str, Any] = msgspec.field(default_factory=dict)
    """``[placement]``, read field by field in `sweeps.config.placement`."""
    tune: TuneConfig | None = None


class Campaign(CampaignFile, frozen=True, kw_only=True):
    """A campaign file and where it was read from."""

    file: str
    identity: str = ""
    """Hash of what the file and ``--set`` ask for, titles and placement left out (`campaign_identity`)."""
    settings: dict[str, dict[str, Values]] = msgspec.field(default_factory=dict)
    """Hyper-parameters of the tuned arms by arm and rung: what tuning found (`sweeps.planning.tuned_settings`)."""
    untuned: bool = False
    """Whether the settings are only the middles of what tuning would search."""

    def placement_of(self, rungs: list[str]) -> dict[str, PlacementConfig]:
        """``[placement]`` for every rung, overrides applied."""
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
        hyperparameters: ``listed`` or ``rule``, in place of what the file says.
        settings: ``table.key=value`` in place of what the file says, as in ``placement.slurm.partition=short``.

    Raises:
        ConfigError: There is no such campaign, or the file says something that cannot be; the sentence names file, table,
            field and remedy.
    """
    text = str(name_or_path)
    path = Path(text)
    if not path.suffix and "/" not in text and not os.path.lexists(text):
        if text not in built_in():
            raise ConfigError(f"{unknown_name('campaign', text, built_in())} Or give the path of a campaign file.")
        path = Path(str(resources.files("sweeps") / "campaigns" / f"{text}.toml"))
    tables = read_toml(path)
    for setting in settings:
        override(tables, setting)
    if hyperparameters is not None:
        tables["hyperparameters"] = hyperparameters
    content = as_value(tables, CampaignFile, where=path.name)
    fields = {f: getattr(content, f) for f in content.__struct_fields__}
    campaign = Campaign(**{**fields, "file": path.name, "identity": campaign_identity(tables)})
    with located(path.name):
        data = campaign.data.resolved(path.parent)
    campaign = msgspec.structs.replace(
        campaign,
        data=data,
        arms=tuple(_beside(arm, path.parent) for arm in campaign.arms),
    )
    _check(campaign)
    return campaign


def campaign_identity(tables: Mapping[str, Any]) -> str:
    """Hash of a campaign's tables as they are written, ``--set`` applied.

    Equal for files that differ only in comments, layout, order of keys, title or ``[placement]``: those change no
    number. The folder of the file does not count either, so results that were copied elsewhere still belong to it.
    """
    content = {key: value for key, value in tables.items() if key not in ("title", "placement")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


IDENTITY = "campaign.json"


class Collected(Strict, frozen=True):
    """campaign.json: the campaign whose tables lie in a folder of results."""

    file: str
    identity: str
    """`campaign_identity`."""


def refuse_other(folder: Path, campaign: Campaign) -> None:
    """Refuse to read tables that another campaign, or an earlier version of this one, left in a folder.

    Tables without a campaign.json are accepted: nothing says whose they are.

    Raises:
        ConfigError: campaign.json names another campaign.
    """
    file = folder / IDENTITY
    if (folder / "runs.csv").exists() and file.exists():
        found = read_json(file, Collected)
        if found.identity != campaign.identity:
            raise ConfigError(
                f"{folder / 'runs.csv'}: collected from {found.file} with another content than {campaign.file} has now. "
                f"Collect again (scaling collect), or name the folder instead of the file to read what is there: {folder}"
            )


def _beside(arm: ArmConfig, folder: Path) -> ArmConfig:
    """The arm, its rule file looked for beside the campaign's."""
    if arm.rule is None or not arm.rule.endswith(".toml"):
        return arm
    return msgspec.structs.replace(arm, rule=str(beside(folder, arm.rule)))


def _check(campaign: Campaign) -> None:
    """Refuse what each field alone could not know."""
    where = campaign.file
    if not campaign.arms:
        raise ConfigError(f"{where}: there are no arms, so nothing to train. Add [[arms]] with name and optimizer.")
    if bool(campaign.rungs) == (campaign.ladder is not None):
        found = "both [[rungs]] and [ladder]" if campaign.rungs else "neither [[rungs]] nor [ladder]"
        raise ConfigError(f"{where}: {found}. List the rungs one by one, or let one [ladder] make them.")
    if not campaign.seeds or any(rung.seeds == () for rung in campaign.rungs):
        raise ConfigError(f"{where}: a list of seeds is empty, so nothing would be trained. Write seeds = [0].")
    _refuse_twice([arm.name for arm in campaign.arms], f"{where}, [[arms]]: name")
    _refuse_twice([rung.name for rung in campaign.rungs], f"{where}, [[rungs]]: name")
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
    for index, arm in enumerate(campaign.arms):
        if arm.warm_start is not None and arm.warm_start.arm not in (before := [a.name for a in campaign.arms[:index]]):
            raise ConfigError(
                f'{where}, [[arms]] "{arm.name}": starts from arm "{arm.warm_start.arm}", and the arms before it are '
                f"{', '.join(before) or 'none'}. Name one of them, or move this arm down."
            )
        if arm.family is None and (arm.moe is not None or arm.mla is not None):
            raise ConfigError(
                f'{where}, [[arms]] "{arm.name}": has a table moe or mla and no family. '
                'Add family = "mixtral-moe" or "moonlight-moe", or put the table into [model].'
            )
        if arm.rule is not None and arm.peak_lr is not None:
            raise ConfigError(f'{where}, [[arms]] "{arm.name}": has both peak_lr and rule. Keep one of them.')
        if isinstance(arm.peak_lr, dict) and campaign.rungs:
            for name in arm.peak_lr:
                if name not in (known := [rung.name for rung in campaign.rungs]):
                    raise ConfigError(f'{where}, [[arms]] "{arm.name}", peak_lr: {unknown_name("rung", name, known)}')
    if campaign.schedule.branches and campaign.schedule.kind != "wsd":
        raise ConfigError(f'{where}, [schedule]: branches need kind = "wsd"; "{campaign.schedule.kind}" has no trunk.')
    check_tuning(campaign)


def _refuse_twice(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f'{what} "{name}" stands there twice. Give each its own name.')
        seen.add(name)
