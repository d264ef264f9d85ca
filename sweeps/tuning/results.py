"""How much of a gain is tuning: the match ratio if each arm had had only its first k trials.

The order in which trials were tried is chance, so it is drawn again and again. The estimator is the simplest that
needs no more than two rungs: the gap of log losses over the baseline's exponent, averaged over rungs. It says how the
ratio moves with the budget; the ratio itself is the analysis's to give.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from scaling.flops import count_parameters, train_flops
from scaling.spec import RunSpec
from sweeps.config.campaign import Campaign
from sweeps.config.search_space import Values
from sweeps.config.tune import TuneConfig, search_hash
from sweeps.config.tuning_results import (
    ArmTuning,
    BudgetRow,
    FittedRule,
    NoiseRow,
    OutsideRow,
    StudyResult,
    TransferResult,
    TrialResult,
    Tuning,
)
from sweeps.planning.ladder import Rung
from sweeps.planning.plan import CampaignPlan
from sweeps.tuning.study import RecordsOf, Trial, TuningStudy
from sweeps.tuning.transfer import Optimum, law, predict

ORDERS = 1000

Array = npt.NDArray[np.float64]


def budget_rows(
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    computes: Mapping[str, float],
    *,
    baseline: str,
    seed: int = 0,
) -> tuple[BudgetRow, ...]:
    """The ratio against the number of trials.

    Args:
        losses: Of all trials by arm and rung, nats per token; a diverged or pruned one as ``inf``.
        computes: FLOPs of one run by rung.
        baseline: The arm compared against.
        seed: Of the orders.

    Returns:
        Rows for every other arm with the same rungs; empty where there are fewer than two rungs, or the baseline's loss
        does not fall with compute.
    """
    rungs = [rung for rung in computes if rung in losses[baseline]]
    if len(rungs) < 2:
        return ()
    logs = np.log([computes[rung] for rung in rungs])
    finals = np.log([min(losses[baseline][rung]) for rung in rungs])
    exponent = -float(np.polyfit(logs, finals, 1)[0])
    if not exponent > 0:
        return ()
    rng = np.random.default_rng(seed)
    rows = []
    running = {arm: [_best_of_first(by_rung[rung], rng) for rung in rungs] for arm, by_rung in losses.items()
               if all(rung in by_rung for rung in rungs)}  # fmt: skip
    for arm, own in running.items():
        if arm == baseline:
            continue
        for against in ("equal", "full"):
            most = min(table.shape[1] for table in (*own, *running[baseline]))
            for trials in range(1, most + 1):
                challenger = [table[:, trials - 1 if against == "equal" else -1] for table in own]
                base = [table[:, trials - 1] for table in running[baseline]]
                known = np.all([np.isfinite(table) for table in (*base, *challenger)], axis=0)
                gap = np.mean([np.log(b[known] / c[known]) for b, c in zip(base, challenger, strict=True)], axis=0)
                ratios = np.exp(-gap / exponent)
                if len(ratios) < ORDERS // 2:
                    continue  # with so few trials, most orders have nothing but diverged runs at some rung
                low, middle, high = (float(q) for q in np.quantile(ratios, [0.025, 0.5, 0.975]))
                rows.append(
                    BudgetRow(
                        arm=arm,
                        baseline=baseline,
                        against="equal" if against == "equal" else "full",
                        trials=trials,
                        ratio=middle,
                        low=low,
                        high=high,
                    )
                )
    return tuple(rows)


def _best_of_first(losses: Sequence[float], rng: np.random.Generator) -> Array:
    """The best loss of the first k trials, shape ``(ORDERS, trials)``, for as many random orders."""
    values = np.array([loss if math.isfinite(loss) else np.inf for loss in losses])
    orders = rng.permuted(np.tile(values, (ORDERS, 1)), axis=1)
    best: Array = np.minimum.accumulate(orders, axis=1)
    return best


Told = list[tuple[TuningStudy, list[Trial]]]


def study_facts(study: TuningStudy, trials: Sequence[Trial], *, wanted: int) -> StudyResult:
    """What one study did."""
    rows, runs = [], {}
    for trial in trials:
        short = study.short_spec(trial.values)
        small = study.records.of(short.id) if short else None
        record = study.records.of(trial.run) if trial.state == "complete" else None
        for found in (small, record):
            if found is not None:
                runs[found.spec.id] = train_flops(found.spec.model, found.tokens)
        diverged = trial.state == "complete" and record is not None and record.validation_loss is None
        rows.append(
            TrialResult(
                number=trial.number,
                values=trial.values,
                run=trial.run,
                state={"complete": "diverged" if diverged else "finished"}.get(trial.state, trial.state),  # type: ignore[arg-type]
                loss=record.validation_loss if record else None,
                short_run=short.id if short else None,
                short_loss=small.validation_loss if small else None,
            )
        )
    finished = [row for row in rows if row.state == "finished" and row.loss is not None]
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
        wanted=wanted,
        told=sum(row.state in ("finished", "diverged", "pruned") for row in rows),
        failed=count["failed"],
        diverged=count["diverged"],
        pruned=count["pruned"],
        flops_spent=sum(runs.values()),
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


def laws_of(told: Told, table: TuneConfig) -> dict[str, tuple[FittedRule, ...]]:
    """Of every arm, from its rungs that are not held out."""
    found: dict[str, tuple[FittedRule, ...]] = {}
    for arm in dict.fromkeys(study.arm for study, _ in told):
        own = [(study, study.brackets(trials)) for study, trials in told if study.arm == arm and not study.held_out]
        if not own or not all(judged for _, judged in own):
            continue
        found[arm] = tuple(
            law(
                dimension.name,
                [
                    Optimum(rung=study.rung, compute=float(study.template.budget.flops), bracket=judged[number])
                    for study, judged in own
                ],
                seed=table.seed,
                constant=table.law == "constant",
            )
            for number, dimension in enumerate(own[0][0].dimensions)
        )
    return found


def predicted(laws: Sequence[FittedRule], study: TuningStudy, compute: float) -> Values:
    """A setting by the arm's laws."""
    return predict(laws, compute, study.dimensions, study.template.model.context)


def transfer_specs(told: Told, laws: dict[str, tuple[FittedRule, ...]]) -> list[tuple[TuningStudy, Values, RunSpec]]:
    """At every held-out rung, the run where the law points."""
    found = []
    for study, _ in told:
        if study.held_out and study.arm in laws:
            values = predicted(laws[study.arm], study, float(study.template.budget.flops))
            found.append((study, values, study.spec(values)))
    return found


def gather(
    campaign: Campaign, rungs: Sequence[Rung], told: Told, records: RecordsOf, *, final: CampaignPlan | None
) -> Tuning:
    """Everything that tuning.json says.

    Args:
        campaign: With its ``[tune]`` table.
        rungs: All of the campaign.
        told: Studies with their trials.
        records: Of all runs.
        final: The campaign's own plan where settings are known, for the noise over seeds.
    """
    table = campaign.tune
    assert table is not None
    facts = [study_facts(study, trials, wanted=study.trials) for study, trials in told]
    done = bool(facts) and all(fact.told >= fact.wanted and fact.best_run is not None for fact in facts)
    laws = laws_of(told, table) if done else {}
    transfer = _transfer(told, laws, facts, records)
    complete = done and all(row.predicted_loss is not None or records.of(row.run) is not None for row in transfer)
    settings, sources = _settings(rungs, told, facts, laws) if done else ({}, {})
    arms = _arms(campaign, facts)
    return Tuning(
        campaign=campaign.name,
        sampler=table.sampler,
        sampler_seed=table.seed,
        trials=max((study.trials for study, _ in told), default=table.trials),
        in_flight=table.in_flight,
        complete=complete,
        studies=tuple(facts),
        laws=laws,
        transfer=tuple(transfer),
        settings=settings if complete else {},
        sources=sources if complete else {},  # type: ignore[arg-type]
        arms=tuple(arms),
        budget=_budget(campaign, facts) if done else (),
        outside=tuple(_outside(arms, rungs)),
        noise=tuple(_noise(final, records)) if final is not None else (),
        search=search_hash(table),
    )


def _transfer(
    told: Told, laws: dict[str, tuple[FittedRule, ...]], facts: Sequence[StudyResult], records: RecordsOf
) -> list[TransferResult]:
    best = {(fact.arm, fact.rung): fact.best_loss for fact in facts}
    rows = []
    for study, values, spec in transfer_specs(told, laws):
        record = records.of(spec.id)
        loss, tuned = record.validation_loss if record else None, best[study.arm, study.rung]
        regret = None if loss is None or tuned is None else loss - tuned
        rows.append(
            TransferResult(
                arm=study.arm,
                rung=study.rung,
                values=values,
                run=spec.id,
                predicted_loss=loss,
                tuned_loss=tuned,
                regret=regret,
            )
        )
    return rows


def _settings(
    rungs: Sequence[Rung], told: Told, facts: Sequence[StudyResult], laws: dict[str, tuple[FittedRule, ...]]
) -> tuple[dict[str, dict[str, Values]], dict[str, dict[str, str]]]:
    best = {(fact.arm, fact.rung): fact.best_values for fact in facts}
    settings: dict[str, dict[str, Values]] = {}
    sources: dict[str, dict[str, str]] = {}
    for arm in dict.fromkeys(study.arm for study, _ in told):
        study = next(study for study, _ in told if study.arm == arm)
        for rung in rungs:
            own = best.get((arm, rung.name))
            compute = float(train_flops(rung.shape, rung.tokens))
            values = own if own else predicted(laws[arm], study, compute) if arm in laws else None
            if values is not None:
                settings.setdefault(arm, {})[rung.name] = values
                sources.setdefault(arm, {})[rung.name] = "best trial" if own else "law"
    return settings, sources


def _arms(campaign: Campaign, facts: Sequence[StudyResult]) -> list[ArmTuning]:
    rows = []
    for arm in campaign.arms:
        own = [fact for fact in facts if fact.arm == arm.name]
        from_studies = [fact for fact in facts if fact.arm == (arm.reuse or arm.name)]
        rows.append(
            ArmTuning(
                arm=arm.name,
                optimizer=arm.optimizer,
                how="tuned" if arm.tuned else "reused" if arm.reuse else "fixed",
                reuses=arm.reuse,
                trials=sum(fact.told for fact in own),
                flops=sum(fact.flops_spent for fact in own),
                tuned_from=min((float(fact.flops) for fact in from_studies), default=None),
                tuned_to=max((float(fact.flops) for fact in from_studies), default=None),
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


def _budget(campaign: Campaign, facts: Sequence[StudyResult]) -> tuple[BudgetRow, ...]:
    tuned = [arm for arm in campaign.arms if arm.tuned]
    # The baseline is the arm called or optimised as one, else the first that is tuned.
    baseline = next((arm for arm in tuned if "adamw" in (arm.name, arm.optimizer)), tuned[0]).name
    losses: dict[str, dict[str, list[float]]] = {}
    for fact in facts:
        told = [row for row in fact.trials if row.state in ("finished", "diverged", "pruned")]
        losses.setdefault(fact.arm, {})[fact.rung] = [
            row.loss if row.state == "finished" and row.loss is not None else math.inf for row in told
        ]
    computes = {fact.rung: float(fact.flops) for fact in facts if fact.arm == baseline}
    return budget_rows(losses, computes, baseline=baseline)


def _noise(final: CampaignPlan, records: RecordsOf) -> list[NoiseRow]:
    losses: dict[tuple[str, str], list[float]] = {}
    for run in final.runs:
        record = records.of(run.id)
        if record is not None and record.validation_loss is not None:
            losses.setdefault((run.arm, run.rung), []).append(record.validation_loss)
    return [
        NoiseRow(arm=arm, rung=rung, seeds=len(found), mean_loss=statistics.fmean(found), sd=statistics.stdev(found))
        for (arm, rung), found in losses.items()
        if len(found) > 1
    ]


def trial_rows(tuning: Tuning, records: RecordsOf) -> list[dict[str, object]]:
    """Every trial as a row of runs.csv, with its number and the searched hyper-parameters beside: trials.csv.

    The columns are those of `sweeps.reporting.collect.RUN_COLUMNS` that a trial has, so whatever reads a table of runs reads this
    one: all settings that were tried, the bad ones too. A trial without a full run has an empty loss.
    """
    rows = []
    for study in tuning.studies:
        for trial in study.trials:
            record = records.of(trial.run)
            rows.append(
                {
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
                | {
                    name: value
                    for name, value in trial.values.items()
                    if name not in ("peak_lr", "batch_tokens", "weight_decay")
                }
            )
    return rows
