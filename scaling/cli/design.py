"""The verb `design`: the expected precision of a campaign before it runs, and of changed plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.cli.common import OnCampaign, print_json, rich_table
from scaling.errors import UserError, plain, unknown_name

if TYPE_CHECKING:
    from analysis.power.forecast import DesignForecast, PlanForecast
    from analysis.power.simulate import Laws, Noise


@dataclass(frozen=True)
class Design(OnCampaign):
    """Predict the width of the match ratio's interval before running a campaign, and compare alternative designs."""

    law: str | None = None
    """Assumed laws: moonlight, chinchilla, quick, or the path of a fits.json; default: measured at the nearest compute."""
    noise: str | None = None
    """Assumed noise of ln loss: moonlight, quick, seeds-124m, or two numbers CELL,DIFFERENCE; default: as for --law."""
    baseline: str | None = None
    """Arm to compare with; default: adamw if there is one."""
    challenger: str | None = None
    """Arm to compare; default: the first other one."""
    family: str | None = None
    """Law family for the analysis of each study; default: one with a floor if the assumed laws have one."""
    lost: float = 0.0
    """Probability that a run diverges, fails or is pruned, which removes its cell from the paired comparison."""
    margin: float = 1.0
    """Ratio that the interval should exclude."""
    width: float | None = None
    """Requested width of the ratio's 95 % interval; the cheapest design that reaches it is named."""
    budget_gpu_hours: float | None = None
    """Largest cost of an alternative design; on a CPU, in hours of runs."""
    studies: int = 1000
    """Synthetic studies for the plan and for each change of it."""
    seed: int = 0
    """Seed of their noise."""
    json: bool = False
    """Print JSON with all digits."""

    def run(self) -> None:
        """Print the forecast; draw width against cost where the results of this campaign are."""
        from analysis.figures.registry import FigureInputs, save_figures
        from analysis.power.forecast import RungOption, forecast
        from scaling.run.progress import ProgressReporter
        from sweeps.planning import designs
        from sweeps.planning.cost import plan_costs

        self._check()
        plan = self.planned()
        arms = designs.two_arms(plan, self.baseline, self.challenger)
        points, planned = designs.points_of(plan, plan_costs(plan), arms)
        middle = (points[0].flops * points[-1].flops) ** 0.5
        with ProgressReporter(f"{plan.campaign.name}: synthetic studies", total=1.0) as reporter:
            answer = forecast(
                campaign=plan.campaign.name,
                arms=arms,
                points=[RungOption(p.name, p.params, p.tokens, p.flops, p.hours) for p in points],
                plan=planned.seeds,
                changed={one.name: one.seeds for one in designs.variants(points, planned)},
                searched=[one.seeds for one in designs.candidates(points)],
                laws=_laws(self.law, arms, middle),
                noise=_noise(self.noise, middle),
                family=self.family,
                lost=self.lost,
                margin=self.margin,
                wanted=self.width,
                budget=self.budget_gpu_hours,
                studies=self.studies,
                seed=self.seed,
                progress=reporter.update,
            )
        drawn = list(save_figures(FigureInputs(forecast=answer), plan.results / "figures"))
        if self.json:
            print_json(answer)
            return
        show(answer, unit="GPU-hours" if plan.placements[plan.runs[0].rung].accelerator != "cpu" else "hours of runs")
        for figure in drawn:
            print(f"Wrote {figure.file}")

    def _check(self) -> None:
        from analysis.fitting.families import LAW_FAMILIES

        ladders = [name for name, row in LAW_FAMILIES.items() if row.design == "ladder"]
        if self.family is not None and self.family not in ladders:
            raise UserError(f"--family: {unknown_name('family', self.family, ladders)}")
        if not 0.0 <= self.lost < 1.0:
            raise UserError(f"--lost: found {self.lost:g}; a probability is between 0 and 1. Give, for example, 0.05.")
        if self.studies < 20:
            raise UserError(f"--studies: found {self.studies}; estimates need 20 or more. Give 1000.")
        above_zero = {"--margin": self.margin, "--width": self.width, "--budget-gpu-hours": self.budget_gpu_hours}
        for flag, value in above_zero.items():
            if value is not None and not value > 0.0:
                raise UserError(f"{flag}: found {value:g}; it must be above 0.")


def _laws(name: str | None, arms: tuple[str, str], middle: float) -> Laws:
    from analysis.power.simulate import LAWS_ASSUMED, nearest

    if name is None:
        return LAWS_ASSUMED[nearest(LAWS_ASSUMED, middle)]
    if name in LAWS_ASSUMED:
        return LAWS_ASSUMED[name]
    if not name.endswith(".json"):
        raise UserError(f"--law: {unknown_name('law', name, LAWS_ASSUMED)} Or give the path of a fits.json.")
    from analysis.power.forecast import laws_of
    from analysis.ratio.study import read_study

    return laws_of(read_study(Path(name)), arms, name)


def _noise(text: str | None, middle: float) -> Noise:
    from analysis.power.simulate import NOISES, Noise, nearest

    if text is None:
        return NOISES[nearest(NOISES, middle)]
    if text in NOISES:
        return NOISES[text]
    try:
        cell, difference = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--noise: {unknown_name('noise', text, NOISES)} Or give two numbers, the standard deviations of ln loss "
            "that a cell shares and of the difference of its arms, as in --noise 0.0045,0.0008."
        ) from None
    if min(cell, difference) < 0.0 or difference == 0.0:
        raise UserError(f"--noise: found {text}; the first number must be 0 or above, and the second above 0.")
    return Noise(cell=cell, difference=difference, source="given on the command line")


def show(answer: DesignForecast, *, unit: str) -> None:
    """Print the forecast as tables and sentences."""
    from scaling.console import console

    to = console()
    title = f"{answer.campaign}: {answer.challenger} against {answer.baseline} as planned, {answer.studies:,} studies"
    head = ["loss of", "ratio", "width", "10-90 %", "paired line", f"excludes {answer.margin:g}", "bias", "covers"]
    rows = [
        [
            name,
            f"{row.ratio:.3f}",
            _number(row.width),
            f"{_number(row.width_low)}-{_number(row.width_high)}",
            _number(row.paired_width),
            f"{row.excludes:.0%}",
            "none" if row.bias is None else f"{row.bias:+.1%}",
            "none" if row.coverage is None else f"{row.coverage:.1%}",
        ]
        for name, row in zip(answer.rungs, answer.forecasts, strict=True)
    ]
    to.print(rich_table(head, rows, title=title))
    print(
        "width: width of the ratio's 95 % interval, median and 10th to 90th percentile over studies; paired line: width "
        "of the interval from paired differences, with the baseline's exponent as fitted; none for laws with a floor.\n"
    )
    plan = answer.plan
    rows = [
        [
            row.name,
            _number(row.width),
            "" if row.width is None or plan.width is None else f"{row.width / plan.width - 1:+.0%}",
            f"{row.hours:,.3g}",
            f"{row.hours / plan.hours - 1:+.0%}",
        ]
        for row in (plan, *answer.changed)
    ]
    head = ["design", "width", "against plan", unit, "against plan"]
    to.print(rich_table(head, rows, title=f"One thing changed, at the loss of {answer.target_rung}"))
    print()
    rows = [[row.design, _number(row.width), f"{row.hours:,.3g}"] for row in steps(answer.frontier)]
    to.print(rich_table(["rungs and seeds (x: at each)", "width", unit], rows, title="Narrowest for their cost"))
    for line in (*answer.verdict, *answer.assumptions):
        print(plain(line))


def steps(frontier: list[PlanForecast], *, gain: float = 0.85) -> list[PlanForecast]:
    """The rows of a frontier whose width is less than `gain` times that of the previous one."""
    shown: list[PlanForecast] = []
    for row in frontier:
        if not shown or (row.width or 0.0) < gain * (shown[-1].width or 0.0):
            shown.append(row)
    return shown


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}" if value < 10 else f"{value:.2g}"
