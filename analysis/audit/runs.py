"""Checks of the runs: ends of schedules, held-out losses, seeds, pairs, code, missing runs, FLOPs and time."""

from __future__ import annotations

import numpy as np

from analysis.audit import Case, Finding
from analysis.ratio.cost_metrics import TIMES


def finished(case: Case) -> Finding:
    """Only ends of schedules are compared."""
    frame = case.frame
    if "schedule_tokens" in case.used:
        early = case.used[case.used["tokens"] < 0.99 * case.used["schedule_tokens"]]
        if len(early):
            first = early.iloc[0]
            return Finding(
                "fail",
                f"{len(early)} of the runs used stopped before the end of their schedule ({first['arm']} at "
                f"{first['tokens']:.3g} of {first['schedule_tokens']:.3g} tokens), where the learning rate was still high",
                "Finish the schedules, or train runs whose schedules end there.",
            )
    if "status" in frame:
        states = frame["status"].astype(object).fillna("finished").astype(str)
        open_ = states[states.isin(["planned", "queued", "running", "preempted"])]
        if len(open_):
            found = f"{len(open_)} of {len(frame)} runs are not finished ({', '.join(sorted(set(open_)))})"
            return Finding("warn", f"{found} and were left out", "Finish them, then fit again.")
    if any("checkpoint" in out.reason for out in case.study.left_out):
        return Finding("pass", "checkpoints before the end of a run are in the table and were left out of the ratio")
    ranks = case.used.groupby(["arm", "params"])["tokens"].nunique()
    if "run" not in frame and (ranks > 3).any():
        where = ranks.reset_index().sort_values("tokens", ascending=False, kind="stable").iloc[0]
        return Finding(
            "warn",
            f"{where['arm']} has {int(ranks.max())} token counts for one size N = {where['params']:.4g} and the table has no column "
            "run: these may be points of one run before its learning rate had decayed",
            "Add a column run. Compare ends of schedules only.",
        )
    if not {"status", "schedule_tokens", "run", "step"} & set(frame.columns):
        evidence = "the table has no column that says whether a run's schedule had ended"
        return Finding("warn", evidence, "Add a column status or schedule_tokens. Compare ends of schedules only.")
    return Finding("pass", "every run that was used is in the table once, at its end")


def held_out(case: Case) -> Finding:
    """The loss is that of held-out tokens."""
    used = case.used
    remedy = "Measure every run on one fixed set of held-out tokens."
    if "loss_kind" in used and used["loss_kind"].astype(str).str.contains("train").any():
        return Finding("fail", "the column loss_kind names a training loss", remedy)
    if "train_loss" in used and used["train_loss"].notna().any():
        same = np.isclose(used["loss"], used["train_loss"], rtol=1e-9).mean()
        if same > 0.5:
            return Finding("fail", f"loss equals train_loss in {same:.0%} of the rows", remedy)
        return Finding("pass", "the table has a training loss of its own, and the fitted loss is another")
    return Finding("warn", "the table does not name the tokens on which the loss was measured", remedy)


def seeds(case: Case) -> Finding:
    """Some points were repeated with other seeds."""
    remedy = "Repeat two sizes at least with three seeds: the noise of one run sets what a ratio can mean."
    if "seed" not in case.used:
        return Finding("warn", "no column seed: no run is known to be repeated", remedy)
    points = case.used.groupby(["arm", "params", "tokens"])
    repeated = int((points["seed"].nunique() > 1).sum())
    if not repeated:
        return Finding("warn", "one seed at every point; the noise of a run was not measured", remedy)
    spread = points["loss"].std().dropna()
    note = f"; standard deviation over seeds {float(spread.median()):.4f} nats" if len(spread) else ""
    sizes = case.used.loc[case.used.groupby("params")["seed"].transform("nunique") > 1, "params"].nunique()
    if sizes < 2:
        return Finding("warn", f"seeds at one size alone{note}", remedy)
    return Finding("pass", f"{repeated} points with several seeds at {sizes} sizes{note}")


def pairs(case: Case) -> Finding:
    """Both arms saw the same tokens in the same order."""
    for comparison in case.study.comparisons:
        if comparison.paired_cells < comparison.cells:
            return Finding(
                "warn",
                f"{comparison.challenger}: {comparison.paired_cells} of {comparison.cells} cells have a run of both arms",
                "Train every cell with both arms on the same tokens in the same order.",
            )
    used = case.used
    if "manifest" in used and len({frozenset(part["manifest"].astype(str)) for _, part in used.groupby("arm")}) > 1:
        evidence = "the arms were trained on different data (column manifest)"
        return Finding("fail", evidence, "Train both on the same shards.")
    if "cell" in used and "batch_tokens" in used and (used.groupby("cell")["batch_tokens"].nunique() > 1).any():
        evidence = "batch sizes differ between the arms of a cell, and so does the order of tokens"
        return Finding("warn", evidence, "Compare at one batch size, and at each arm's best.")
    if "manifest" in used and "seed" in used:
        return Finding("pass", "same cells, same data and same seeds in both arms")
    low = min((c.correlation for c in case.study.comparisons if c.correlation is not None), default=None)
    note = f"; residuals within a cell correlate {low:.2f}" if low is not None else ""
    evidence = f"same cells in both arms{note}; the table does not say whether the tokens came in the same order"
    if low is not None and low >= 0.5:
        return Finding("pass", evidence)
    return Finding("warn", evidence, "Give cells, seeds and the data's manifest as columns.")


def code(case: Case) -> Finding:
    """All runs were trained by the same code."""
    used = case.used
    if "code" not in used or used["code"].isna().all():
        remedy = "Add a column code: a hash of the source that decides the numbers."
        return Finding("warn", "the table does not say which code trained its runs", remedy)
    counts = used.groupby(used["code"].fillna("not recorded").astype(str))["loss"].size().sort_values(ascending=False)
    if len(counts) == 1:
        return Finding("pass", f"one code trained all runs ({counts.index[0]})")
    named = ", ".join(f"{count} by {name}" for name, count in counts.items())
    return Finding(
        "warn",
        f"{len(counts)} versions of the code trained the runs: {named}",
        "Train them again with one version (scaling submit --rerun changed-code), or show that the difference changes no loss.",
    )


def diverged(case: Case) -> Finding:
    """Runs that failed are in the table."""
    bad = case.frame[(case.frame["left_out"] != "") & ~case.frame["left_out"].str.startswith("the same row")]
    if len(bad):
        counts = ", ".join(f"{arm} {count}" for arm, count in bad["arm"].value_counts(sort=False).items())
        lost = bad["left_out"].str.contains("diverged|failed").sum()
        return Finding(
            "warn" if lost else "pass",
            f"{len(bad)} runs are in the table without a usable loss ({counts}), {lost} of them diverged or failed, and are named",
            "Repeat them with the arm's next lower learning rate, or explain them in the text." if lost else "",
        )
    if "status" in case.frame:
        return Finding("pass", "the table has a column status and no run without a loss")
    remedy = "Keep every run in the table, with status diverged where there is no loss."
    return Finding("warn", "no column status: runs that diverged may have been taken out before", remedy)


def convention(case: Case) -> Finding:
    """The table names what its FLOPs count."""
    used = case.used
    ratio = (used["flops"] / (6.0 * used["params"] * used["tokens"])).to_numpy()
    others = sorted({c.label for comparison in case.study.comparisons for c in comparison.conventions})
    note = f"; the ratio is also given in {', '.join(others)}" if others else ""
    if "convention" in used and used["convention"].notna().all():
        return Finding("pass", f"named in the table: {', '.join(sorted(set(used['convention'].astype(str))))}{note}")
    if np.all(np.abs(ratio - 1.0) <= 0.01):
        if others:
            return Finding("pass", f"flops are 6 * params * tokens{note}")
        return Finding(
            "warn",
            "flops are 6 * params * tokens; the table does not name the parameters that are counted (embedding, head)",
            "Add a column convention, and columns such as flops_attention: the count has moved this ratio by a tenth.",
        )
    times = f"flops are {ratio.min():.3g} to {ratio.max():.3g} times 6 * params * tokens"
    remedy = "Add a column convention that names the count."
    return Finding("warn", f"{times}, and no column names what they count", remedy)


def time(case: Case) -> Finding:
    """A ratio in measured time is given beside the one in FLOPs."""
    if any(c.column in TIMES for comparison in case.study.comparisons for c in comparison.conventions):
        return Finding("pass", "a ratio in measured time is given beside the one in FLOPs")
    evidence = "no measured time: FLOPs of the model leave out what an optimizer itself costs"
    return Finding("warn", evidence, "Add a column seconds, measured on one kind of device.")
