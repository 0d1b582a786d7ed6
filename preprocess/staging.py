"""A hidden directory beside an output, in which many ranks build it, and which becomes it in one rename.

Whatever goes wrong on any rank, nothing is left at the output's place, and the hidden directory is removed. Only a kill
leaves it behind; rank 0 of the next run for the same output removes it, since its lock is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from lapse_elmo.corpus.files import refuse_existing, sync_directory, write_failed
from lapse_elmo.errors import OutputError, UserError
from lapse_elmo.mpi.world import World

T = TypeVar("T")

_OURS = re.compile(r"(train|heldout)-\d+-of-\d+\.(h5|txt)|SOURCES\.txt")


class _Stopped(UserError):
    """Another rank failed; its error is the one to show."""


class Staging:
    """The hidden directory, as a context manager. Every rank enters it, and calls :meth:`phase` and :meth:`publish`."""

    def __init__(self, world: World, output: str, overwrite: bool) -> None:
        """:raises OutputError: on all ranks, if ``output`` exists and may not be replaced or its place is read-only."""
        self._world = world
        self._lock: BinaryIO | None = None
        self.output = Path(os.path.realpath(output))
        self._shown = output
        self._overwrite = overwrite
        self.directory = world.agree(self._create)
        self._flag = self.directory / "failed"

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        if self._world.rank == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()

    def phase(self, function: Callable[[], T]) -> list[T]:
        """Run ``function`` on every rank: the results of all ranks, or the first UserError, raised on all of them."""
        result: T | None = None
        error: UserError | None = None
        try:
            try:
                result = function()
            except OSError as caught:
                raise write_failed(self._shown, caught) from None
        except UserError as caught:
            error = caught
            if not isinstance(error, _Stopped):
                self._raise_flag()
        outcomes = self._world.allgather((result, error))
        errors = [error for _, error in outcomes if error is not None]
        if errors:
            first = next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
            raise first.on_every_rank()
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def check(self) -> None:
        """Give up at once if another rank failed. Call it now and then in a long phase."""
        if self._world.size > 1 and self._flag.exists():
            raise _Stopped("another rank failed")

    def publish(self, name: str) -> None:
        """Make ``name``, a file or directory in the hidden directory, the output."""
        self._world.barrier()
        self._world.agree(lambda: self._publish(self.directory / name))

    def _create(self) -> Path:
        refuse_existing(self._shown, self._overwrite)
        if self._overwrite and self.output.is_dir():
            _check_replaceable(self.output, self._shown)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{self.output.name}.tmp-"
            for left in glob.glob(os.path.join(glob.escape(str(self.output.parent)), glob.escape(prefix) + "*")):
                _remove_if_dead(left)
            directory = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
            self._lock = open(directory / "lock", "wb")  # noqa: SIM115 (held until the end)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise write_failed(self._shown, error) from None
        return directory

    def _raise_flag(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk the others notice at the end of the phase
            self._flag.touch()

    def _publish(self, new: Path) -> None:
        refuse_existing(self._shown, self._overwrite)
        try:
            if new.is_dir():
                sync_directory(new)
            if new.is_dir() and self.output.is_dir():
                _check_replaceable(self.output, self._shown)
                old = self.directory / "old"
                os.rename(self.output, old)
                try:
                    os.rename(new, self.output)
                except OSError:
                    os.rename(old, self.output)
                    raise
            else:
                os.replace(new, self.output)
            sync_directory(self.output.parent)
        except OSError as error:
            raise write_failed(self._shown, error) from None


def _check_replaceable(directory: Path, shown: str) -> None:
    """--overwrite removes what this program makes, never somebody's other files."""
    others = sorted(name for name in os.listdir(directory) if not _OURS.fullmatch(name))
    if others:
        raise OutputError(
            f"{shown} holds other files than those made here (such as {others[0]}), so --overwrite does not replace "
            "it; give another --output"
        )


def _remove_if_dead(directory: str) -> None:
    """Remove the hidden directory of a run that was killed; one that still runs holds the lock."""
    try:
        with open(os.path.join(directory, "lock"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        pass
