"""An HDF5 file of arrays that a full disk cannot crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from types import TracebackType

import h5py
import numpy as np

from lapse_elmo.corpus.files import ErrorKeepingFile


class Hdf5Output:
    """A context in which arrays go into a new HDF5 file; at its end the file is flushed to the disk.

    Contiguous, not compressed, without time stamps: the same arrays give the same bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """:raises OSError: if the file cannot be written, here as in the other methods."""
        self._sink = ErrorKeepingFile(path)
        self._file = h5py.File(self._sink, "w")

    def write(self, name: str, array: np.ndarray) -> None:
        """A float32 dataset of ``array``, which has one dimension at least."""
        self.write_rows(name, array.shape, [(0, array)])

    def write_rows(self, name: str, shape: tuple[int, ...], chunks: Iterable[tuple[int, np.ndarray]]) -> None:
        """A float32 dataset of ``shape`` from ``chunks``, (first row, rows)."""
        dataset = self._file.create_dataset(name, shape, np.float32, track_times=False)
        for first, rows in chunks:
            dataset[first : first + len(rows)] = rows
            self._sink.check()

    def __enter__(self) -> Hdf5Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
            if kind is None:
                self._sink.finish()
        finally:
            self._sink.close()
