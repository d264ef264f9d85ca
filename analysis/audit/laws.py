"""Checks of the laws: position of the headline, other laws, single rungs, range of compute, convergence."""

from __future__ import annotations

import numpy as np

from analysis.audit import Case, Finding
from analysis.ratio.compare import Comparison
from analysis.ratio.formatting import compute_unit
from analysis.ratio.match import compute_law


def headline_inside(case: Case) -> Finding:
    """The headline's loss is reached by the runs of both arms."""
    beyond = [c for c in case.study.comparisons if c.headline.support != "interpolated"]
    if beyond:
        bad = [f"{c.challenger}: {c.headline.support} at loss {c.headline.loss:.4g}" for c in beyond]
        return Finding("fail", "; ".join(bad), "Train the arm that falls short until both reach the loss.")
    arrows = [d for c in case.study.comparisons for d in c.definitions if d.support != "interpolated"]
    note = f" ({', '.join(sorted({d.name for d in arrows}))}: beyond the runs, and marked so)" if arrows else ""
    return Finding("pass", f"the headline's loss is inside both arms' runs{note}")


def trends(comparison: Comparison) -> dict[str, float]:
    """Change of the ln ratio for each decade of compute over the runs, by family of laws."""
    losses = [point.loss for point in comparison.rungs]
    found = {}
    for model in comparison.models:
        laws = [compute_law(model.laws[arm]) for arm in (comparison.baseline, comparison.challenger)]
        ends = [loss for loss in (max(losses), min(losses)) if loss > max(law.floor for law in laws)]
        if len(ends) < 2 or min(law.exponent for law in laws) <= 0:
            continue
        logs = [np.log(laws[1].compute(loss) / laws[0].compute(loss)) for loss in ends]
        span = np.log10(laws[0].compute(ends[1]) / laws[0].compute(ends[0]))
        found[model.family] = float((logs[1] - logs[0]) / span) if span > 0 else 0.0
    return found


def trend_sign(case: Case) -> Finding:
    """The trend of the ratio has one sign under every law."""
    for comparison in case.study.comparisons:
        found = {key: value for key, value in trends(comparison).items() if abs(value) > 0.01}
        if found and min(found.values()) < 0 < max(found.values()):
            down, up = min(found, key=lambda k: found[k]), max(found, key=lambda k: found[k])
            return Finding(
                "warn",
                f"{comparison.challenger}: by {down} the ratio falls {-found[down]:.0%} for each decade of compute, by {up} it "
                f"rises {found[up]:.0%}; the data do not tell which",
                "Report no trend, or add rungs until one law predicts held-out rungs clearly better.",
            )
    return Finding("pass", "the ratio's trend has the same sign under every law that was tried, or there is none")


def law_spread(case: Case) -> Finding:
    """Other laws give a ratio inside the interval."""
    beyond = []
    for comparison in case.study.comparisons:
        head = comparison.headline
        ratios = [m.ratio for m in comparison.models if m.ratio is not None]
        if head.low is None or head.high is None:
            return Finding("fail", f"{comparison.challenger}: no interval: {comparison.interval}", "Add cells.")
        if ratios and (min(ratios) < head.low or max(ratios) > head.high):
            spread = f"{min(ratios):.3g} to {max(ratios):.3g}, beyond the interval {head.low:.3g} to {head.high:.3g}"
            beyond.append(f"{comparison.challenger}: other laws give {spread}")
    if beyond:
        return Finding("warn", "; ".join(beyond), "Quote the spread beside the interval.")
    return Finding("pass", "other laws give a ratio inside the interval")


def one_rung(case: Case) -> Finding:
    """No one rung carries the ratio."""
    texts = []
    for comparison in case.study.comparisons:
        head = comparison.headline
        if head.low is None or head.high is None or not comparison.jackknife:
            continue
        ratios = [(item.ratio, item.compute) for item in comparison.jackknife if item.ratio is not None]
        if len(ratios) < len(comparison.jackknife):
            evidence = "without one of the rungs the laws no longer reach the headline's loss"
            return Finding("warn", f"{comparison.challenger}: {evidence}", "Train more rungs.")
        far, compute = max(ratios, key=lambda pair: abs(np.log(pair[0] / head.ratio)))
        unit, size = compute_unit(comparison)
        text = f"{comparison.challenger}: {far:.3g} without the rung at {compute * size:.3g} {unit}, {head.ratio:.3g} with it"
        if not head.low <= far <= head.high or abs(np.log(far / head.ratio)) > np.log(1.15):
            return Finding("warn", text, "Look at the runs of that rung; repeat them with other seeds.")
        texts.append(text)
    if not texts:
        return Finding("warn", "too few rungs to leave one out", "Train at least four.")
    return Finding("pass", "; ".join(texts))


def reach(case: Case) -> Finding:
    """There are enough sizes, far enough apart."""
    reached, bad = [], False
    for arm in case.study.arms:
        flops = case.used.loc[case.used["arm"] == arm, "flops"]
        decades, points = float(np.log10(flops.max() / flops.min())), flops.round(-1).nunique()
        reached.append(f"{arm} {points} computes over {decades:.1f} decades")
        bad = bad or decades < 1.5 or points < 5
    return Finding(
        "warn" if bad else "pass",
        "; ".join(reached),
        "Train at least five sizes over a decade and a half; fewer do not separate a curve from a line." if bad else "",
    )


def converged(case: Case) -> Finding:
    """Every fit is at its minimum."""
    fits = [fit for c in case.study.comparisons for fit in c.fits.values()]
    bad = [fit for fit in fits if fit.status != "converged"]
    if bad:
        return Finding("fail", " ".join(fit.remark for fit in bad), "Use a law with fewer parameters, or add runs.")
    worst = max(fit.certificate.gap for fit in fits)
    agree = min(fit.certificate.agreeing for fit in fits)
    return Finding("pass", f"every fit is at its minimum (gap at most {worst:.0e}; {agree:.0%} of the starts agree)")
