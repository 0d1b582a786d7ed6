"""Read rows of a checkpoint's tables from memory-mapped files, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO

import h5py
import numpy as np

from lapse_elmo.checkpoint.checksums import OpenFiles
from lapse_elmo.checkpoint.manifest import Manifest, row_files
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.errors import CheckpointError

_CHUNK_ROWS = 16384  # rows in memory at a time


class SavedTable:
    """One table of a checkpoint: ``num_rows`` rows of ``size`` weights, each followed by the update rule's state.

    Opening reads only the row numbers, so a table of any size opens at once. Rows are read from the disk, or from the
    page cache, when they are asked for. All modules that need the weights of a saved table read them here.

    Attributes:
        num_rows: Rows of the table.
        size: Weights per row.
        width: Values stored per row: the weights and the state of the update rule.
    """

    def __init__(self, files: OpenFiles, manifest: Manifest, name: str, num_rows: int, size: int) -> None:
        """Open table ``name`` of a checkpoint.

        Args:
            files: The files of the checkpoint; they may be closed afterwards.
            manifest: Its manifest.
            name: The table's name.
            num_rows: Rows that it must have.
            size: Weights per row.

        Raises:
            CheckpointError: A file cannot be read or has the wrong shape, or the files do not hold each row once.
        """
        self.num_rows, self.size = num_rows, size
        path = files.path
        self._files: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        try:
            for file, group in row_files(manifest, name).items():
                rows, values = _map_rows(files.get(file), group)
                numbers.append(rows)
                self._files.append(values)
        except H5_ERRORS as error:
            raise CheckpointError(f"cannot read table {name} of checkpoint {path}: {error}") from None
        self.width = self._files[0].shape[1]
        if any(values.shape[1] != self.width for values in self._files) or self.width < size:
            raise CheckpointError(
                f"table {name} of checkpoint {path} has rows of {self.width} values, expected at least {size} as in "
                "its config; use another checkpoint"
            )
        self._locations = _locate_rows(numbers, num_rows, f"table {name} of checkpoint {path}")

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows ``numbers`` (n,) int64 as stored, (n, width) float32, a copy."""
        return self._read(numbers, self.width)

    def weights(self, numbers: np.ndarray) -> np.ndarray:
        """Return the weights of the rows ``numbers`` (n,) int64, (n, size) float32, a copy."""
        return self._read(numbers, self.size)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all weights in order, in chunks of (number of the first row, weights (n, size))."""
        for first in range(0, self.num_rows, _CHUNK_ROWS):
            end = min(first + _CHUNK_ROWS, self.num_rows)
            if self._locations is None:
                yield first, np.array(self._files[0][first:end, : self.size])
            else:
                yield first, self.weights(np.arange(first, end))

    def _read(self, numbers: np.ndarray, width: int) -> np.ndarray:
        if self._locations is None:
            return np.ascontiguousarray(self._files[0][numbers, :width])
        files, rows = self._locations[0][numbers], self._locations[1][numbers]
        out = np.empty((len(numbers), width), np.float32)
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            out[here] = self._files[file][rows[here], :width]
        return out


def _map_rows(file: FileIO, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers (n,) and the memory-mapped rows (n, width) in the HDF5 group ``name`` of a file."""
    with h5py.File(file, "r") as opened:
        group = opened[name]
        values, rows = group["values"], group["rows"][:]
        offset, shape = values.id.get_offset(), values.shape
        if len(shape) != 2 or rows.shape != shape[:1] or values.dtype != np.float32:
            raise ValueError(f"{file.name} holds {shape} values of {values.dtype} for {rows.shape} rows")
        if offset is None:  # no rows, or a file that another program has rewritten
            return rows, values[:]
    return rows, np.memmap(file, np.float32, "r", offset, shape)


def _locate_rows(numbers: list[np.ndarray], num_rows: int, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return for each row its file and its index in that file; None if a single file has all rows in order."""
    found = np.concatenate(numbers)
    if found.size and (found.min() < 0 or found.max() >= num_rows):
        raise CheckpointError(f"{what} has rows outside 0 to {num_rows - 1}; use another checkpoint")
    if found.size != num_rows or np.bincount(found, minlength=num_rows).max(initial=0) > 1:
        raise CheckpointError(
            f"{what} has {found.size:,} rows, expected each of {num_rows:,} once; use another checkpoint"
        )
    if len(numbers) == 1 and np.array_equal(found, np.arange(num_rows)):
        return None
    files, indices = np.empty(num_rows, np.int32), np.empty(num_rows, np.int64)
    files[found] = np.repeat(np.arange(len(numbers)), [len(part) for part in numbers])
    indices[found] = np.concatenate([np.arange(len(part)) for part in numbers])
    return files, indices
