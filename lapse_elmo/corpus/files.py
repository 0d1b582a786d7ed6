"""Writing a file whole or not at all, and saying in one line why a disk refused."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lapse_elmo.errors import OutputError

#: What h5py and NumPy raise for files that are damaged, foreign or lie about what is in them.
H5_ERRORS = (
    OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, MemoryError, OverflowError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_failed(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The OutputError that says why ``path`` could not be written."""
    reason = error.strerror or str(error)
    full = error.errno in _FULL
    advice = "free some space or write to another disk" if full else "check the path and its permissions"
    return OutputError(f"cannot write {os.fspath(path)}: {reason}; {advice}")


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """:raises OutputError: if ``path`` is there (an empty directory is not) and may not be replaced."""
    path = Path(path)
    if overwrite or not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not any(path.iterdir()):
            return
    except OSError:
        pass
    raise OutputError(f"{path} exists already; give another --output, or --overwrite to replace it")


@contextlib.contextmanager
def made_whole(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A hidden name beside ``path``, under which the block makes a file or folder that then gets its own name.

    What is at ``path`` is all of it or, after an error, what was there before. The block flushes to the disk.

    :raises OutputError: if ``path`` exists and ``overwrite`` is false, and for every OSError of the block.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    hidden, old = (path.with_name(f".{path.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        if hidden.is_dir() and path.is_dir():
            path.rename(old)
        os.replace(hidden, path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_failed(path, error) from None
    finally:
        for left in (hidden, old):
            _remove(left)


def write_whole(path: str | os.PathLike[str], data: bytes, overwrite: bool = False) -> None:
    """Write a file of ``data`` as :func:`made_whole` makes it."""
    if Path(path).is_dir():
        raise OutputError(f"cannot write {path}: it is a directory; give the name of a file")
    with made_whole(path, overwrite) as hidden, open(hidden, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names inside ``path`` survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ErrorKeepingFile(io.FileIO):
    """A file for HDF5 to write that keeps the first error for later instead of raising it.

    HDF5 crashes the process, then or at its exit, where it cannot write a file while it closes it, on a full disk for
    instance.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path), "w+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while self._error is None and written < len(view):
            try:
                written += super().write(view[written:]) or 0
            except OSError as error:
                self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """:raises OSError: the first one that was kept."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Flush the file to the disk and close it. :raises OSError: the first one that was kept, or that comes now."""
        self.check()
        os.fsync(self.fileno())
        self.close()
