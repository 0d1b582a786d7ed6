"""The directories of compiled code: where they are, and whether they can be trusted, read and written."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from pathlib import Path

CACHE = "LAPSE_ELMO_CACHE"


def cache_folder() -> Path:
    """Return this user's directory for compiled code, and create it if it is missing.

    Raises:
        OSError: If it cannot be created, or if others may write to it: its contents are executed.
    """
    failure = OSError("none was tried")
    for folder in _wanted():
        try:
            return own_folder(folder)
        except OSError as error:
            failure = error
    raise failure


def _wanted() -> list[Path]:
    named = os.environ.get(CACHE)
    bases = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
    # Without HOME and an entry in /etc/passwd, as in some containers, "~" stays as it is: it would become a directory.
    wanted = [Path(named)] if named else [Path(base, "lapse-elmo") for base in bases if os.path.isabs(base)][:1]
    return [*wanted, temporary_folder()]


def temporary_folder() -> Path:
    """Return the directory that is used where the wanted one cannot be; :func:`own_folder` creates it."""
    return Path(tempfile.gettempdir()) / f"lapse-elmo-{os.getuid()}"


def readable_folders() -> list[Path]:
    """Return where libraries may be that were compiled ahead: compute nodes may mount home directories read-only."""
    found = []
    for folder in _wanted():
        with contextlib.suppress(OSError):
            if _is_own(folder):
                found.append(folder)
    return found


def own_folder(folder: Path) -> Path:
    """Create ``folder`` if it is missing, and check that this user, and nobody else, may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(f"others may write to {folder}")
    _require_writable(folder)
    return folder


def _is_own(folder: Path) -> bool:
    state = folder.stat()
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


@functools.cache
def _require_writable(folder: Path) -> None:
    """Create a file in ``folder`` for a moment, but only once: thousands of ranks do so in a folder that they share.

    Raises:
        OSError: This is not possible.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass


def is_full(folder: Path) -> bool:
    """Return whether a megabyte does not fit into ``folder``, or into its owner's quota."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError:
        return True
    return False
