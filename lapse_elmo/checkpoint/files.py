"""Write the files of a checkpoint; those with a node's rows are written by all ranks of the node at the same time.

One rank lays out a file with HDF5, which only assigns the offset of each array: HDF5 would block other threads while it
writes. Then every rank writes its part of the arrays to these offsets. The space is not allocated before: where a file
system cannot do that, the C library would write to every page of it. A full disk is noticed by the rank that meets it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import h5py
import numpy as np

from lapse_elmo.checkpoint.checksums import Piece
from lapse_elmo.corpus.files import DeferredErrorFile

_BLOCK_BYTES = 1 << 22  # bytes per write, after which a cancelled save stops
_PIECE_BYTES = 1 << 26  # bytes that have a checksum; at a resume a piece is verified by one rank

ArrayKind: TypeAlias = "tuple[tuple[int, ...], np.dtype]"


@dataclass(frozen=True)
class Layout:
    """Where the arrays of an HDF5 file are.

    Attributes:
        offsets: The offset of each array that is not empty, in bytes, by name.
        gaps: The parts (start, end) of the file outside of these arrays, which HDF5 has written.
    """

    offsets: dict[str, int]
    gaps: list[tuple[int, int]]


@dataclass(frozen=True)
class TableShare:
    """A rank's share of the rows of a table that its node saves in one file.

    Attributes:
        rows: (n,) int64, the row numbers.
        values: (n, width) float32, the rows with the state of their update rule.
        first: Index of the share in the rows of the file.
        num_all: Rows of the file.
    """

    rows: np.ndarray
    values: np.ndarray
    first: int
    num_all: int


def lay_out(path: Path, arrays: dict[str, ArrayKind]) -> Layout:
    """Create an HDF5 file with room for ``arrays``, given as (shape, type). It is not flushed to the disk.

    Raises:
        OSError: The file cannot be written, as does RuntimeError.
    """
    offsets = {}
    with DeferredErrorFile(path) as output:
        with h5py.File(output, "w") as file:
            for name, (shape, dtype) in arrays.items():
                if 0 in shape:
                    file.create_dataset(name, shape, dtype)
                else:
                    offsets[name] = _create_contiguous(file, name, shape, dtype).id.get_offset()
        output.check()
        size = os.fstat(output.fileno()).st_size
    taken = sorted((offset, offset + _bytes_of(*arrays[name])) for name, offset in offsets.items())
    ends, starts = [0, *(end for _, end in taken)], [*(start for start, _ in taken), size]
    return Layout(offsets, [(end, start) for end, start in zip(ends, starts, strict=True) if end < start])


def table_arrays(num_rows: int, width: int) -> dict[str, ArrayKind]:
    """Return the arrays of a file with ``num_rows`` rows of a table."""
    return {"rows": ((num_rows,), np.dtype(np.int64)), "values": ((num_rows, width), np.dtype(np.float32))}


def write_table_share(path: Path, share: TableShare, layout: Layout, cancelled: Callable[[], bool]) -> list[Piece]:
    """Write a rank's share into the file of its node; see :func:`write_parts`."""
    parts = [
        (layout.offsets[name] + share.first * array[0].nbytes, array)
        for name, array in (("rows", share.rows), ("values", share.values)) if array.size
    ]
    return write_parts(path, parts, cancelled)


def write_file(path: Path, arrays: dict[str, np.ndarray], cancelled: Callable[[], bool]) -> list[Piece]:
    """Write a whole file of ``arrays``; see :func:`write_parts`."""
    layout = lay_out(path, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    written = write_parts(path, [(offset, arrays[name]) for name, offset in layout.offsets.items()], cancelled)
    return [*read_gaps(path, layout), *written]


def write_parts(
    path: Path, parts: Sequence[tuple[int, np.ndarray]], cancelled: Callable[[], bool]
) -> list[Piece]:
    """Write arrays to their offsets in a file, and flush the file to the disk.

    Args:
        path: The file, which has been laid out.
        parts: Offsets and arrays.
        cancelled: Called before each block; writing stops once it returns true.

    Returns:
        What was written, with checksums.

    Raises:
        OSError: The file cannot be written.
    """
    pieces: list[Piece] = []
    handle = os.open(path, os.O_WRONLY)
    try:
        for first, array in parts:
            data = np.ascontiguousarray(array).data.cast("B")
            for start in range(0, len(data), _PIECE_BYTES):
                piece, digest = data[start : start + _PIECE_BYTES], hashlib.sha256()
                for place in range(0, len(piece), _BLOCK_BYTES):
                    if cancelled():
                        return pieces
                    block = piece[place : place + _BLOCK_BYTES]
                    _pwrite_all(handle, block, first + start + place)
                    digest.update(block)
                pieces.append(Piece(path.name, first + start, len(piece), digest.hexdigest()))
        os.fsync(handle)
    finally:
        os.close(handle)
    return pieces


def read_gaps(path: Path, layout: Layout) -> list[Piece]:
    """Return the pieces of a file that HDF5 has written, and flush the file to the disk.

    Raises:
        OSError: The file cannot be read or flushed.
    """
    with open(path, "rb", buffering=0) as file:
        found = [(start, os.pread(file.fileno(), end - start, start)) for start, end in layout.gaps]
        os.fsync(file.fileno())
    return [Piece(path.name, start, len(data), hashlib.sha256(data).hexdigest()) for start, data in found]


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _create_contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """Create a contiguous dataset with an offset in the file, but without data."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape, dtype, dcpl=options)


def _pwrite_all(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
