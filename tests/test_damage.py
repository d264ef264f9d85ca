"""Damaged run roots: the damaged run is reported, the others are unaffected, and no verb ends in a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import write_record
from tiny import BOTH_ARMS, ON_CPU, campaign_head, rung_table

from scaling import cli
from scaling.io import write_lines
from scaling.run.directory import RunDirectory
from scaling.run.record import Attempt, MetricsRow
from sweeps.config.campaign import load_campaign
from sweeps.planning.plan import plan


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def scaling(*words: str | Path) -> Ended:
    """Output and exit status of ``scaling WORDS``; an uncaught exception fails the test."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("sys.argv", ["scaling", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Ended(status, out.getvalue(), err.getvalue())


class Root(NamedTuple):
    """A root with four runs: three finished, one interrupted."""

    path: Path
    campaign: Path
    runs: tuple[str, ...]

    def file(self, run: int, name: str) -> Path:
        return self.path / "runs" / self.runs[run] / name

    def verb(self, name: str, *words: str) -> Ended:
        return scaling(name, self.campaign, "--root", self.path, *words)

    def rows(self) -> dict[str, Any]:
        """Status by run."""
        ended = self.verb("status", "--json")
        assert ended.status == 0, ended.err
        return {row["run"]: row for row in json.loads(ended.out)}

    def table(self) -> pd.DataFrame:
        """runs.csv by run."""
        ended = self.verb("collect")
        assert ended.status == 0, ended.err
        return pd.read_csv(self.path / "results" / "damaged" / "runs.csv").set_index("run")


@pytest.fixture(scope="module")
def whole(tiny_text: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Root:
    folder = tmp_path_factory.mktemp("whole")
    file, root = folder / "damaged.toml", folder / "root"
    head = campaign_head("damaged", training="tokens_per_parameter = 2").format(text=tiny_text)
    file.write_text(
        head + BOTH_ARMS + rung_table("a") + rung_table("b", width=24) + ON_CPU + f'data = "{tiny_shards}"\n'
    )
    planned = plan(load_campaign(file), root)
    for number, run in enumerate(planned.runs):
        directory = planned.directory(run)
        directory.create(run.spec, run.placement)
        directory.note("start", step=0)
        tokens = run.spec.batch_tokens
        write_lines(directory.metrics_file, [
            MetricsRow(step=step, tokens=step * tokens, flops=step, train_loss=3.0 / step, learning_rate=0.01,
                       grad_norm=1.0, tokens_per_second=100.0, mfu=None)
            for step in range(1, 4)
        ])  # fmt: skip
        if number < 3:
            write_record(directory, run.spec, 2.0 + number)
            directory.note("end", step=run.spec.steps, outcome="finished")
    return Root(root, file, tuple(run.id for run in planned.runs))


@pytest.fixture(scope="module")
def undamaged(whole: Root) -> tuple[dict[str, Any], pd.DataFrame]:
    """Status and table of the whole root."""
    return whole.rows(), whole.table()


@contextlib.contextmanager
def copy_of(root: Root) -> Iterator[Root]:
    path = root.path.with_name("copy")
    shutil.copytree(root.path, path)
    try:
        yield root._replace(path=path)
    finally:
        shutil.rmtree(path)


def cut(file: Path, at: float, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: int(at * file.stat().st_size)])


def bad_bytes(file: Path, at: float, other: Path) -> None:
    content = file.read_bytes()
    place = int(at * len(content))
    file.write_bytes(content[:place] + b"\xe9\xff" + content[place:])


def zeros(file: Path, at: float, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(at * len(content))].ljust(len(content), b"\0"))


def negative(file: Path, at: float, other: Path) -> None:
    file.write_bytes(re.sub(rb'("(?:tokens|validation_loss|6nd|step|seconds)": *)(?=\d)', rb"\1-", file.read_bytes()))


def missing(file: Path, at: float, other: Path) -> None:
    file.unlink()


def folder(file: Path, at: float, other: Path) -> None:
    file.unlink(missing_ok=True)
    (file / "inside").mkdir(parents=True)


def loop(file: Path, at: float, other: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def foreign(file: Path, at: float, other: Path) -> None:
    shutil.copyfile(other, file)


FAULTS: dict[str, Callable[[Path, float, Path], None]] = {
    fault.__name__: fault for fault in (cut, bad_bytes, zeros, negative, missing, folder, loop, foreign)
}
ANYWHERE = ("folder", "loop")
"""Faults of files that need not be there."""
FILES = ("spec.json", "placement.json", "record.json", "attempts.jsonl", "metrics.jsonl")
OTHER_FILES = ("dynamics.jsonl", "endings.jsonl", "lock", "log.txt", "checkpoint", "began", "claim")


@settings(max_examples=60, deadline=None)
@given(
    run=st.integers(0, 3),
    damage=st.one_of(
        st.tuples(st.sampled_from(FILES), st.sampled_from(sorted(FAULTS))),
        st.tuples(st.sampled_from(OTHER_FILES), st.sampled_from(ANYWHERE)),
    ),
    at=st.floats(0.0, 1.0, exclude_max=True),
)
def test_a_damaged_run_does_not_affect_others(
    whole: Root, undamaged: tuple[dict[str, Any], pd.DataFrame], run: int, damage: tuple[str, str], at: float
) -> None:
    name, fault = damage
    rows, table = undamaged
    with copy_of(whole) as root:
        file, other = root.file(run, name), root.file((run + 1) % 3, name)
        if file.exists() or fault in ANYWHERE:
            FAULTS[fault](file, at, other)
        found, collected = root.rows(), root.table()
        for verb in ("plan", "status", "clean"):
            assert root.verb(verb).status == 0
        own = whole.runs[run]
        assert {key: row for key, row in found.items() if key != own} == {k: r for k, r in rows.items() if k != own}
        pd.testing.assert_frame_equal(collected.drop(index=own), table.drop(index=own), check_dtype=False)
        damaged = found[own]
        assert damaged["state"] != "finished" or damaged["loss"] == rows[own]["loss"]
        assert damaged["state"] != "failed" or str(root.path) in damaged["reason"]


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(
        ["results", "results/damaged", "runs", "results/damaged/plan.jsonl", "results/damaged/runs.csv"]
    ),
    fault=st.sampled_from(["folder", "loop", "file"]),
    verb=st.sampled_from(["plan", "status", "collect", "fit", "clean"]),
)
def test_a_damaged_root_gives_output_or_one_sentence(whole: Root, name: str, fault: str, verb: str) -> None:
    with copy_of(whole) as root:
        place = root.path / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        if fault == "file":
            place.write_text("{")
        else:
            FAULTS[fault](place, 0.0, place)
        ended = root.verb(verb)
        assert ended.status in (0, 1, 2)
        assert ended.status != 2 or re.fullmatch(r"scaling: .+\n", ended.err), ended.err


@pytest.mark.parametrize(
    ("name", "fault", "expected"),
    [
        ("record.json", "cut", "rename the file, to record.json.damaged"),
        ("record.json", "negative", "not a valid RunRecord"),
        ("record.json", "foreign", "the record of run"),
        ("attempts.jsonl", "folder", "Is a directory"),
        ("spec.json", "foreign", "not edited in place"),
        ("spec.json", "folder", "There is a folder where a file is needed"),
    ],
)
def test_submit_reports_a_damaged_run(whole: Root, name: str, fault: str, expected: str) -> None:
    with copy_of(whole) as root:
        damaged = 3 if name != "record.json" else 2
        for run in range(4):
            if run != damaged and not root.file(run, "record.json").exists():
                write_record(RunDirectory(root.file(run, "")), RunDirectory(root.file(run, "")).spec(), 5.0)
        FAULTS[fault](root.file(damaged, name), 0.5, root.file(0, name))
        before = {file: file.read_bytes() for file in root.file(damaged, "").iterdir() if file.is_file()}
        ended = root.verb("submit")
        assert ended.status == 1
        assert "0 trained, 3 were done before, 1 failed." in ended.out
        assert re.search(rf"{root.runs[damaged]} failed: .*{re.escape(expected)}", ended.out)
        assert all(file.read_bytes() == content for file, content in before.items())


def test_a_run_continues_after_its_torn_record_is_renamed(whole: Root) -> None:
    with copy_of(whole) as root:
        record = root.file(0, "record.json")
        cut(record, 0.5, record)
        assert root.rows()[root.runs[0]]["state"] == "failed"
        record.rename(record.with_name("record.json.damaged"))
        assert root.rows()[root.runs[0]]["state"] == "preempted"


def test_an_unreadable_spec_is_written_again(whole: Root) -> None:
    with copy_of(whole) as root:
        directory = RunDirectory(root.file(0, ""))
        spec = directory.spec()
        cut(directory.spec_file, 0.5, directory.spec_file)
        directory.create(spec, directory.placement())
        assert directory.spec() == spec


def test_the_last_readable_line_is_used(whole: Root) -> None:
    with copy_of(whole) as root:
        directory = RunDirectory(root.file(3, ""))
        for file in (directory.metrics_file, directory.attempts_file):
            with file.open("ab") as log:
                log.write(b'{"st\xe9p": 1}\n')
        row = directory.last_row()
        assert row is not None
        assert row.step == 3
        assert [type(attempt) for attempt in directory.attempts()] == [Attempt]
