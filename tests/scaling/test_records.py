"""The run directory under faults: torn lines, torn files, edited specs, two claimants."""

import multiprocessing
from pathlib import Path

import pytest
from recorded import write_record
from tiny import make_spec
from waiting import until

from scaling.errors import UserError
from scaling.io import append_line, read_lines, temporary_name, write_atomic
from scaling.run.directory import RunDirectory, finished_run
from scaling.run.record import Attempt
from scaling.spec import Placement


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    spec = make_spec()
    directory = RunDirectory(tmp_path / spec.id)
    directory.create(spec, Placement(data="data"))
    return directory


def test_a_torn_last_line_is_ignored(directory: RunDirectory) -> None:
    directory.note("start", step=0)
    with directory.attempts_file.open("ab") as file:
        file.write(b'{"event":"end","ti')
    directory.note("start", step=5)
    assert [attempt.step for attempt in directory.attempts()] == [0, 5]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record.json"
    write_atomic(target, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_temporary_names_are_unique(tmp_path: Path) -> None:
    assert temporary_name(tmp_path / "plan.jsonl") != temporary_name(tmp_path / "plan.jsonl")


def test_a_file_name_with_nul_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NUL"):
        write_atomic(tmp_path / "a\0b.svg", b"")


def test_an_edited_spec_is_rejected(directory: RunDirectory) -> None:
    text = directory.spec_file.read_text()
    directory.spec_file.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="not edited in place"):
        directory.spec()


def test_an_invalid_spec_is_named(directory: RunDirectory) -> None:
    directory.spec_file.write_text("{}")
    with pytest.raises(UserError, match=r"spec\.json: not a valid RunSpec"):
        directory.spec()


def _hold(path: Path, held: object, release: object) -> None:
    with RunDirectory(path).claim():
        held.set()  # type: ignore[attr-defined]
        release.wait()  # type: ignore[attr-defined]


def test_a_claim_is_exclusive_and_ends_with_its_process(directory: RunDirectory) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(directory.path, held, release), daemon=True)
    holder.start()
    until(held.is_set, "the claim was not taken")
    assert directory.state() == "running"
    with directory.claim(wait=False) as got:
        assert not got
    holder.kill()
    holder.join()
    with directory.claim(wait=False) as got:
        assert got


def test_state_follows_from_the_files(directory: RunDirectory) -> None:
    assert directory.state() == "planned"
    directory.note("start", step=0)
    assert directory.state() == "preempted"  # started, not locked, no end: it was killed
    directory.note("end", step=3, outcome="failed", reason="because")
    assert directory.state() == "failed"
    directory.note("exit", step=3, exit_status=1, node="n1", slurm_state="FAILED")
    assert directory.state() == "failed"  # the exit of a job does not hide the reason of the attempt
    assert directory.failure() == "because"


def test_a_run_that_others_need_must_be_finished(directory: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory, and evaluation needs a finished run"):
        finished_run(RunDirectory(tmp_path / "nowhere"), purpose="evaluation")
    with pytest.raises(UserError, match="state is planned, and evaluation needs a finished run"):
        finished_run(directory, purpose="evaluation")
    write_record(directory, directory.spec(), 3.0)
    with pytest.raises(UserError, match=r"weights\.safetensors: the weights are gone, and evaluation needs them"):
        finished_run(directory, purpose="evaluation")
    assert finished_run(directory, purpose="evaluation", weights=False) == directory.record()


def test_lines_of_another_type_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    path.write_text('{"step": 3}\n')
    append_line(path, Attempt(event="start", time=0.0, host="h", pid=1, step=0))
    assert len(read_lines(path, Attempt)) == 1
