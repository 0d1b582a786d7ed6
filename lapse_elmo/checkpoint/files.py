"""Copy a rank's share of the state, write it to a checkpoint while training continues, and restore it."""

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
from lapse_elmo.corpus.files import H5_ERRORS, DeferredErrorFile
from lapse_elmo.cursor import Position, SavedCursor
from lapse_elmo.errors import CheckpointError
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.tables import RowTable

_CHUNK_ROWS = 16384  # rows per pull or read
_BLOCK_BYTES = 1 << 22  # bytes per write, after which a cancelled save stops


@dataclass
class Snapshot:
    """A copy of a rank's share of the state, taken while no rank trains. The next snapshot reuses its memory.

    Attributes:
        tables: For each table the row numbers (n,) and the rows (n, width).
        dense: On rank 0, arrays by their name in ``dense.h5``.
        sentences: In mid-epoch, this worker's sentences and those of them still to be trained.
    """

    tables: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    sentences: tuple[np.ndarray, np.ndarray] | None = None

    def take(self, parameters: Parameters, sentences: tuple[np.ndarray, np.ndarray] | None, world: World) -> None:
        """Copy this rank's share (collective). On return, all ranks have copied theirs."""
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
                world.progress.work_done()
            self.tables[segment.name] = rows, values
        self.dense = _copy_dense(parameters) if world.rank == 0 else {}
        self.sentences = sentences
        parameters.server.barrier()


def write_rank_file(path: Path, snapshot: Snapshot, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Write a rank's share of the tables and sentences.

    Args:
        path: The file to write.
        snapshot: What to write.
        cancelled: Called before each block; writing stops once it returns true.

    Returns:
        The file's size ``bytes`` and checksum ``sha256``; empty if the save was cancelled.

    Raises:
        OSError: The file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, (rows, values) in snapshot.tables.items():
        arrays |= {f"tables/{name}/rows": rows, f"tables/{name}/values": values}
    firsts = {}
    if snapshot.sentences is not None:
        part, left = snapshot.sentences
        first = int(part[0]) if part.size else 0
        for name, numbers in (("part", part), ("left", left)):
            arrays[f"sentences/{name}"] = _pack_bits(numbers - first)
            firsts[f"sentences/{name}"] = first
    return _write(path, arrays, firsts, cancelled)


def write_dense_file(path: Path, snapshot: Snapshot, cancelled: Callable[[], bool]) -> dict[str, Any]:
    """Write the dense parameters; see :func:`write_rank_file`."""
    return _write(path, snapshot.dense, {}, cancelled)


def _write(
    path: Path, arrays: dict[str, np.ndarray], firsts: dict[str, int], cancelled: Callable[[], bool]
) -> dict[str, Any]:
    """Write an HDF5 file of ``arrays`` and flush it to the disk.

    HDF5 only lays out the file: it would block other threads while it writes. The data is then written to
    the offsets that it assigned.
    """
    with DeferredErrorFile(path) as output:
        layout = []
        with h5py.File(output, "w") as file:
            for name, array in arrays.items():
                if not array.size:
                    file.create_dataset(name, array.shape, array.dtype)
                    continue
                dataset = _create_contiguous(file, name, array)
                layout.append((dataset.id.get_offset(), array))
            for name, first in firsts.items():
                file[name].attrs["first"] = first
        output.check()
        for offset, array in layout:
            data = np.ascontiguousarray(array).data.cast("B")
            for start in range(0, len(data), _BLOCK_BYTES):
                if cancelled():
                    return {}
                _pwrite_all(output.fileno(), data[start : start + _BLOCK_BYTES], offset + start)
        output.finish()
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _create_contiguous(file: h5py.File, name: str, array: np.ndarray) -> h5py.Dataset:
    """Create a contiguous dataset with space allocated in the file, but without data."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, array.shape, array.dtype, dcpl=options)


def _pwrite_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def restore(path: Path, manifest: Manifest, parameters: Parameters, world: World) -> None:
    """Restore tables, model and optimizer from a verified checkpoint of any number of ranks (collective).

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """

    def read_rows() -> None:
        for number, (table, group, first) in enumerate(_row_chunks(path, manifest, parameters)):
            if number % world.size == world.rank:
                rows, values = (group[name][first : first + _CHUNK_ROWS] for name in ("rows", "values"))
                parameters.server.set(table.segment.keys(rows), table.restored(values))
                world.progress.work_done()

    def guarded(read: Callable[[], None]) -> None:
        try:
            read()
        except H5_ERRORS as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None

    world.together(lambda: guarded(read_rows))
    world.together(lambda: guarded(lambda: _read_dense(path / DENSE, parameters) if parameters.writes_dense else None))
    parameters.sync_parameters()


def read_cursor(path: Path, manifest: Manifest) -> SavedCursor:
    """Read the position in the corpus from a verified checkpoint.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
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


def _row_chunks(path: Path, manifest: Manifest, parameters: Parameters) -> Iterator[tuple[RowTable, h5py.Group, int]]:
    for rank in range(manifest["world_size"]):
        with h5py.File(path / rank_file(rank, manifest["world_size"]), "r") as file:
            for table in parameters.tables:
                group = file[f"tables/{table.segment.name}"]
                for first in range(0, len(group["rows"]), _CHUNK_ROWS):
                    yield table, group, first


def _pack_bits(numbers: np.ndarray) -> np.ndarray:
    """Return a packed bit set of ``numbers``, which ascend and are at least 0."""
    bits = np.zeros(int(numbers[-1]) + 1 if numbers.size else 0, bool)
    bits[numbers] = True
    return np.packbits(bits)


def _copy_dense(parameters: Parameters) -> dict[str, np.ndarray]:
    """Return copies of the dense parameters and their accumulators, by their name in ``dense.h5``."""
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
