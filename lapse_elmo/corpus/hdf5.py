"""Write arrays to an HDF5 file; a full disk raises an error instead of crashing the process."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from types import TracebackType

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from lapse_elmo.corpus.files import DeferredErrorFile
from lapse_elmo.errors import in_one_line

_CHUNK_BYTES = 1 << 20


class Hdf5Output:
    """A context manager that writes arrays to a new HDF5 file and flushes it to the disk on exit.

    The data is not compressed and carries no time stamps, so the same arrays always give the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Create the file at ``path``.

        Raises:
            OSError: The file cannot be written; the other methods raise it too.
        """
        self._sink = DeferredErrorFile(path)
        # The format of HDF5 1.8 (2008): with the default, which is older, memory grows with the number of datasets.
        self._file = h5py.File(self._sink, "w", libver=("v108", "latest"))
        self._pending: dict[str, list[np.ndarray]] = {}  # rows to append, by dataset; fewer than a chunk
        self._dataset, self._link = (h5p.create(of) for of in (h5p.DATASET_CREATE, h5p.LINK_CREATE))
        self._dataset.set_obj_track_times(False)
        self._link.set_create_intermediate_group(True)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write ``array`` (at least one dimension) as the float32 dataset ``name``."""
        # Same bytes as write_rows. h5py's classes take longer than HDF5, and in bin/embed rank 0 writes for all ranks.
        values = np.ascontiguousarray(array, np.float32)
        space, path = h5s.create_simple(values.shape), name.encode()
        dataset = h5d.create(self._file.id, path, h5t.IEEE_F32LE, space, self._dataset, self._link)
        dataset.write(h5s.ALL, h5s.ALL, values)
        self._sink.check()

    def write_rows(self, name: str, shape: tuple[int, ...], chunks: Iterable[tuple[int, np.ndarray]]) -> None:
        """Write the float32 dataset ``name`` of ``shape``, row by row.

        Args:
            name: The dataset's name.
            shape: Its shape; the first dimension counts the rows.
            chunks: Pairs of (index of the first row, rows), which together cover the dataset.
        """
        dataset = self._file.create_dataset(name, shape, np.float32, track_times=False)
        for first, rows in chunks:
            dataset[first : first + len(rows)] = rows
            self._sink.check()

    def append(self, name: str, row: np.ndarray) -> None:
        """Append a row to the float32 dataset ``name`` (rows, *row.shape), which is created by the first call."""
        if name not in self._file:
            shape = (0, *row.shape)
            rows = max(1, _CHUNK_BYTES // max(row.size * 4, 1))
            self._file.create_dataset(
                name, shape, np.float32, maxshape=(None, *row.shape), chunks=(rows, *row.shape), track_times=False
            )
        pending = self._pending.setdefault(name, [])
        pending.append(row)
        if len(pending) == self._file[name].chunks[0]:
            self._flush(name)

    def write_text(self, name: str, text: str) -> None:
        """Write the dataset ``name`` (1,) of one variable-length string."""
        dataset = self._file.create_dataset(name, (1,), h5py.string_dtype(), track_times=False)
        dataset[0] = text
        self._sink.check()

    def _flush(self, name: str) -> None:
        rows, dataset = self._pending.pop(name, []), self._file[name]
        if rows:
            first = len(dataset)
            dataset.resize(first + len(rows), 0)
            dataset[first:] = np.stack(rows)
            self._sink.check()

    def __enter__(self) -> Hdf5Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        flushes = [functools.partial(self._flush, name) for name in self._pending] if kind is None else []
        failure: Exception | None = None
        try:
            for step in (*flushes, self._file.close):  # HDF5 must close the file also after a failure
                try:
                    step()
                except (OSError, RuntimeError) as caught:
                    failure = failure or caught
            if kind is None:
                self._sink.finish()  # raises the error of a failed write, which says more than HDF5's own
                if failure is not None:
                    raise OSError(in_one_line(failure))
        finally:
            self._sink.close()
