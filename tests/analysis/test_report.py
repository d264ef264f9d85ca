"""The report needs no other file, and the same values give the same bytes."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from recorded import write_record
from synthetic import ADAMW, MUON, grid, ladder
from tiny import make_spec

from analysis.data.table import check_table
from analysis.figures.laws import law_in_units
from analysis.figures.registry import FIGURES, Drawing, FigureRow
from analysis.figures.style import ARM_LABELS, look, new_figure
from analysis.fitting.laws import LAWS, LossSurface
from analysis.ratio.moonlight import moonlight_table
from analysis.ratio.study import Study, fit_table, read_study
from analysis.reporting.html import write_report
from analysis.reporting.tables import latex, markdown
from scaling.cli.tables import Report, provenance
from scaling.run.directory import RunDirectory


def test_report_is_reproducible_and_self_contained(tmp_path: Path) -> None:
    table = moonlight_table()
    frame, study = table.frame, fit_table(table)
    one, two = (write_report(study, frame, tmp_path / name) for name in ("one", "two"))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {"fits.json", "report.html", "tables.md", "tables.tex"} < {path.as_posix() for path in files}
    for file in files:
        assert (one.parent / file).read_bytes() == (two.parent / file).read_bytes(), file
    page = one.read_text()
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) <= set(ids)
    assert read_study(tmp_path / "one" / "fits.json") == study


def test_first_screen_holds_title_facts_arms_and_one_figure(tmp_path: Path) -> None:
    frame = moonlight_table().frame
    page = write_report(fit_table(frame), frame, tmp_path, title="A <title>", facts={"Commit": "abc"}).read_text()
    first = page[page.index("<body>") : page.index('class="headline"')]
    assert "<h1>A &lt;title&gt;</h1>" in first
    assert "<strong>Commit</strong> abc" in first
    assert first.count("<table>") == first.count("<figure ") == 1
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first)
    assert cells[0] == "AdamW"
    assert cells[8:10] == ["Muon", "2.3359"]
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == page.count('role="img" aria-label="') > 1


def test_provenance_comes_from_the_records(tmp_path: Path) -> None:
    spec = make_spec(manifest="f" * 64)
    write_record(RunDirectory(tmp_path / "runs" / spec.id), spec, 3.0)
    frame = pd.DataFrame({"run": [spec.id, "../x", "abc"], "manifest": ["f" * 64, None, None]})
    assert provenance(frame, tmp_path) == {
        "Date": "1970-01-01",
        "Commit": "unknown",
        "Data": f"text, manifest {'f' * 12}",
    }
    assert set(provenance(frame.drop(columns="manifest"), tmp_path / "elsewhere").values()) == {"not recorded"}


def test_published_points_belong_to_no_campaign(tmp_path: Path) -> None:
    assert Report("moonlight", root=tmp_path).campaign(moonlight_table()) is None
    kept = Path(__file__).parents[2] / "results" / "demo"
    campaign = Report(str(kept), root=tmp_path).campaign(pd.read_csv(kept / "runs.csv"))
    assert campaign is not None
    assert campaign.title == "Muon against AdamW on Python source text, byte by byte"


def test_an_outside_figure_appears_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(study: Study) -> Iterator[Drawing]:
        figure = new_figure(2.0, 1.0)
        figure.suptitle(study.baseline)
        yield Drawing(figure)

    row = FigureRow(title="Outside <figure>", caption="Drawn elsewhere.", needs=("study",), draw=draw)
    monkeypatch.setitem(FIGURES, "outside", row)
    monkeypatch.setitem(FIGURES, "unused", FigureRow(title="", caption="", needs=("forecast",), draw=draw))
    frame = moonlight_table().frame
    page = write_report(fit_table(frame), frame, tmp_path).read_text()
    assert '<figure id="outside">' in page
    assert "Outside &lt;figure&gt;" in page
    assert 'id="unused"' not in page


def test_no_two_of_seventy_arms_look_alike() -> None:
    arms = [str(number) for number in range(70)]
    looks = [look(arms, arm)[:2] for arm in arms]
    assert len(set(looks)) == len(arms)


def test_arm_labels_are_those_of_the_optimizers() -> None:
    from scaling.optim.registry import OPTIMIZERS

    assert {name: OPTIMIZERS[name].label for name in ARM_LABELS} == ARM_LABELS


def test_a_law_in_another_unit_gives_the_same_loss() -> None:
    law = law_in_units(ADAMW, 8.64e19)
    assert law.loss(3e20) == pytest.approx(ADAMW.loss(3e20 / 8.64e19), rel=1e-12)


def test_three_arms_and_training_curves(tmp_path: Path) -> None:
    laws = {"adamw": ADAMW, "muon": MUON, "soap": MUON.__class__(scale=2.55, exponent=0.054)}
    frame = check_table(ladder(laws, shared=0.003, own=0.001).assign(rung=lambda f: f["cell"])).frame
    curves = pd.DataFrame(
        [
            {"arm": arm, "rung": rung, "run": f"{arm}{rung}", "step": step, "tokens": 1e6 * step, "flops": 1e15 * step,
             "train_loss": 4.0 / step**0.1, "validation_loss": 4.1 / step**0.1 if step % 5 == 0 else np.nan}
            for arm in laws for rung in ("0-0", "1-0") for step in range(1, 20)
        ]
    )  # fmt: skip
    path = write_report(fit_table(frame), frame, tmp_path, curves=curves, title="Three <arms>")
    page = path.read_text()
    assert "Three &lt;arms&gt;" in page
    assert (tmp_path / "figures" / "curves.svg").exists()
    assert len(list((tmp_path / "figures").glob("loss-*.pdf"))) == 2


def test_a_grid_gets_valleys_and_contours(tmp_path: Path) -> None:
    surface = LAWS["surface"].example
    assert isinstance(surface, LossSurface)
    better = LossSurface(E=surface.E, A=surface.A, B=surface.B * 0.9, alpha=surface.alpha, beta=surface.beta)
    frame = check_table(grid({"adamw": surface, "muon": better}, noise=0.002)).frame
    write_report(fit_table(frame, resamples=50), frame, tmp_path)
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"loss", "ratio", "surface-adamw", "surface-muon", "valleys-adamw", "valleys-muon"}


def test_markdown_and_latex_hold_the_same_numbers() -> None:
    study = fit_table(moonlight_table())
    numbers = [set(re.findall(r"\d+\.\d+", text)) for text in (markdown(study), latex(study))]
    assert numbers[0] == numbers[1]
    assert "0.498" in numbers[0]


@pytest.mark.parametrize("small", [True, False])
def test_small_runs_are_not_compared_with_the_paper(small: bool) -> None:
    from analysis.reporting.sentences import beside_the_paper

    size = 1e-6 if small else 1.0
    laws = {"adamw": ADAMW, "muon": ADAMW.__class__(scale=ADAMW.scale * 0.2**0.054, exponent=0.054)}
    frame = ladder(laws, smallest=3e17 * size, largest=4e20 * size, shared=0.002, own=0.001)
    text = beside_the_paper(fit_table(frame).comparisons[0])
    assert len(text) == 1
    assert ("does not carry over to the scale" in text[0]) == small
