"""The files of a checkpoint: a copy of what a rank saves, writing it without holding training up, reading it back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from lapse_elmo.checkpoint.manifest import DENSE, Manifest, rank_file, sha256_of
from lapse_elmo.corpus.files import H5_ERRORS, ErrorKeepingFile
from lapse_elmo.cursor import Position, SavedCursor
from lapse_elmo.errors import CheckpointError
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.tables import RowTable

_CHUNK_ROWS = 16384
_BLOCK_BYTES = 1 << 22


@dataclass
class Snapshot:
    """A rank's share of the state, copied while all ranks stood still; its memory is used again by the next one.

    :ivar tables: (row numbers, rows) by table. :ivar dense: arrays by their name in ``dense.h5``, on rank 0.
    :ivar sentences: (this worker's, what is left of them) within an epoch.
    """

    tables: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    sentences: tuple[np.ndarray, np.ndarray] | None = None

    def take(self, parameters: Parameters, sentences: tuple[np.ndarray, np.ndarray] | None, world: World) -> None:
        """Collective: copy this rank's share; all ranks have copied theirs on return."""
        parameters.sync_parameters()
        owned = {table.segment.name: parameters.server.owned_rows(table.segment.name) for table in parameters.tables}
        for table in parameters.tables:
            segment = table.segment
            rows = owned[segment.name]
            old = self.tables.get(segment.name)
            shape = rows.size, segment.row_width
            values = old[1] if old and len(old[1]) == rows.size else np.empty(shape, np.float32)
            for start in range(0, rows.size, _CHUNK_ROWS):
                end = start + _CHUNK_ROWS
                table.server.pull_rows(segment.keys(rows[start:end]), values[start:end])
                world.progress.made()
            self.tables[segment.name] = rows, values
        self.dense = _dense_arrays(parameters) if world.rank == 0 else {}
        self.sentences = sentences
        parameters.server.barrier()


def write_rank_file(path: Path, snapshot: Snapshot, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Write a rank's share; its size and checksum. :raises OSError: if it cannot be written."""
    arrays: dict[str, np.ndarray] = {}
    for name, (rows, values) in snapshot.tables.items():
        arrays |= {f"tables/{name}/rows": rows, f"tables/{name}/values": values}
    firsts = {}
    if snapshot.sentences is not None:
        part, left = snapshot.sentences
        first = int(part[0]) if part.size else 0
        for name, numbers in (("part", part), ("left", left)):
            arrays[f"sentences/{name}"] = _bits(numbers - first)
            firsts[f"sentences/{name}"] = first
    return _write(path, arrays, firsts, cancelled)


def write_dense_file(path: Path, snapshot: Snapshot, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Write the dense part; its size and checksum. :raises OSError: if it cannot be written."""
    return _write(path, snapshot.dense, {}, cancelled)


def _write(
    path: Path, arrays: dict[str, np.ndarray], firsts: dict[str, int], cancelled: Callable[[], bool]
) -> dict[str, Any]:
    """An HDF5 file of ``arrays``, flushed to the disk.

    HDF5 only lays the file out: it would keep other threads waiting while it writes. The data then goes to its places
    by plain writes.
    """
    with ErrorKeepingFile(path) as output:
        places = []
        with h5py.File(output, "w") as file:
            for name, array in arrays.items():
                if not array.size:
                    file.create_dataset(name, array.shape, array.dtype)
                    continue
                dataset = _laid_out(file, name, array)
                places.append((dataset.id.get_offset(), array))
            for name, first in firsts.items():
                file[name].attrs["first"] = first
        output.check()
        for offset, array in places:
            data = np.ascontiguousarray(array).data.cast("B")
            for start in range(0, len(data), _BLOCK_BYTES):
                if cancelled():
                    return {}
                _write_at(output.fileno(), data[start : start + _BLOCK_BYTES], offset + start)
        output.finish()
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _laid_out(file: h5py.File, name: str, array: np.ndarray) -> h5py.Dataset:
    """A contiguous dataset that has its place in the file but not its data yet."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, array.shape, array.dtype, dcpl=options)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def restore(path: Path, manifest: Manifest, parameters: Parameters, world: World) -> None:
    """Collective: fill tables, model and optimizer from a verified checkpoint, whatever world wrote it."""

    def read_rows() -> None:
        for number, (table, group, first) in enumerate(_chunks(path, manifest, parameters)):
            if number % world.size == world.rank:
                rows, values = (group[name][first : first + _CHUNK_ROWS] for name in ("rows", "values"))
                parameters.server.set(table.segment.keys(rows), table.restored(values))
                world.progress.made()

    def guarded(read: Callable[[], None]) -> None:
        try:
            read()
        except H5_ERRORS as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None

    world.together(lambda: guarded(read_rows))
    world.together(lambda: guarded(lambda: _read_dense(path / DENSE, parameters)))
    parameters.sync_parameters()


def saved_cursor(path: Path, manifest: Manifest) -> SavedCursor:
    """Where the run was that wrote a verified checkpoint. :raises CheckpointError: if it cannot be read."""
    position = Position(*(int(manifest[name]) for name in ("step", "epoch", "step_in_epoch")))
    parts: list[np.ndarray] = []
    left: list[np.ndarray] = []
    try:
        for rank in range(manifest["world_size"]):
            with h5py.File(path / rank_file(rank, manifest["world_size"]), "r") as file:
                for name, found in (("part", parts), ("left", left)):
                    if f"sentences/{name}" in file:
                        dataset = file[f"sentences/{name}"]
                        found.append(np.flatnonzero(np.unpackbits(dataset[:])) + int(dataset.attrs["first"]))
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None
    return SavedCursor(position, parts, left)


def _chunks(path: Path, manifest: Manifest, parameters: Parameters) -> Iterator[tuple[RowTable, h5py.Group, int]]:
    for rank in range(manifest["world_size"]):
        with h5py.File(path / rank_file(rank, manifest["world_size"]), "r") as file:
            for table in parameters.tables:
                group = file[f"tables/{table.segment.name}"]
                for first in range(0, len(group["rows"]), _CHUNK_ROWS):
                    yield table, group, first


def _bits(numbers: np.ndarray) -> np.ndarray:
    """Ascending numbers from 0 on as bits."""
    bits = np.zeros(int(numbers[-1]) + 1 if numbers.size else 0, bool)
    bits[numbers] = True
    return np.packbits(bits)


def _dense_arrays(parameters: Parameters) -> dict[str, np.ndarray]:
    """Copies of the dense parameters and their accumulators."""
    arrays, names = {}, []
    for name, tensor in parameters.model.named_parameters():
        arrays[f"parameters/{name}"] = tensor.detach().cpu().numpy().copy()
        names.append(name)
    for name, accumulator in zip(names, parameters.dense_optimizer.accumulators, strict=False):
        arrays[f"accumulators/{name}"] = accumulator.cpu().numpy().copy()
    return arrays


@torch.no_grad()
def _read_dense(path: Path, parameters: Parameters) -> None:
    accumulators = parameters.dense_optimizer.accumulators
    with h5py.File(path, "r") as file:
        for number, (name, tensor) in enumerate(parameters.model.named_parameters()):
            tensor.data.copy_(torch.from_numpy(file[f"parameters/{name}"][()]))
            if accumulators:
                accumulators[number].copy_(torch.from_numpy(file[f"accumulators/{name}"][()]))
