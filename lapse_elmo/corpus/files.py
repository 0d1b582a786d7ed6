"""Writing a file whole or not at all, and saying in one line why a disk refused."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from lapse_elmo.errors import OutputError

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


def write_whole(path: str | os.PathLike[str], data: bytes, overwrite: bool = False) -> None:
    """Write ``data`` to a temporary name beside ``path``, flush it to the disk, rename it.

    :raises OutputError: if ``path`` exists and ``overwrite`` is false, or the file cannot be written.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory; give the name of a file")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_directory(path.parent)
    except OSError as error:
        raise write_failed(path, error) from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names inside ``path`` survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
