"""From campaign to headline: SLURM and the local executor give one ratio."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from cluster import Cluster
from conftest import numbers_of, wait_until_done

from analysis.data.table import read_table
from analysis.ratio.cost_metrics import TIMES
from analysis.ratio.study import Study, fit_table
from scaling.spec import as_dict
from sweeps.config.campaign import load_campaign
from sweeps.local import run_local
from sweeps.planning.plan import CampaignPlan, plan, with_data
from sweeps.reporting.collect import collect
from sweeps.slurm.submit import submit_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("no_profile")]


def quick(root: Path) -> CampaignPlan:
    """The campaign quick with a twentieth of its tokens, one seed, and without its largest rung."""
    whole = load_campaign(
        "quick",
        settings=("training.tokens_per_parameter=1", "placement.slurm.sbatch.exclusive=true"),
    )
    rungs = tuple(msgspec.structs.replace(rung, seeds=None) for rung in whole.rungs[:-1])
    return with_data(plan(msgspec.structs.replace(whole, rungs=rungs), root), progress=False)


def fitted(done: CampaignPlan) -> Study:
    """Result of ``scaling fit``."""
    collect(done)
    return fit_table(read_table(done.results / "runs.csv"))


def test_slurm_and_local_ratios_are_equal(cluster: Cluster, tmp_path: Path) -> None:
    here = run_local(quick(tmp_path / "here"), workers=2, progress=False).plan
    there = quick(tmp_path / "there")
    submission = submit_slurm(there)
    assert (len(submission.jobs), len(submission.queued)) == (1, 8)
    wait_until_done(there)
    nodes = cluster.run("sacct", "-n", "-X", "-j", submission.jobs[0], "-o", "NodeList%20").split()
    assert set(nodes) == {"node1", "node2"}
    assert numbers_of(there) == numbers_of(here)
    (one,), (other,) = fitted(here).comparisons, fitted(there).comparisons
    assert 0 < one.headline.ratio < 2
    # Prices in time, and what is remarked on clocks, are of this machine on this day.
    ours, theirs = (
        as_dict(
            msgspec.structs.replace(
                found, remarks=[], conventions=[price for price in found.conventions if price.column not in TIMES]
            )
        )
        for found in (one, other)
    )
    assert ours == theirs
