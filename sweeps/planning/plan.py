"""Campaign -> runs: what is wished for, where each run lives, and what the disk already holds.

A plan trains nothing and spends nothing. It refuses what can be known beforehand: impossible shapes, budgets that the
text does not hold, a vocabulary that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from scaling.data.prepare import at_most, default_folder, prepare, prepared
from scaling.data.shards import Manifest, manifest_hash, read_manifest
from scaling.errors import ConfigError
from scaling.flops import count_parameters, train_flops
from scaling.io import write_lines
from scaling.models.registry import check_family, check_upcycled
from scaling.optim.registry import complete
from scaling.run.directory import RunDirectory
from scaling.run.record import RunState
from scaling.spec import Budget, DataSpec, OptimizerSpec, Placement, RunSpec, Schedule, Strict, WarmStart
from sweeps.config.campaign import ArmConfig, Campaign
from sweeps.config.placement import PlacementConfig
from sweeps.config.toml import as_value, located
from sweeps.planning.branches import branched
from sweeps.planning.ladder import Rung, peak_lr, rungs_of
from sweeps.planning.tuned_settings import refuse_foreign, refuse_untuned, settled, with_settings

MOST_RUNS = 100_000
"""Of one campaign: each is kept in memory, and is a directory."""


class PlannedRun(Strict, frozen=True):
    """One line of plan.jsonl. The run's state is not in it: that is read from the run's own files."""

    campaign: str
    arm: str
    rung: str
    cell: str
    """Rung and seed; the arms of one cell see the same tokens in the same order and are compared pairwise."""
    seed: int
    id: str
    spec: RunSpec
    placement: Placement

    @property
    def parameters(self) -> int:
        """Weights of the blocks: the papers' N."""
        return count_parameters(self.spec.model).blocks

    @property
    def starts_from(self) -> frozenset[str]:
        """Runs that this one starts from, by their weights or as a branch of their course."""
        initial = self.spec.warm_start.run if self.spec.warm_start else None
        return frozenset(other for other in (initial, self.spec.branch_of) if other is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that say in every table which run a row is of."""
        return {
            "campaign": self.campaign,
            "arm": self.arm,
            "rung": self.rung,
            "cell": self.cell,
            "seed": self.seed,
            "run": self.id,
        }


class CampaignPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a campaign, under one root folder.

    The root holds ``data/`` (token shards), ``runs/<id>/`` (one directory a run, shared by all campaigns that wish for
    it), ``replaced/`` (directories of runs that were trained again) and ``results/<campaign>/`` (plan, tables, report).
    """

    campaign: Campaign
    root: Path
    runs: tuple[PlannedRun, ...]
    rungs: tuple[Rung, ...]
    placements: dict[str, PlacementConfig]
    """By rung."""
    data: Path
    """Folder of the token shards."""
    manifest: Manifest | None
    """None while the data are not prepared; the ids are provisional then, for a run's id says which tokens it sees."""

    @property
    def results(self) -> Path:
        """Folder of what the campaign leaves: plan, tables, report."""
        return self.root / "results" / self.campaign.name

    @property
    def file(self) -> Path:
        """plan.jsonl."""
        return self.results / "plan.jsonl"

    @property
    def provisional(self) -> bool:
        """Whether ids will change once the data are prepared."""
        return self.manifest is None

    def directory(self, run: PlannedRun) -> RunDirectory:
        """Where a run lives."""
        return RunDirectory(self.root / "runs" / run.id)

    def state(self, run: PlannedRun) -> RunState:
        """What the run's files say now."""
        return self.directory(run).state()

    def distinct(self) -> list[PlannedRun]:
        """Runs without repetition: two arms that wish for the same run share it."""
        return list({run.id: run for run in self.runs}.values())

    def write(self) -> Path:
        """plan.jsonl, written anew."""
        write_lines(self.file, self.runs)
        return self.file


def plan(campaign: Campaign, root: Path | str) -> CampaignPlan:
    """The runs that a campaign requests.

    Args:
        campaign: As `load_campaign` gives it.
        root: Folder for data, runs and results; need not exist.

    Raises:
        ConfigError: A run cannot be as it is wished for; the sentence names file, rung and arm.
    """
    root = Path(root).resolve()
    campaign = with_settings(campaign, root)
    rungs = rungs_of(campaign)
    count = len(campaign.arms) * sum(len(rung.seeds) for rung in rungs)
    if count > MOST_RUNS:
        raise ConfigError(
            f"{campaign.file}: rungs, arms and seeds make {count:,} runs; a campaign has at most {MOST_RUNS:,}. Divide it."
        )
    tables = campaign.placement_of([rung.name for rung in rungs])
    data, manifest = _data(campaign, root, tables)
    _check_data(campaign, manifest, rungs)
    digest = manifest_hash(manifest) if manifest is not None else None
    runs: list[PlannedRun] = []
    for rung in rungs:
        for seed in rung.seeds:
            cell: dict[str, str] = {}
            for arm in campaign.arms:
                runs.append(_run(campaign, arm, rung, seed, tables[rung.name], data, digest, cell))
                cell[arm.name] = runs[-1].id
    if campaign.schedule.branches:
        runs = branched(runs)
    if manifest is not None and not campaign.untuned:
        refuse_foreign(campaign, root, runs)
    return CampaignPlan(
        campaign=campaign,
        root=root,
        runs=tuple(runs),
        rungs=tuple(rungs),
        placements=tables,
        data=data,
        manifest=manifest,
    )


def _data(campaign: Campaign, root: Path, tables: dict[str, PlacementConfig]) -> tuple[Path, Manifest | None]:
    named = {table.data for table in tables.values()}
    if len(named) > 1:
        raise ConfigError(f"{campaign.file}, [placement.rungs]: data differs between rungs. Name one folder for all.")
    folder = next(iter(named), None)
    with located(campaign.file):
        if folder is None:
            path = default_folder(campaign.data, root)
            return path, prepared(campaign.data, path)
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(
                f"[placement] data {folder}: there is no such folder. Name one with prepared token shards, "
                "or leave data out and run: scaling data prepare CAMPAIGN."
            )
        return path, read_manifest(path)


def _check_data(campaign: Campaign, manifest: Manifest | None, rungs: Iterable[Rung]) -> None:
    """Refuse runs that the data cannot serve; of data that are not prepared, by what the sizes of files say."""
    if campaign.evaluation.tokens < campaign.model.context:
        raise ConfigError(
            f"{campaign.file}, [evaluation]: tokens is {campaign.evaluation.tokens:,}, less than one sequence of context "
            f"{campaign.model.context:,}. Use a multiple of it."
        )
    if manifest is not None:
        if campaign.model.vocabulary < manifest.vocabulary:
            raise ConfigError(
                f"{campaign.file}, [model]: vocabulary is {campaign.model.vocabulary:,}, and the data's tokenizer has "
                f"{manifest.vocabulary:,} tokens. Set vocabulary = {manifest.vocabulary}, or use another tokenizer."
            )
        train, held, holds = manifest.train.tokens, manifest.validation.tokens - 1, "holds"
    else:
        with located(campaign.file):
            bounds = at_most(campaign.data)
        if bounds is None:
            return
        train, held, holds = bounds[0], bounds[1] - 1, "will hold at most"
    if campaign.evaluation.tokens > held:
        raise ConfigError(
            f"{campaign.file}, [evaluation]: tokens is {campaign.evaluation.tokens:,}, and the validation set {holds} "
            f"{held:,}. Use fewer, or hold out more with validation_fraction in [data]."
        )
    if campaign.data.repeat:
        return
    for rung in rungs:
        if rung.tokens > train:
            raise ConfigError(
                f'{campaign.file}, rung "{rung.name}": wants {rung.tokens:,} tokens, and the training set {holds} '
                f"{train:,}. Add text, shorten the run, or set repeat = true in [data]."
            )


def _run(
    campaign: Campaign,
    arm: ArmConfig,
    rung: Rung,
    seed: int,
    table: PlacementConfig,
    data: Path,
    manifest: str | None,
    cell: dict[str, str],
) -> PlannedRun:
    training, wished = campaign.training, campaign.schedule
    with located(f'{campaign.file}, rung "{rung.name}", arm "{arm.name}"'):
        shape = arm.shape_of(rung.shape)
        check_family(shape)
        if arm.warm_start is not None and arm.warm_start.how == "upcycle":
            check_upcycled(shape)
        spec = RunSpec(
            model=shape,
            budget=Budget(tokens=rung.tokens, flops=train_flops(shape, rung.tokens)),
            batch_tokens=rung.batch_tokens,
            optimizer=complete(
                OptimizerSpec(
                    name=arm.optimizer,
                    peak_lr=peak_lr(campaign, arm, rung),
                    weight_decay=training.weight_decay if arm.weight_decay is None else arm.weight_decay,
                    options=arm.options,
                )
            ),
            schedule=Schedule(
                kind=wished.kind,
                warmup_tokens=round(wished.warmup * rung.tokens),
                final_fraction=wished.final_fraction,
                decay_tokens=None if wished.decay is None else round(wished.decay * rung.tokens),
            ),
            data=DataSpec(source=campaign.data.source, manifest=manifest, repeat=campaign.data.repeat),
            evaluation=campaign.evaluation,
            seed=seed,
            precision=training.precision,
            clip_norm=training.clip_norm or None,
            warm_start=None
            if arm.warm_start is None
            else WarmStart(run=cell[arm.warm_start.arm], how=arm.warm_start.how, charged=arm.warm_start.charged),
        )
        spec = settled(spec, campaign, arm.reuse or arm.name, rung.name)
    # What rules and products gave is checked as what a file says: a spec that is planned can be read again.
    as_value(msgspec.to_builtins(spec), RunSpec, where=f'{campaign.file}, rung "{rung.name}", arm "{arm.name}"')
    placement = Placement(
        data=str(data),
        device=table.device,
        threads=table.threads,
        micro_batch=micro_batch(spec, table.micro_batch),
        compile=table.compile,
        graphs=table.graphs,
        checkpoint_seconds=table.checkpoint_seconds,
        devices=table.devices,  # in a SLURM job as many as its tasks: `sweeps.slurm.sbatch.job_placement`
        strategy=table.strategy,
        recompute=table.recompute,
    )
    return PlannedRun(
        campaign=campaign.name,
        arm=arm.name,
        rung=rung.name,
        cell=f"{rung.name}/{seed}",
        seed=seed,
        id=spec.id,
        spec=spec,
        placement=placement,
    )


def micro_batch(spec: RunSpec, at_most: int | None) -> int | None:
    """The largest part of a batch that is not above `at_most` windows and divides it."""
    windows = spec.batch_tokens // spec.model.context
    if at_most is None or at_most >= windows:
        return None
    return next(part for part in range(at_most, 0, -1) if windows % part == 0)


def with_data(planned: CampaignPlan, *, progress: bool | None = None) -> CampaignPlan:
    """The plan with its data prepared, and so with final ids; the same plan where they are.

    Raises:
        ConfigError: The text or the tokenizer cannot be used, or does not hold what the rungs want.
    """
    refuse_untuned(planned.campaign)
    if not planned.provisional:
        return planned
    prepare(planned.campaign.data, planned.data, progress=progress)
    return plan(planned.campaign, planned.root)


def count_states(planned: CampaignPlan) -> Counter[RunState]:
    """How many distinct runs are in each state."""
    return Counter(planned.state(run) for run in planned.distinct())
