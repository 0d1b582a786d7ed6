"""Restore the parameters from a checkpoint of any number of ranks and nodes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import torch

from lapse_elmo.checkpoint.checksums import OpenFiles, shares
from lapse_elmo.checkpoint.manifest import DENSE, Manifest, config_of, row_files
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.errors import CheckpointError
from lapse_elmo.model.optimizers import DenseOptimizer
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import PARAMETERS, TRAINED, Parameters
from lapse_elmo.tables import RowTable

T = TypeVar("T")

_CHUNK_ROWS = 16384  # rows per read


def restore(files: OpenFiles, manifest: Manifest, parameters: Parameters, world: World) -> None:
    """Restore tables, model and optimizer from a verified checkpoint of any number of ranks (collective).

    Every rank reads its share of the rows and sends them to where they belong. The dense parameters are read once, by
    rank 0.

    Args:
        files: The files of the checkpoint, as far as they are open from their verification. All are closed in the end.
        manifest: Its manifest.
        parameters: Where to restore.
        world: The ranks.

    Raises:
        CheckpointError: On every rank, if the checkpoint cannot be read or does not have every row.
    """
    path = files.path
    with files:
        own = world.together(lambda: _guarded(path, lambda: _restore_rows(files, manifest, parameters, world)))
        counts = world.sum_(own)
        for table, count in zip(parameters.tables, counts.tolist(), strict=True):
            if count != table.segment.num_rows:
                raise CheckpointError(
                    f"{path} has {count:,} rows of the table {table.segment.name}, expected "
                    f"{table.segment.num_rows:,}; use another checkpoint"
                ).on_every_rank()
        keeps_state = config_of(manifest, path).dense_optimizer == parameters.config.dense_optimizer
        _restore_dense(files, parameters, world, keeps_state)
    parameters.sync_parameters()


def _restore_rows(files: OpenFiles, manifest: Manifest, parameters: Parameters, world: World) -> np.ndarray:
    """Set this rank's share of the rows; return how many there were of each table, (tables,) int64."""
    counts = np.zeros(len(parameters.tables), np.int64)
    for name, groups, start, end in rows_to_read(manifest, parameters.tables, world.rank, world.size):
        with h5py.File(files.get(name), "r") as file:
            for number, table in enumerate(parameters.tables):
                if table.segment.name in groups:
                    group = file[groups[table.segment.name]]
                    counts[number] += _restore_part(group, table, start, end, world)
    return counts


def rows_to_read(
    manifest: Manifest, tables: list[RowTable], part: int, num_parts: int
) -> list[tuple[str, dict[str, str], Fraction, Fraction]]:
    """Return the files that one of ``num_parts`` readers is to read.

    Returns:
        (file, groups, start, end) for each file: its HDF5 ``groups`` by table, and the fractions of their rows between
        which the reader's share lies.
    """
    groups: dict[str, dict[str, str]] = {}
    for table in tables:
        for name, group in row_files(manifest, table.segment.name).items():
            groups.setdefault(name, {})[table.segment.name] = group
    for name in groups:
        if name not in manifest["files"]:
            raise CheckpointError(f"the checkpoint has no file {name}; use another checkpoint")
    found = []
    for name, start, end in shares(manifest, num_parts)[part]:
        if name in groups:
            size = manifest["files"][name]["bytes"]
            found.append((name, groups[name], Fraction(start, size), Fraction(end, size)))
    return found


def _restore_part(group: h5py.Group, table: RowTable, start: Fraction, end: Fraction, world: World) -> int:
    """Set the rows of a file that lie between the fractions ``start`` and ``end`` of it; return their number."""
    total = len(group["rows"])
    first, last = int(total * start), int(total * end)  # where a reader ends, the next one begins
    for place in range(first, last, _CHUNK_ROWS):
        stop = min(place + _CHUNK_ROWS, last)
        rows, values = group["rows"][place:stop], group["values"][place:stop]
        if rows.min() < 0 or rows.max() >= table.segment.num_rows:
            raise ValueError(f"table {table.segment.name} has rows outside 0 to {table.segment.num_rows - 1}")
        table.server.set(table.segment.keys(rows), table.restored(values))
        world.progress.work_done()
    return last - first


@torch.no_grad()
def _restore_dense(files: OpenFiles, parameters: Parameters, world: World, keeps_state: bool) -> None:
    """Set the dense parameters and their optimizer's state, if kept; rank 0 reads them one by one for all ranks."""
    path = files.path / DENSE
    with contextlib.ExitStack() as stack:
        opened: list[h5py.File] = []
        world.agree(
            lambda: _guarded(path, lambda: opened.append(stack.enter_context(h5py.File(files.get(DENSE), "r"))))
        )
        for name, tensor in parameters.dense_tensors().items():
            if not (keeps_state or name.startswith((PARAMETERS, TRAINED))):
                continue
            values = torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()
            read = functools.partial(_read_array, opened, name, parameters.dense_optimizer, values)
            world.agree(functools.partial(_guarded, path, read))
            world.bcast_array(values)
            parameters.set_dense(tensor, values)


def saved_name(name: str, file: h5py.File, optimizer: DenseOptimizer) -> str | None:
    """Return the name by which a checkpoint's ``file`` has what ``optimizer`` calls ``name``; None if it has none.

    Names differ where parameters are averaged in the run and not in the checkpoint, or the reverse.
    """
    if TRAINED[:-1] not in file:
        # Without averages, only Adam counts its steps.
        counted = name != "num_steps" or optimizer.rule.kind == "adam"
        return name.replace(TRAINED, PARAMETERS) if counted else None
    return name if optimizer.averages is not None else name.replace(PARAMETERS, TRAINED)


def _read_array(opened: list[h5py.File], name: str, optimizer: DenseOptimizer, out: np.ndarray) -> None:
    """Read a dense array; leave ``out`` as it is if the checkpoint has none."""
    (file,) = opened
    saved = saved_name(name, file, optimizer)
    if saved is None:
        return
    values = file[saved][()]
    if values.shape != out.shape:
        raise ValueError(f"{name} has shape {values.shape}, expected {out.shape}")
    out[...] = values


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except H5_ERRORS as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None
