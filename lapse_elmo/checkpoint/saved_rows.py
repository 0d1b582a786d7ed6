"""The rows of a checkpoint's tables, read where they lie: memory-mapped, without a server and without copying them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from lapse_elmo.checkpoint.manifest import Manifest, rank_file
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.errors import CheckpointError

_CHUNK_ROWS = 16384


class SavedTable:
    """One table of a checkpoint: ``num_rows`` rows of ``size`` weights and, after them, the update rule's state.

    Only the rows' numbers are read when it is opened, so a table of any size opens at once; its rows come from the
    disk, or from the system's page cache, when they are asked for. Every other module that wants the weights of a
    saved table gets them here.

    :ivar width: numbers stored for a row, the state of the update rule included.
    """

    def __init__(self, path: Path, manifest: Manifest, name: str, num_rows: int, size: int) -> None:
        """Open table ``name`` of the checkpoint at ``path``.

        :raises CheckpointError: if a file cannot be read, has another shape, or the files do not hold every row once.
        """
        self.num_rows, self.size = num_rows, size
        self._files: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        world_size = manifest["world_size"]
        try:
            for rank in range(world_size):
                file = path / rank_file(rank, world_size)
                rows, values = _mapped(file, name)
                numbers.append(rows)
                self._files.append(values)
        except H5_ERRORS as error:
            raise CheckpointError(f"cannot read table {name} of checkpoint {path}: {error}") from None
        self.width = self._files[0].shape[1]
        if any(values.shape[1] != self.width for values in self._files) or self.width < size:
            raise CheckpointError(
                f"table {name} of checkpoint {path} has rows of {self.width} numbers, expected at least {size}: its "
                "config and its rows do not belong together; use another checkpoint"
            )
        self._place = _places(numbers, num_rows, f"table {name} of checkpoint {path}")

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The rows ``numbers`` (n,) as they are stored, (n, width) float32."""
        return self._read(numbers, self.width)

    def weights(self, numbers: np.ndarray) -> np.ndarray:
        """The weights of the rows ``numbers`` (n,) int64, (n, size) float32, a copy."""
        return self._read(numbers, self.size)

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All weights in ascending chunks, (first row, (n, size)); never all of them at once."""
        for first in range(0, self.num_rows, _CHUNK_ROWS):
            end = min(first + _CHUNK_ROWS, self.num_rows)
            if self._place is None:
                yield first, np.array(self._files[0][first:end, : self.size])
            else:
                yield first, self.weights(np.arange(first, end))

    def _read(self, numbers: np.ndarray, width: int) -> np.ndarray:
        if self._place is None:
            return np.ascontiguousarray(self._files[0][numbers, :width])
        files, rows = self._place[0][numbers], self._place[1][numbers]
        out = np.empty((len(numbers), width), np.float32)
        for file in np.unique(files):
            here = np.flatnonzero(files == file)
            out[here] = self._files[file][rows[here], :width]
        return out


def _mapped(file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers (n,) and the mapped rows (n, width) of a rank's file."""
    with h5py.File(file, "r") as opened:
        group = opened[f"tables/{name}"]
        values, rows = group["values"], group["rows"][:]
        offset, shape = values.id.get_offset(), values.shape
        if len(shape) != 2 or rows.shape != shape[:1] or values.dtype != np.float32:
            raise ValueError(f"{file} holds {shape} values of {values.dtype} for {rows.shape} rows")
        if offset is None:  # no rows, or a file that somebody has packed anew
            return rows, values[:]
    return rows, np.memmap(file, np.float32, "r", offset, shape)


def _places(numbers: list[np.ndarray], num_rows: int, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    """For each row its file and its place in that file; None where the only file has all rows in order."""
    found = np.concatenate(numbers)
    if found.size and (found.min() < 0 or found.max() >= num_rows):
        raise CheckpointError(f"{what} has rows outside 0 to {num_rows - 1}: use another checkpoint")
    if found.size != num_rows or np.bincount(found, minlength=num_rows).max(initial=0) > 1:
        raise CheckpointError(f"{what} has {found.size:,} rows, expected each of {num_rows:,} once")
    if len(numbers) == 1 and np.array_equal(found, np.arange(num_rows)):
        return None
    files, places = np.empty(num_rows, np.int32), np.empty(num_rows, np.int64)
    files[found] = np.repeat(np.arange(len(numbers)), [len(part) for part in numbers])
    places[found] = np.concatenate([np.arange(len(part)) for part in numbers])
    return files, places
