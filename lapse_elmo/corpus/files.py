"""Write files atomically, and report a failed write in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lapse_elmo.errors import OutputError

#: What h5py and NumPy raise for files that are damaged, of another format, or inconsistent.
H5_ERRORS = (
    OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, MemoryError, OverflowError,
)

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_failed(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """Return the OutputError to raise for a failed write of ``path``."""
    reason = error.strerror or str(error)
    is_full = error.errno in _DISK_FULL
    advice = "free some space or write to another disk" if is_full else "check the path and its permissions"
    return OutputError(f"cannot write {os.fspath(path)}: {reason}; {advice}")


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise if ``path`` exists and must not be replaced. An empty directory counts as absent.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if overwrite or not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not any(path.iterdir()):
            return
    except OSError:
        pass
    raise OutputError(f"{path} already exists; choose another --output, or give --overwrite to replace it")


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden temporary name in the directory of ``path``; rename it to ``path`` when the block ends.

    The block creates a file or a directory under the temporary name and flushes it to the disk. Readers of ``path``
    therefore see either the complete new output or, after an error or a kill, the old one; a directory that is replaced
    is missing for a moment.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is false, or the block raised an OSError.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    hidden, old = (path.with_name(f".{path.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(hidden)  # of a process that was killed and had our number, as in a container, where numbers are small
        yield hidden
        replace(hidden, path, old)
        flush_path(path.parent)
    except OSError as error:
        raise write_failed(path, error) from None
    finally:
        _remove(hidden)
        if os.path.lexists(path):  # else ``old`` is the only output there is: neither could get the name
            _remove(old)


def replace(new: Path, path: Path, old: Path) -> None:
    """Rename ``new`` to ``path``. A directory there is moved to ``old``, and back after a failure or an interrupt."""
    try:
        if new.is_dir() and path.is_dir():  # rename() cannot replace a directory that is not empty
            path.rename(old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise


def lock_at_once(file: int | BinaryIO) -> None:
    """Lock ``file`` until it is closed, without waiting. Where the file system has no locks, do nothing.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def atomic_write(path: str | os.PathLike[str], data: bytes, overwrite: bool = False) -> None:
    """Write ``data`` to the file ``path``; see :func:`atomic_output`.

    Raises:
        OutputError: ``path`` is a directory, exists and ``overwrite`` is false, or cannot be written.
    """
    if Path(path).is_dir():
        raise OutputError(f"cannot write {path}: it is a directory, expected the name of a file")
    with atomic_output(path, overwrite) as hidden, open(hidden, "wb") as file:
        file.write(data)
        flush_file(file)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush_path(path: str | os.PathLike[str]) -> None:
    """Flush a file to the disk, or a directory, so that what was created or renamed in it survives a crash.

    Raises:
        OSError: It cannot be opened or flushed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_file(file: IO[Any]) -> None:
    """Flush an open file, with what it has buffered, to the disk.

    Raises:
        OSError: It cannot be written.
    """
    file.flush()
    os.fsync(file.fileno())


class DeferredErrorFile(io.FileIO):
    """A file for HDF5 to write to that stores the first write error, for :meth:`check` to raise, and ignores the rest.

    HDF5 crashes the process, either at once or at exit, if a write fails while it closes a file (on a full disk, for
    instance).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path), "w+")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, unless an earlier write failed. Always returns its length."""
        view = memoryview(data).cast("B")
        written = 0
        while self._error is None and written < len(view):
            try:
                written += super().write(view[written:]) or 0
            except OSError as error:
                self._error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Resize the file; an error is stored."""
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raise the stored error, if there is one.

        Raises:
            OSError: The first error of a write.
        """
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Flush the file to the disk and close it.

        Raises:
            OSError: The first error of an earlier write, or that of the flush.
        """
        self.check()
        os.fsync(self.fileno())
        self.close()
