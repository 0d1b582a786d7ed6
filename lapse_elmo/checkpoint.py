"""Saved models: written whole or not at all, by all ranks, readable in any world size.

A checkpoint is a folder ``step-00000123``:

``rows-00000-of-00002.h5``
    written by one rank each: for every table its contiguous share of the rows, accumulators included, as a dataset
    ``<table>`` (n, width) float32 with attribute ``first``, the number of its first row.
``dense.h5``
    ``parameters/<name>`` and, with Adagrad, ``accumulators/<name>``. Written by rank 0; all ranks hold the same.
``manifest.json``
    written last: format version, step, epoch, steps done in the epoch, world size, the resolved config, the
    vocabulary's SHA-256 and size, library versions, results, and name, size and SHA-256 of every other file.

The folder is written under a temporary name, flushed and renamed, so a folder of this name is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import Config, from_tables
from lapse_elmo.corpus.files import ErrorKeepingFile, sync_directory
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CheckpointError, ConfigError, OutputError
from lapse_elmo.metrics.versions import versions
from lapse_elmo.parameters import Parameters
from lapse_elmo.world import World

FORMAT, VERSION = "lapse-elmo checkpoint", 1
MANIFEST, DENSE = "manifest.json", "dense.h5"
FOLDER = "checkpoints"
_CHUNK_ROWS = 16384
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps in all, epochs completed, and steps done in the epoch that is under way."""

    step: int
    epoch: int
    step_in_epoch: int


def save(
    run_dir: Path,
    parameters: Parameters,
    vocabulary: Vocabulary,
    progress: Progress,
    results: dict[str, Any],
    world: World,
) -> Path:
    """Collective: write a checkpoint of settled parameters into ``run_dir``; its folder.

    :raises OutputError: if it cannot be written; nothing of it is left behind.
    """
    final = run_dir / FOLDER / f"step-{progress.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    rows = f"rows-{world.rank:05d}-of-{world.size:05d}.h5"

    def guarded(write: Any) -> Any:
        try:
            return write()
        except (OSError, RuntimeError) as error:  # HDF5 has both for a disk that refuses
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            message = f"cannot write checkpoint {final}: {reason}; free some room or choose another --run-dir"
            raise OutputError(message) from None

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_files() -> dict[str, Any]:
        files = {rows: _write_rows(partial / rows, parameters, world)}
        if world.rank == 0:
            files[DENSE] = _write_dense(partial / DENSE, parameters)
        return files

    def finish(files: dict[str, Any]) -> None:
        manifest = {
            "format": FORMAT, "version": VERSION, "step": progress.step, "epoch": progress.epoch,
            "step_in_epoch": progress.step_in_epoch, "world_size": world.size,
            "vocabulary_sha256": vocabulary.sha256, "num_classes": parameters.num_classes,
            "config": as_tables(parameters.config), "versions": versions(), "results": results, "files": files,
        }
        _write_flushed(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_directory(final.parent)

    try:
        world.agree(lambda: guarded(prepare))
        parts = world.allgather(world.together(lambda: guarded(write_files)))
        world.agree(lambda: guarded(lambda: finish({name: entry for part in parts for name, entry in part.items()})))
    except OutputError:
        if world.rank == 0:  # and on all ranks: none of them writes any more
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of the run it names."""
    if (path / MANIFEST).is_file():
        return path
    steps = sorted((path / FOLDER).glob("step-*")) if (path / FOLDER).is_dir() else []
    whole = [step for step in steps if (step / MANIFEST).is_file()]
    if not whole:
        raise CheckpointError(
            f"{path} holds no saved model (expected {FOLDER}/step-*/{MANIFEST}): give the folder of a run that has "
            "completed an epoch, or one of its checkpoints"
        )
    return whole[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, of the right size and checksum."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {manifest.get('version')}, this program reads {VERSION}")
    missing = [key for key in ("files", "config", "vocabulary_sha256", "num_classes") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it has no {missing[0]!r}; use another checkpoint")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is missing or damaged (checksum of {MANIFEST}): use another checkpoint")
    return manifest


def config_of(manifest: dict[str, Any], path: Path) -> Config:
    """The config that a checkpoint was trained with."""
    try:
        return from_tables(manifest["config"])
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path / MANIFEST} has a config that this program does not read: {error}") from None


def vocabulary_path(path: Path, config: Config) -> Path:
    """The copy of the vocabulary that a run keeps, or the file that it was trained with."""
    copy = path.parent.parent / "vocab.txt"
    return copy if copy.is_file() else Path(config.data.vocab)


def require_vocabulary(manifest: dict[str, Any], vocabulary: Vocabulary, path: Path) -> None:
    """Refuse a vocabulary that is not the model's."""
    if vocabulary.sha256 != manifest["vocabulary_sha256"]:
        raise CheckpointError(
            f"the model {path} was trained with the vocabulary of SHA-256 {manifest['vocabulary_sha256'][:16]}... "
            f"({manifest['num_classes']} classes), not with the one given, {vocabulary.sha256[:16]}... "
            f"({vocabulary.size} classes)"
        )


def restore(path: Path, manifest: dict[str, Any], parameters: Parameters, world: World) -> None:
    """Collective: fill tables, model and optimizer from a verified checkpoint, whatever world wrote it."""
    files = sorted(name for name in manifest["files"] if name.startswith("rows-"))

    def read_rows() -> None:
        for number, (table, first, file) in enumerate(_chunks(path, files, parameters)):
            if number % world.size == world.rank:
                dataset = file[table.segment.name]
                values = dataset[first : first + _CHUNK_ROWS]
                rows = np.arange(len(values)) + int(dataset.attrs["first"]) + first
                table.server.set(table.segment.keys(rows), values)

    def guarded(read: Any) -> None:
        try:
            read()
        except (OSError, KeyError) as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None

    world.together(lambda: guarded(read_rows))
    world.together(lambda: guarded(lambda: _read_dense(path / DENSE, parameters)))
    parameters.settle()


def prune(run_dir: Path, keep: set[Path]) -> None:
    """Remove the run's checkpoints that are not in ``keep``, and what unfinished saves left."""
    for folder in (run_dir / FOLDER).iterdir():
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def _chunks(path: Path, files: list[str], parameters: Parameters) -> Iterator[tuple[Any, int, h5py.File]]:
    for name in files:
        with h5py.File(path / name, "r") as file:
            for table in parameters.tables:
                for first in range(0, len(file[table.segment.name]), _CHUNK_ROWS):
                    yield table, first, file


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to write; at the end it is flushed to the disk. :raises OSError: if it could not be written."""
    with ErrorKeepingFile(path) as output:
        with h5py.File(output, "w") as file:
            yield file
        output.finish()


def _write_rows(path: Path, parameters: Parameters, world: World) -> dict[str, Any]:
    with _new_file(path) as file:
        for table in parameters.tables:
            total = table.segment.num_rows
            first, end = total * world.rank // world.size, total * (world.rank + 1) // world.size
            dataset = file.create_dataset(table.segment.name, (end - first, table.segment.width), np.float32)
            dataset.attrs["first"] = first
            for start in range(first, end, _CHUNK_ROWS):
                stop = min(start + _CHUNK_ROWS, end)
                dataset[start - first : stop - first] = table.read(start, stop).numpy()
    return _entry(path)


def _write_dense(path: Path, parameters: Parameters) -> dict[str, Any]:
    names = [name for name, _ in parameters.model.named_parameters()]
    with _new_file(path) as file:
        for name, tensor in parameters.model.named_parameters():
            file[f"parameters/{name}"] = tensor.detach().cpu().numpy()
        for name, accumulator in zip(names, parameters.dense_optimizer.accumulators, strict=False):
            file[f"accumulators/{name}"] = accumulator.cpu().numpy()
    return _entry(path)


@torch.no_grad()
def _read_dense(path: Path, parameters: Parameters) -> None:
    accumulators = parameters.dense_optimizer.accumulators
    with h5py.File(path, "r") as file:
        for number, (name, tensor) in enumerate(parameters.model.named_parameters()):
            tensor.data.copy_(torch.from_numpy(file[f"parameters/{name}"][:]))
            if accumulators:
                accumulators[number].copy_(torch.from_numpy(file[f"accumulators/{name}"][:]))


def _entry(path: Path) -> dict[str, Any]:
    """Size and checksum of a written file."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
