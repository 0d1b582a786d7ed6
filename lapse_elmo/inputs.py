"""Opening files that a user names: regular files only, and small ones only as large as such a file may be.

A named pipe would make the program wait for ever, a device such as /dev/zero gives bytes without end, and a sparse file
may be larger than any memory. What is refused here raises an OSError, whose ``strerror`` says why: callers report it as
they report a file that is missing.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
from typing import BinaryIO, cast

#: The most that deflate can shrink is 1 / 1032; text does not shrink to less than 1 / 20.
_MOST_EXPANSION = 100
MOST_VOCABULARY_BYTES = 1 << 30
MOST_TOML_BYTES = 1 << 24
MOST_JSON_BYTES = 1 << 28  # of a manifest of 100,000 ranks, and of the options or the words of a model
UNCHECKED_BYTES = 64 << 20  # of expanded data: short texts may be of one word


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    :raises OSError: if it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # which does not wait for a pipe's other end
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file; copy it to one", os.fspath(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what :func:`open_regular` refuses, for a library that opens the file itself. :raises OSError: so."""
    open_regular(path).close()


def read_small(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return the bytes of a regular file. :raises OSError: also if it has more than ``most_bytes``."""
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes >> 20:,} MiB, which no such file has", str(path))
    return data


def open_gzip(file: BinaryIO) -> BinaryIO:
    """Return the expanded data of a gzip ``file``.

    Reading raises gzip.BadGzipFile where it expands to far more than text does, which would fill memory and disks.
    """
    return cast(BinaryIO, _TextGzip(fileobj=file))


class _TextGzip(gzip.GzipFile):
    def _checked(self, data: bytes) -> bytes:
        expanded, packed = self.tell(), self.fileobj.tell()  # type: ignore[union-attr]
        if expanded > max(UNCHECKED_BYTES, _MOST_EXPANSION * packed):
            raise gzip.BadGzipFile(f"{packed:,} bytes expand to more than {expanded:,}: this is no text")
        return data

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline(-1 if size is None else size))
