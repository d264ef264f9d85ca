"""Tables with damaged or hostile cells end in an answer or in one sentence, and write into their own folder alone."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import ADAMW, MUON, ladder

from scaling.cli import main

TEXTS = (
    "", " ", "nan", "inf", "-inf", "1e308", "1e-308", "-1", "0", "1e400", "12%", "1,5", "0x10", "True", "None", "9" * 400,
    "a" * 300, "/../../../../escaped/x", "..", "../x", "a/b", "a\0b", "\x1b]0;owned\x07", "\u202eabc", "a\nb",
    "a$\\frac{$", "$\\frac{", "$$", "$x$", "_a", "a_b", "muon (lr x2)", "\\input{/etc/passwd}", "\\", "{", "}", "a&b#c%d~e^f",
    "[/bold] x", "[red]x", ":warning:", "<script>alert(1)</script>", "![x](http://x)", "a|b", "`a`", "=1+1", "muon", "adamw",
    "diverged", "6nd", "ü", "2020-01-01",
)  # fmt: skip
NAMES = (
    "arm",
    "rung",
    "cell",
    "seed",
    "run",
    "status",
    "reason",
    "convention",
    "step",
    "peak_lr",
    "seconds",
    "manifest",
)

BASE = ladder({"adamw": ADAMW, "muon": MUON}, rungs=5, shared=0.004, own=0.001).assign(
    rung=lambda f: f["cell"].str[0], run=range(10), status="finished", peak_lr=1e-3, seconds=lambda f: f["flops"] / 1e14
)

COLUMNS = tuple(BASE.columns)
CELLS = st.tuples(st.sampled_from(COLUMNS + NAMES), st.integers(0, 9), st.sampled_from(TEXTS))
WHOLE = st.tuples(st.sampled_from(COLUMNS + NAMES), st.just(None), st.sampled_from(TEXTS))
RENAMED = st.tuples(st.just("rename"), st.sampled_from(COLUMNS), st.sampled_from(TEXTS + COLUMNS))
DROPPED = st.tuples(st.just("drop"), st.sampled_from(COLUMNS), st.just(""))
ARMS = st.tuples(st.just("arms"), st.just(None), st.sampled_from(TEXTS))
CHANGES = st.lists(st.one_of(CELLS, CELLS, WHOLE, ARMS, RENAMED, DROPPED), min_size=1, max_size=3)


def changed(changes: list[tuple[str, object, str]]) -> pd.DataFrame:
    """The table with some cells, columns or names replaced."""
    frame = BASE.astype(object)
    for what, where, text in changes:
        if what == "rename":
            frame = frame.rename(columns={where: text})
        elif what == "drop":
            frame = frame.drop(columns=where, errors="ignore")
        elif what == "arms":
            if "arm" in frame:
                frame["arm"] = frame["arm"].replace("muon", text)
        else:
            frame[what] = frame.get(what, "")
            if where is None:
                frame[what] = text
            elif frame[what].ndim == 1:
                frame.loc[where, what] = text
    return frame


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, capsys: pytest.CaptureFixture[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling", *verb.split(), str(folder / "t.csv")])
    try:
        main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    else:
        status = 0
    out, error = capsys.readouterr()
    assert "\x1b" not in out + error
    assert status in (0, 2)
    assert (status == 2) == error.startswith("scaling: ")
    assert error.count("\n") <= 1
    assert len(error) < 1500
    outside = [
        path for path in folder.rglob("*") if path.name != "t.csv" and (folder / "t") not in (path, *path.parents)
    ]
    assert outside == []
    return status


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, verb=st.sampled_from(["fit --extrapolate", "compare", "fit --holdout 1", "audit", "report"]))
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_damage_ends_in_an_answer_or_a_sentence(
    changes: list[tuple[str, object, str]],
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a" / "b" / "c" / "d" / "e"
        folder.mkdir(parents=True)
        changed(changes).to_csv(folder / "t.csv", index=False)
        run(folder, monkeypatch, verb, capsys)


def hostile(folder: Path, **columns: object) -> pd.DataFrame:
    frame = BASE.assign(**columns)
    frame.to_csv(folder / "t.csv", index=False)
    return frame


def test_the_name_of_a_rung_stays_inside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b" / "c" / "d" / "e"
    folder.mkdir(parents=True)
    hostile(folder, rung="/../../../../escaped/" + BASE["rung"])
    assert run(folder, monkeypatch, "compare", capsys) == 0
    assert len(list((folder / "t" / "figures").glob("losses-*.svg"))) == 5


@pytest.mark.parametrize("arm", ["a$\\frac{$ & \\input{/etc/passwd} {#}", "[/bold] :warning: <b>|`x`", "_a_b (lr x2)"])
def test_names_of_arms_are_text_everywhere(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from analysis.data.table import check_table
    from analysis.ratio.study import fit_table
    from analysis.reporting.tables import latex, markdown
    from analysis.reporting.terminal import show

    frame = hostile(tmp_path, arm=BASE["arm"].replace("muon", arm))
    assert run(tmp_path, monkeypatch, "report", capsys) == 0
    study = fit_table(check_table(frame), resamples=20)
    show(study)
    assert arm in capsys.readouterr().out
    for text in (markdown(study), (tmp_path / "t" / "report.html").read_text()):
        assert "<b>" not in text
    tex = latex(study)
    assert "\\input" not in tex
    assert "\\frac" not in tex
    # Braces that print nothing are the only ones left unescaped, so they are balanced.
    bare = tex.replace("\\{", "").replace("\\}", "")
    assert bare.count("{") == bare.count("}")


@pytest.mark.parametrize("column", ["arm", "rung", "cell", "status"])
@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\0b", "\u202eabc"])
def test_control_characters_are_refused_where_the_table_is_read(column: str, text: str) -> None:
    from analysis.data.table import TableError, check_table

    frame = BASE.astype({column: object})
    frame.loc[3, column] = text
    with pytest.raises(TableError, match=f"column {column}, row 4: found .* without control characters") as caught:
        check_table(frame)
    assert str(caught.value).isprintable()


def test_figures_show_the_names_themselves() -> None:
    from analysis.data.table import check_table
    from analysis.figures.laws import loss_against_compute
    from analysis.figures.style import slug
    from analysis.ratio.study import fit_table

    frame = check_table(BASE.assign(arm=BASE["arm"].replace("muon", "$a$_{b}"))).frame
    legend = loss_against_compute(fit_table(frame, resamples=20), frame).axes[0].get_legend()
    assert legend is not None
    assert legend.get_texts()[1].get_text().startswith(r"\$a\$_{b}: $")
    names = ["a/b", "a:b", "a" * 300, "é" * 100, "..", "38k", "muon (lr x2)"]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in one and len(one.encode()) <= 60 and slug(one) == one for one in slugs)
    assert slug("38k") == "38k"
