"""The content of tuning.json and trials.csv, gathered from trials and records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from scaling.flops import count_parameters, train_flops
from scaling.power_rule import PowerRule
from scaling.spec import RunSpec
from sweeps.config.campaign import Campaign
from sweeps.config.hyperparameter_rules import setting_at
from sweeps.config.search_space import Values
from sweeps.config.tune import TuneConfig, search_hash
from sweeps.config.tuning_results import (
    ArmTuning,
    BudgetRow,
    NoiseRow,
    OutsideRow,
    StudyResult,
    TransferResult,
    TrialResult,
    Tuning,
)
from sweeps.planning.ladder import Rung
from sweeps.planning.plan import CampaignPlan
from sweeps.tuning.budget_curve import budget_rows
from sweeps.tuning.study import TuningStudy
from sweeps.tuning.transfer import Optimum, fit_rule
from sweeps.tuning.trials import RecordCache, Trial

StudyTrials = list[tuple[TuningStudy, list[Trial]]]
"""Studies with their trials."""

Rules = dict[str, dict[str, PowerRule]]
"""Fitted rules by arm and hyper-parameter."""

ENDED = ("finished", "diverged", "pruned")
"""States of completed trials."""


def study_result(study: TuningStudy, trials: Sequence[Trial]) -> StudyResult:
    """The result of one study so far."""
    rows, flops_of_runs = [], {}
    for trial in trials:
        short = study.short_spec(trial.values)
        short_record = study.records.get(short.id) if short else None
        record = study.records.get(trial.run) if trial.state == "complete" else None
        for found in (short_record, record):
            if found is not None:
                flops_of_runs[found.spec.id] = train_flops(found.spec.model, found.tokens)
        diverged = trial.state == "complete" and record is not None and record.validation_loss is None
        rows.append(
            TrialResult(
                number=trial.number,
                values=trial.values,
                run=trial.run,
                state=("diverged" if diverged else "finished") if trial.state == "complete" else trial.state,
                loss=record.validation_loss if record else None,
                short_run=short.id if short else None,
                short_loss=short_record.validation_loss if short_record else None,
            )
        )
    finished = [row for row in rows if row.state == "finished"]
    best = min(finished, key=lambda row: (row.loss or 0.0, row.number), default=None)
    spec = study.template
    count = {state: sum(row.state == state for row in rows) for state in ("diverged", "pruned", "failed")}
    return StudyResult(
        arm=study.arm,
        rung=study.rung,
        optimizer=spec.optimizer.name,
        params=count_parameters(spec.model).blocks,
        tokens=spec.budget.tokens,
        flops=spec.budget.flops,
        planned=study.trials,
        completed=sum(row.state in ENDED for row in rows),
        failed=count["failed"],
        diverged=count["diverged"],
        pruned=count["pruned"],
        flops_spent=sum(flops_of_runs.values()),
        best_loss=best.loss if best else None,
        best_run=best.run if best else None,
        best_values=best.values if best else {},
        brackets=study.brackets(trials),
        trials=tuple(rows),
        manifest=spec.data.manifest,
        data_seed=spec.seed,
        schedule=spec.schedule.kind,
        held_out=study.held_out,
    )


def fit_rules(studies: StudyTrials, table: TuneConfig) -> Rules:
    """The rules of every arm, fitted to its rungs that are not held out."""
    found: Rules = {}
    for arm in dict.fromkeys(study.arm for study, _ in studies):
        own = [(study, study.brackets(trials)) for study, trials in studies if study.arm == arm and not study.held_out]
        if not own or not all(brackets for _, brackets in own):
            continue
        for number, dimension in enumerate(own[0][0].dimensions):
            optima = [Optimum(rung=s.rung, compute=float(s.template.budget.flops), bracket=b[number]) for s, b in own]
            rule = fit_rule(dimension.name, optima, constant=table.transfer == "constant")
            found.setdefault(arm, {})[dimension.name] = rule
    return found


def predict_setting(rules: Mapping[str, PowerRule], study: TuningStudy, compute: float) -> Values:
    """The setting that an arm's rules give at a compute, within the limits of a study's search space."""
    rows = {dimension.name: dimension for dimension in study.dimensions}
    return setting_at(rules, rows, compute=compute, context=study.template.model.context)


def transfer_specs(studies: StudyTrials, rules: Rules) -> list[tuple[TuningStudy, Values, RunSpec]]:
    """The run at the predicted setting of every held-out rung."""
    found = []
    for study, _ in studies:
        if study.held_out and study.arm in rules:
            values = predict_setting(rules[study.arm], study, float(study.template.budget.flops))
            found.append((study, values, study.spec(values)))
    return found


def gather(
    campaign: Campaign, rungs: Sequence[Rung], studies: StudyTrials, records: RecordCache, *, final: CampaignPlan | None
) -> Tuning:
    """The content of tuning.json; `final` is the campaign's own plan where settings are known, for the noise over seeds."""
    table = campaign.tune
    assert table is not None
    results = [study_result(study, trials) for study, trials in studies]
    done = bool(results) and all(row.completed >= row.planned and row.best_run is not None for row in results)
    rules = fit_rules(studies, table) if done else {}
    transfer = _transfer(studies, rules, results, records)
    complete = done and all(row.predicted_loss is not None or records.get(row.run) is not None for row in transfer)
    settings, sources = _settings(rungs, studies, results, rules) if complete else ({}, {})
    arms = _arms(campaign, results)
    return Tuning(
        campaign=campaign.name,
        sampler=table.sampler,
        sampler_seed=table.seed,
        trials=max((study.trials for study, _ in studies), default=table.trials),
        in_flight=table.in_flight,
        complete=complete,
        studies=tuple(results),
        rules=rules,
        transfer=tuple(transfer),
        settings=settings,
        sources=sources,
        arms=tuple(arms),
        budget=_budget(campaign, results) if done else (),
        outside=tuple(_outside(arms, rungs)),
        noise=tuple(_noise(final, records)) if final is not None else (),
        search=search_hash(table),
    )


def _transfer(
    studies: StudyTrials, rules: Rules, results: Sequence[StudyResult], records: RecordCache
) -> list[TransferResult]:
    best = {(row.arm, row.rung): row.best_loss for row in results}
    rows = []
    for study, values, spec in transfer_specs(studies, rules):
        record = records.get(spec.id)
        loss, tuned = record.validation_loss if record else None, best[study.arm, study.rung]
        rows.append(
            TransferResult(
                arm=study.arm,
                rung=study.rung,
                values=values,
                run=spec.id,
                predicted_loss=loss,
                tuned_loss=tuned,
                regret=None if loss is None or tuned is None else loss - tuned,
            )
        )
    return rows


def _settings(
    rungs: Sequence[Rung], studies: StudyTrials, results: Sequence[StudyResult], rules: Rules
) -> tuple[dict[str, dict[str, Values]], dict[str, dict[str, Literal["best trial", "rule"]]]]:
    """The setting of every tuned arm at every rung, and its source: the best trial where there is one, else the rules."""
    best = {(row.arm, row.rung): row.best_values for row in results if row.best_values}
    settings: dict[str, dict[str, Values]] = {}
    sources: dict[str, dict[str, Literal["best trial", "rule"]]] = {}
    first: dict[str, TuningStudy] = {}
    for study, _ in studies:
        first.setdefault(study.arm, study)
    for arm, study in first.items():
        for rung in rungs:
            if own := best.get((arm, rung.name)):
                values = own
            elif arm in rules:
                values = predict_setting(rules[arm], study, float(train_flops(rung.shape, rung.tokens)))
            else:
                continue
            settings.setdefault(arm, {})[rung.name] = values
            sources.setdefault(arm, {})[rung.name] = "best trial" if own else "rule"
    return settings, sources


def _arms(campaign: Campaign, results: Sequence[StudyResult]) -> list[ArmTuning]:
    rows = []
    for arm in campaign.arms:
        own = [row for row in results if row.arm == arm.name]
        computes = [float(row.flops) for row in results if row.arm == (arm.reuse or arm.name)]
        rows.append(
            ArmTuning(
                arm=arm.name,
                optimizer=arm.optimizer,
                how="tuned" if arm.tuned else "reused" if arm.reuse else "fixed",
                reuses=arm.reuse,
                trials=sum(row.completed for row in own),
                flops=sum(row.flops_spent for row in own),
                tuned_from=min(computes, default=None),
                tuned_to=max(computes, default=None),
            )
        )
    return rows


def _outside(arms: Sequence[ArmTuning], rungs: Sequence[Rung]) -> list[OutsideRow]:
    rows = []
    for arm in arms:
        if arm.tuned_from is None or arm.tuned_to is None:
            continue
        for rung in rungs:
            flops = train_flops(rung.shape, rung.tokens)
            times = max(flops / arm.tuned_to, arm.tuned_from / flops)
            if times > 1:
                rows.append(OutsideRow(arm=arm.arm, rung=rung.name, flops=flops, times=times))
    return rows


def _noise(final: CampaignPlan, records: RecordCache) -> list[NoiseRow]:
    losses: dict[tuple[str, str], list[float]] = {}
    for run in final.runs:
        record = records.get(run.id)
        if record is not None and record.validation_loss is not None:
            losses.setdefault((run.arm, run.rung), []).append(record.validation_loss)
    return [
        NoiseRow(arm=arm, rung=rung, seeds=len(found), mean_loss=statistics.fmean(found), sd=statistics.stdev(found))
        for (arm, rung), found in losses.items()
        if len(found) > 1
    ]


def _budget(campaign: Campaign, results: Sequence[StudyResult]) -> tuple[BudgetRow, ...]:
    tuned = [arm for arm in campaign.arms if arm.tuned]
    # The baseline is the arm that is named or optimized as AdamW, else the first tuned arm.
    baseline = next((arm for arm in tuned if "adamw" in (arm.name, arm.optimizer)), tuned[0]).name
    losses: dict[str, dict[str, list[float]]] = {}
    for study in results:
        losses.setdefault(study.arm, {})[study.rung] = [
            row.loss if row.state == "finished" and row.loss is not None else math.inf
            for row in study.trials
            if row.state in ENDED
        ]
    computes = {study.rung: float(study.flops) for study in results if study.arm == baseline}
    return budget_rows(losses, computes, baseline=baseline)


def trial_rows(tuning: Tuning, records: RecordCache) -> list[dict[str, object]]:
    """The rows of trials.csv: every trial with its number and the searched hyper-parameters.

    The other columns are those of `sweeps.reporting.collect.RUN_COLUMNS` that a trial has. A trial without a full run has
    an empty loss.
    """
    rows = []
    for study in tuning.studies:
        for trial in study.trials:
            record = records.get(trial.run)
            row: dict[str, object] = {
                "campaign": tuning.campaign,
                "arm": study.arm,
                "rung": study.rung,
                "cell": f"{study.rung}/{study.data_seed}",
                "seed": study.data_seed,
                "trial": trial.number,
                "run": trial.run,
                "status": trial.state,
                "params": study.params,
                "tokens": record.tokens if record else study.tokens,
                "flops": record.flops["6nd"] if record else study.flops,
                "loss": trial.loss,
                "train_loss": record.train_loss if record else None,
                "seconds": record.seconds if record else None,
                "peak_lr": record.spec.optimizer.peak_lr if record else trial.values.get("peak_lr"),
                "batch_tokens": record.spec.batch_tokens if record else None,
                "weight_decay": record.spec.optimizer.weight_decay if record else None,
                "manifest": study.manifest,
            }
            rows.append(row | {name: value for name, value in trial.values.items() if name not in row})
    return rows
