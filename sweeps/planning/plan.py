"""The plan of a campaign: its runs with their specs and placements, made from the campaign or read from plan.jsonl.

Planning trains nothing. It refuses every fault that can be known beforehand: impossible shapes, budgets that exceed the
data, a vocabulary smaller than the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from scaling.data.prepare import at_most, default_folder, prepare, prepared
from scaling.data.shards import Manifest, manifest_hash, read_manifest
from scaling.errors import ConfigError
from scaling.flops import count_parameters, train_flops
from scaling.io import Strict
from scaling.models.registry import check_family, check_upcycled
from scaling.optim.registry import check_strategy, complete
from scaling.run.directory import RunDirectory
from scaling.run.record import RunState
from scaling.spec import Budget, DataSpec, ExecutionConfig, OptimizerSpec, Placement, RunSpec, Schedule, WarmStart
from scaling.units import largest_divisor
from sweeps.config.campaign import ArmConfig, Campaign
from sweeps.config.placement import PlacementConfig
from sweeps.config.toml import as_value, located
from sweeps.planning.branches import branched
from sweeps.planning.ladder import Rung, peak_lr, rungs_of
from sweeps.planning.plan_file import PlanSources, code_digest, digest, read_plan, write_plan
from sweeps.planning.tuned_settings import refuse_foreign, refuse_untuned, settled, with_settings

MAX_RUNS = 100_000
"""Runs of one campaign: each takes memory and a directory."""


class PlannedRun(Strict, frozen=True):
    """One line of plan.jsonl. It has no state: the state of a run follows from the files in its directory."""

    campaign: str
    arm: str
    rung: str
    cell: str
    """Rung and seed; the arms of a cell train on the same tokens in the same order and are compared pairwise."""
    seed: int
    id: str
    spec: RunSpec
    placement: Placement

    @property
    def parameters(self) -> int:
        """Parameters of the blocks: the papers' N."""
        return count_parameters(self.spec.model).blocks

    @property
    def starts_from(self) -> frozenset[str]:
        """Ids of the runs that this one starts from, by their weights or as a branch."""
        parent = self.spec.warm_start.run if self.spec.warm_start else None
        return frozenset(other for other in (parent, self.spec.branch_of) if other is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that identify a run in every table."""
        names = ("campaign", "arm", "rung", "cell", "seed")
        return {name: getattr(self, name) for name in names} | {"run": self.id}


class CampaignPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a campaign, under one root folder.

    The root holds ``data/`` (token shards), ``runs/<id>/`` (one directory a run, shared by all campaigns that request
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
    """None while the data are not prepared; ids are provisional then, because a run's id includes a hash of its data."""

    @property
    def results(self) -> Path:
        """Folder of the campaign's plan, tables and report."""
        return self.root / "results" / self.campaign.name

    @property
    def file(self) -> Path:
        """Path of plan.jsonl."""
        return self.results / "plan.jsonl"

    @property
    def provisional(self) -> bool:
        """True while the data are not prepared: ids will change."""
        return self.manifest is None

    def directory(self, run: PlannedRun) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory(self.root / "runs" / run.id)

    def state(self, run: PlannedRun) -> RunState:
        """State of a run, from its files."""
        return self.directory(run).state()

    def distinct(self) -> list[PlannedRun]:
        """Runs without repetition: two arms that request the same run share it."""
        return list({run.id: run for run in self.runs}.values())

    def write(self) -> Path:
        """Record the plan in plan.jsonl; its path."""
        write_plan(self.file, self.campaign.file, self._sources(), self.runs)
        return self.file

    def _sources(self) -> PlanSources:
        return PlanSources(
            campaign=self.campaign.identity,
            settings=digest([self.campaign.settings, self.campaign.untuned]),
            placement=digest([self.placements, str(self.data)]),
            data=None if self.manifest is None else manifest_hash(self.manifest),
            code=code_digest(),
        )


def plan(campaign: Campaign, root: Path | str) -> CampaignPlan:
    """The runs that a campaign requests, under a root folder that need not exist.

    Raises:
        ConfigError: A run is impossible; the sentence names file, rung and arm.
    """
    empty = _without_runs(campaign, root)
    return msgspec.structs.replace(empty, runs=_runs(empty))


def recorded_plan(campaign: Campaign, root: Path | str) -> tuple[CampaignPlan, str]:
    """The plan that ``submit`` executes: plan.jsonl if it is up to date, else a new plan.

    Returns:
        The plan, and why plan.jsonl was not used: a sentence, empty if it was used.
    """
    empty = _without_runs(campaign, root)
    found, why = read_plan(empty.file, empty._sources(), PlannedRun)
    return msgspec.structs.replace(empty, runs=_runs(empty) if found is None else tuple(found)), why


def _without_runs(campaign: Campaign, root: Path | str) -> CampaignPlan:
    """A plan with everything but its runs: settings, rungs, placements and data."""
    root = Path(root).resolve()
    campaign = with_settings(campaign, root)
    rungs = rungs_of(campaign)
    count = len(campaign.arms) * sum(len(rung.seeds) for rung in rungs)
    if count > MAX_RUNS:
        raise ConfigError(
            f"{campaign.file}: rungs, arms and seeds make {count:,} runs; a campaign has at most {MAX_RUNS:,}. Divide it."
        )
    placements = campaign.placement_of([rung.name for rung in rungs])
    data, manifest = _data(campaign, root, placements)
    _check_data(campaign, manifest, rungs)
    return CampaignPlan(
        campaign=campaign,
        root=root,
        runs=(),
        rungs=tuple(rungs),
        placements=placements,
        data=data,
        manifest=manifest,
    )


def _runs(plan: CampaignPlan) -> tuple[PlannedRun, ...]:
    """Every arm at every rung and seed."""
    campaign = plan.campaign
    manifest = manifest_hash(plan.manifest) if plan.manifest is not None else None
    runs: list[PlannedRun] = []
    for rung in plan.rungs:
        for seed in rung.seeds:
            cell: dict[str, str] = {}
            for arm in campaign.arms:
                runs.append(_run(plan, arm, rung, seed, manifest, cell))
                cell[arm.name] = runs[-1].id
    if campaign.schedule.branches:
        runs = branched(runs)
    if plan.manifest is not None and not campaign.untuned:
        refuse_foreign(campaign, plan.root, runs)
    return tuple(runs)


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
    """Refuse runs that need more data than there are; the size of unprepared data is bounded by the sizes of files."""
    if campaign.evaluation.tokens < campaign.model.context:
        raise ConfigError(
            f"{campaign.file}, [evaluation]: tokens is {campaign.evaluation.tokens:,}, less than one sequence of context "
            f"{campaign.model.context:,}. Use a multiple of it."
        )
    if manifest is None:
        with located(campaign.file):
            bounds = at_most(campaign.data)
        if bounds is None:
            return
        train, held, holds = bounds[0], bounds[1] - 1, "will hold at most"
    else:
        if campaign.model.vocabulary < manifest.vocabulary:
            raise ConfigError(
                f"{campaign.file}, [model]: vocabulary is {campaign.model.vocabulary:,}, and the data's tokenizer has "
                f"{manifest.vocabulary:,} tokens. Set vocabulary = {manifest.vocabulary}, or use another tokenizer."
            )
        train, held, holds = manifest.train.tokens, manifest.validation.tokens - 1, "holds"
    if campaign.evaluation.tokens > held:
        raise ConfigError(
            f"{campaign.file}, [evaluation]: tokens is {campaign.evaluation.tokens:,}, and the validation set {holds} "
            f"{held:,}. Use fewer, or hold out more with validation_fraction in [data]."
        )
    for rung in rungs:
        if rung.tokens > train and not campaign.data.repeat:
            raise ConfigError(
                f'{campaign.file}, rung "{rung.name}": trains on {rung.tokens:,} tokens, and the training set {holds} '
                f"{train:,}. Add text, shorten the run, or set repeat = true in [data]."
            )


def _run(
    plan: CampaignPlan, arm: ArmConfig, rung: Rung, seed: int, manifest: str | None, cell: dict[str, str]
) -> PlannedRun:
    """The run of an arm at a rung; `cell` has the ids of the arms before it, by name."""
    campaign, table = plan.campaign, plan.placements[rung.name]
    training, schedule, warm_start = campaign.training, campaign.schedule, arm.warm_start
    where = f'{campaign.file}, rung "{rung.name}", arm "{arm.name}"'
    with located(where):
        shape = arm.shape_of(rung.shape)
        check_family(shape)
        if warm_start is not None and warm_start.method == "upcycle":
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
                kind=schedule.kind,
                warmup_tokens=round(schedule.warmup * rung.tokens),
                final_fraction=schedule.final_fraction,
                decay_tokens=None if schedule.decay is None else round(schedule.decay * rung.tokens),
            ),
            data=DataSpec(source=campaign.data.source, manifest=manifest, repeat=campaign.data.repeat),
            evaluation=campaign.evaluation,
            seed=seed,
            precision=training.precision,
            clip_norm=training.clip_norm or None,
            warm_start=None
            if warm_start is None
            else WarmStart(run=cell[warm_start.arm], method=warm_start.method, count_flops=warm_start.count_flops),
        )
        spec = settled(spec, campaign, arm.reuse or arm.name, rung.name)
        check_strategy(spec.optimizer, table.strategy)
    # Values from rules and products get the checks of values from a file, so that a planned spec can be read again.
    as_value(msgspec.to_builtins(spec), RunSpec, where=where)
    # `devices` of a SLURM job are set when its batch script is written (`sweeps.slurm.sbatch.job_placement`).
    shared = {name: getattr(table, name) for name in ExecutionConfig.__struct_fields__}
    shared["micro_batch"] = micro_batch(spec, table.micro_batch)
    placement = Placement(data=str(plan.data), **shared)
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
    """The largest divisor of a batch's sequences that is not above `at_most`; None for the whole batch."""
    sequences = spec.batch_tokens // spec.model.context
    return None if at_most is None or at_most >= sequences else largest_divisor(sequences, at_most)


def with_data(planned: CampaignPlan, *, progress: bool | None = None) -> CampaignPlan:
    """The plan with prepared data, and so with final ids; the same plan if its data are prepared."""
    refuse_untuned(planned.campaign)
    if not planned.provisional:
        return planned
    prepare(planned.campaign.data, planned.data, progress=progress)
    return plan(planned.campaign, planned.root)
