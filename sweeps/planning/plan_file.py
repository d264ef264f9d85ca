"""plan.jsonl: the recorded plan of a campaign, a header line followed by one line per run.

``scaling plan`` writes the file and ``scaling submit`` executes it. The header has hashes of everything that the plan was
made from and of the other lines, so an outdated plan and an edited line are recognised.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TypeVar

import msgspec

from scaling.errors import ConfigError
from scaling.io import Strict, write_atomic
from scaling.run.provenance import CODE_ROOT

Line = TypeVar("Line", bound=msgspec.Struct)


class PlanSources(Strict, frozen=True):
    """Everything that a plan is made from, as hashes."""

    campaign: str
    """`sweeps.config.campaign.campaign_identity`: the file and ``--set``, without title and placement."""
    settings: str
    """Hyper-parameters found by tuning, or read from rule files."""
    placement: str
    """Placement of every rung, the user's SLURM profile included, and the folder of the data."""
    data: str | None
    """Manifest of the token shards; null while the data are not prepared."""
    code: str
    """`code_digest`."""


class PlanHeader(Strict, frozen=True):
    """First line of plan.jsonl."""

    file: str
    """Name of the campaign file."""
    sources: PlanSources
    sha256: str
    """SHA-256 of the lines below."""


def digest(value: object) -> str:
    """Hash of a value of plain types and structs."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:12]


@functools.cache
def code_digest() -> str:
    """Hash of the source files of ``scaling`` and ``sweeps``."""
    found = hashlib.sha256()
    for package in ("scaling", "sweeps"):
        for file in sorted((CODE_ROOT / package).rglob("*.py")):
            found.update(file.relative_to(CODE_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def write_plan(path: Path, name: str, sources: PlanSources, runs: tuple[msgspec.Struct, ...]) -> None:
    """Write plan.jsonl, one line for each run; a file with the same content is left as it is."""
    lines = b"".join(msgspec.json.encode(run) + b"\n" for run in runs)
    header = PlanHeader(file=name, sources=sources, sha256=hashlib.sha256(lines).hexdigest())
    content = msgspec.json.encode(header) + b"\n" + lines
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def read_plan(path: Path, sources: PlanSources, kind: type[Line]) -> tuple[list[Line] | None, str]:
    """The runs of plan.jsonl if the file is up to date; else None, and a sentence that says why it is not.

    Raises:
        ConfigError: The file cannot be read, or its lines were edited.
    """
    try:
        first, _, lines = path.read_bytes().partition(b"\n")
        header = msgspec.json.decode(first, type=PlanHeader)
    except FileNotFoundError:
        return None, f"{path}: there is no recorded plan yet, so the campaign was planned now."
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Move it aside and submit again.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None, f"{path}: has no header of this version, so the campaign was planned anew."
    if header.sha256 != hashlib.sha256(lines).hexdigest():
        raise ConfigError(
            f"{path}: the plan was edited or damaged: its lines no longer have the hash in its header. A plan is not "
            f"edited in place: change {header.file}, then write the plan anew with: scaling plan."
        )
    differ = [name for name in sources.__struct_fields__ if getattr(header.sources, name) != getattr(sources, name)]
    if differ:
        return None, f"{path}: made from other {', '.join(differ)} than now, so the campaign was planned anew."
    decoder = msgspec.json.Decoder(kind)
    return [decoder.decode(line) for line in lines.splitlines()], ""
