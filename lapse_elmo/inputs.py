"""Open files that a user names, but only regular files, and only up to a limit where a file is read as a whole.

A named pipe would make the program wait forever, a device such as /dev/zero never ends, and a sparse file may be larger
than memory. These are refused by an OSError whose ``strerror`` gives the reason, so that callers report it as they
report a missing file.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Generic, Protocol, TypeVar, cast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Deflate can expand by a factor of 1,032, but text does not compress by more than 20.
_MOST_EXPANSION = 100
MOST_VOCABULARY_BYTES = 1 << 30
_MOST_TOML_BYTES = 1 << 24
MOST_JSON_BYTES = 1 << 28  # enough for the manifest of 100,000 ranks, and for the options and the words of a model
UNCHECKED_BYTES = 64 << 20  # expanded size up to which any ratio is allowed: a short text may repeat one word


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: If it cannot be opened, or is a directory, a pipe, a socket or a device.
    """
    # O_NONBLOCK: do not wait for the other end of a pipe.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_mode(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def require_regular(path: str | os.PathLike[str]) -> None:
    """Check a file that a library is going to open itself.

    Raises:
        OSError: As for :func:`open_regular`, except if the only obstacle is a missing permission to read.
    """
    _require_mode(os.stat(path).st_mode, path)  # without opening it: opens of thousands of ranks load a file server


def _require_mode(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file; copy it to one", os.fspath(path))


def read_small(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: Where :func:`open_regular` does, and if the file has more than ``most_bytes``.
    """
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes >> 20:,} MiB, the limit for such files", str(path))
    return data


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        OSError: Where :func:`read_small` does.
        ValueError: It is not UTF-8 or not TOML, or has a number of thousands of digits.
        RecursionError: It is nested too deeply.
    """
    return tomllib.loads(read_small(path, _MOST_TOML_BYTES).decode())


def open_gzip(file: BinaryIO) -> BinaryIO:
    """Return a stream of the expanded data of a gzip ``file``.

    Reading raises gzip.BadGzipFile once the data has expanded far more than text can: it would fill memory and disks.
    """
    return cast(BinaryIO, _TextGzip(fileobj=file))


class _TextGzip(gzip.GzipFile):
    def _checked(self, data: bytes) -> bytes:
        expanded, packed = self.tell(), self.fileobj.tell()  # type: ignore[union-attr]
        if expanded > max(UNCHECKED_BYTES, _MOST_EXPANSION * packed):
            raise gzip.BadGzipFile(f"{packed:,} bytes expand to more than {expanded:,}: this is not text")
        return data

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(-1 if size is None else size))


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Close it."""


K = TypeVar("K")
F = TypeVar("F", bound=Closable)


class RecentFiles(Generic[K, F]):
    """Files by key, of which those that were used last stay open: a process of few ranks may read from thousands.

    Args:
        open_file: Returns the file of a key, open or to be opened when it is read.
        most: Most files that stay open; the usual limit of a process is 1,024.
    """

    def __init__(self, open_file: Callable[[K], F], most: int) -> None:
        self._open, self._most = open_file, most
        self._files: dict[K, F] = {}  # the one used last at the end

    def get(self, key: K) -> F:
        """Return the file of ``key``; it may be closed once other files are asked for."""
        file = self._files.pop(key, None)
        if file is None:
            if len(self._files) == self._most:
                longest_unused = next(iter(self._files))
                self._files.pop(longest_unused).close()
            file = self._open(key)
        self._files[key] = file
        return file

    def close(self) -> None:
        """Close all files; :meth:`get` opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()
