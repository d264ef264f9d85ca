"""A finished run as a model that Hugging Face's ``transformers`` loads: weights, configuration, tokenizer, card.

That library is not needed to write it. Weights are copied tensor by tensor from the run's safetensors, so a model
larger than memory can be exported, and no pickle is read or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from scaling.data.shards import MANIFEST, Manifest, manifest_hash, read_manifest
from scaling.errors import UserError
from scaling.export.model_card import model_card
from scaling.export.tokenizer import tokenizer_files
from scaling.io import write_atomic
from scaling.models.hub import HubWeight
from scaling.models.registry import FAMILIES, build_model_on_meta
from scaling.run.directory import RunDirectory, finished_run
from scaling.run.record import RunRecord

SHARD_BYTES = 5_000_000_000
"""Largest weights file, the usual size on model hubs."""


def export_hf(
    run_dir: Path | str, folder: Path | str, *, data: Path | str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write a finished run as a model for ``AutoModelForCausalLM.from_pretrained(folder)``.

    The tokenizer comes from the data folder that the run was trained on, if that is still the one the record names;
    otherwise the model is written without one, and its card says so.

    Args:
        run_dir: The run.
        folder: Output folder. A second export of a run replaces the first.
        data: The data folder, if it has moved since the run.
        shard_bytes: Largest weights file; more makes several and an index.

    Returns:
        The files written.

    Raises:
        UserError: The run is not finished or diverged, its weights are not those of its shape, its family has no
            counterpart, or the folder holds something else.
    """
    directory, folder = RunDirectory(run_dir), Path(folder)
    record = finished_run(directory, purpose="the export")
    shape = record.spec.model
    hub = FAMILIES.row(shape.family).hub
    if hub is None:
        raise UserError(
            f"run {directory.path}: the model family {shape.family} has no format on the Hugging Face Hub; these have one: "
            f"{', '.join(name for name, row in FAMILIES.items() if row.hub is not None)}. Add hub to its row."
        )
    config = hub.config(shape)
    manifest, data_folder = _data(directory, record, data)
    saved = build_model_on_meta(shape).saved_tensors()
    weights = _Weights(directory.intact_weights(record), {name: tuple(tensor.shape) for name, tensor in saved.items()})
    files = {} if manifest is None else tokenizer_files(data_folder, manifest, context=shape.context)
    _clear(folder, directory.path)

    separator = None if manifest is None else manifest.tokenizer.separator
    special = {"bos_token_id": separator, "eos_token_id": separator}
    written = list(weights.write(folder, hub.weights(shape), shard_bytes))
    files["generation_config.json"] = _json({**special, "pad_token_id": separator})
    files["README.md"] = model_card(record, directory.path.name, has_tokenizer=manifest is not None).encode()
    # Last, since it is what makes a folder a model.
    files["config.json"] = _json({**config, **special, "torch_dtype": weights.dtype})
    for name, content in files.items():
        write_atomic(folder / name, content)
        written.append(folder / name)
    return written


def _data(directory: RunDirectory, record: RunRecord, data: Path | str | None) -> tuple[Manifest | None, Path]:
    """Manifest and folder of the run's data; no manifest if the folder is gone or now holds other data."""
    if data is not None:
        folder = Path(data)
        manifest = read_manifest(folder)
        if manifest_hash(manifest) != record.manifest:
            raise UserError(
                f"data folder {folder}: its shards are not those that run {directory.path} was trained on "
                f"(manifest {manifest_hash(manifest)[:12]}, the record says {record.manifest[:12]}). Name the right one."
            )
        return manifest, folder
    if not directory.placement_file.exists():
        return None, Path()
    folder = Path(directory.placement().data)
    if not (folder / MANIFEST).exists():
        return None, folder
    manifest = read_manifest(folder)
    return (manifest if manifest_hash(manifest) == record.manifest else None), folder


def _clear(folder: Path, run: Path) -> None:
    """Remove the weights of an earlier export, and refuse a folder that holds anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() == run.resolve():
        raise UserError(f"folder {folder}: it is the run's own directory. Choose another folder for the export.")
    known = {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"}
    for file in folder.iterdir():
        if file.name.startswith("model") and file.name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if file.name not in known and not file.name.endswith(".tmp"):
            raise UserError(
                f"folder {folder}: it holds {file.name}, which no export wrote. Choose an empty folder, "
                "or the folder of an earlier export."
            )
    # The configuration first, so that the folder cannot be loaded while its weights are replaced.
    (folder / "config.json").unlink(missing_ok=True)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()


class _Weights:
    """The run's weights file, checked against the shape before anything is written."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                kinds = {str(file.get_slice(name).get_dtype()) for name in found}
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}). Train the run again.") from None
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise UserError(
                    f"{path}: weight {name} is {_size(found.get(name))} and the run's shape makes it "
                    f"{_size(shapes.get(name))}. The file is of another run; put back the right one."
                )
        self.shapes = shapes
        self.bytes_each = 4 if kinds == {"F32"} else 2
        if len(kinds) != 1 or not kinds <= DTYPES.keys():
            raise UserError(
                f"{path}: weights of type {', '.join(sorted(kinds))}; known are {', '.join(DTYPES)}, one a file."
            )
        self.dtype = DTYPES[kinds.pop()]

    def write(self, folder: Path, weights: list[HubWeight], shard_bytes: int) -> Iterator[Path]:
        """Write weights under their new names, a file at a time, with an index if there are several."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        sizes = {weight.name: weight.elements(self.shapes) * self.bytes_each for weight in weights}
        shards = _shards(weights, sizes, shard_bytes)
        index: dict[str, str] = {}
        with safe_open(self.path, framework="pt") as source:
            for number, members in enumerate(shards, start=1):
                of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                path = folder / f"model{of}.safetensors"
                temporary = path.with_name(f"{path.name}.tmp")
                save_file({weight.name: weight.read(source) for weight in members}, temporary, {"format": "pt"})
                temporary.replace(path)
                index |= {weight.name: path.name for weight in members}
                yield path
        if len(shards) > 1:
            path = folder / "model.safetensors.index.json"
            write_atomic(path, _json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}))
            yield path


def _shards(weights: list[HubWeight], sizes: dict[str, int], shard_bytes: int) -> list[list[HubWeight]]:
    """Weights in order, split before the one that would not fit; one that never fits is alone in its file."""
    shards: list[list[HubWeight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + sizes[weight.name] > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += sizes[weight.name]
    return shards


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of number formats in a configuration by those of safetensors."""


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


def _json(content: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
