"""Build an output of many ranks in a hidden directory next to it, and publish it by one rename.

If a rank fails with a UserError, the output is not created and the hidden directory is removed. A killed or interrupted
job leaves the directory behind. The next run with the same output finds that nobody holds its lock, and removes it or
takes it over, with those of its files that it asks for.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from lapse_elmo.corpus.files import flush_path, lock_at_once, refuse_existing, replace, write_failed
from lapse_elmo.errors import OutputError, UserError
from lapse_elmo.mpi.world import World

T = TypeVar("T")

_CHECK_S = 1.0  # thousands of ranks that ask a file server after each block would keep it from all else
_OLD = "old"  # the name in the hidden directory of an output that is replaced
_GENERATED = re.compile(r"(train|heldout)-\d+-of-\d+\.(h5|txt)|SOURCES\.txt")


class _Stopped(UserError):
    """Raised on a rank because another rank failed, whose error is the one to report."""


class Staging:
    """A context manager for the hidden directory. All methods but :meth:`check` are collective."""

    def __init__(self, world: World, output: str, overwrite: bool, kept: Sequence[str] = ()) -> None:
        """Create the hidden directory, or take over that of a killed run.

        Args:
            world: The ranks.
            output: The path of the output.
            overwrite: Whether an existing output is replaced.
            kept: What to keep of the hidden directory of a killed run, if there is one; all the rest is removed. The
                caller must verify what it finds there.

        Raises:
            OutputError: On all ranks: ``output`` exists and must not be replaced, or cannot be written.
        """
        self._world = world
        self._lock: BinaryIO | None = None
        self.output = Path(os.path.realpath(output))
        self._display_name = output
        self._overwrite = overwrite
        self._kept = kept
        self.directory = world.agree(self._create)
        self._flag = self.directory / "failed"
        self._next_check = 0.0

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._world.rank == 0:
            is_resumable = self._kept and kind is not None and not issubclass(kind, UserError)
            if not is_resumable and not self._holds_output(self.directory):
                shutil.rmtree(self.directory, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()

    def phase(self, function: Callable[[], T]) -> list[T]:
        """Run ``function`` on every rank.

        Returns:
            The results of all ranks.

        Raises:
            UserError: On all ranks: the first one that ``function`` raised on any rank.
        """
        result: T | None = None
        error: UserError | None = None
        try:
            try:
                result = function()
            except OSError as caught:
                raise write_failed(self._display_name, caught) from None
        except UserError as caught:
            error = caught
            if not isinstance(error, _Stopped):
                self._raise_flag()
        # Every rank comes here, also after an error: a rank that left earlier would leave the others waiting.
        outcomes = self._world.allgather((result, error))
        errors = [error for _, error in outcomes if error is not None]
        if errors:
            # A rank that stopped because of another's failure has nothing to tell.
            first = next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
            raise first.on_every_rank()
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def check(self) -> None:
        """Stop if another rank failed; to be called from time to time in a long phase."""
        now = time.monotonic()
        if self._world.size > 1 and now >= self._next_check:
            self._next_check = now + _CHECK_S
            if self._flag.exists():
                raise _Stopped("another rank failed")

    def publish(self, name: str) -> None:
        """Rename ``name``, a file or directory in the hidden directory, to the output."""
        self._world.barrier()
        self._world.agree(lambda: self._publish(self.directory / name))

    def _create(self) -> Path:
        refuse_existing(self._display_name, self._overwrite)
        if self._overwrite and self.output.is_dir():
            _check_replaceable(self.output, self._display_name)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            # Next to the output, since a rename works only within a file system.
            prefix = f".{self.output.name}.tmp-"
            directory = None
            for left in glob.glob(os.path.join(glob.escape(str(self.output.parent)), glob.escape(prefix) + "*")):
                if (lock := _lock_if_dead(left)) is None:
                    continue
                if self._holds_output(Path(left)):
                    lock.close()
                    continue
                if self._kept and directory is None:
                    directory, self._lock = Path(left), lock
                    _remove_all_but(directory, {"lock", *self._kept})
                else:
                    shutil.rmtree(left, ignore_errors=True)
                    lock.close()
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
                self._lock = open(directory / "lock", "wb")  # noqa: SIM115 (held until the end)
                # Without locks, as on Lustre mounted without ``flock``, no run can tell whether another one is active:
                # each leaves the directories of the others alone, and a killed run is not resumed.
                lock_at_once(self._lock)
        except OSError as error:
            raise write_failed(self._display_name, error) from None
        return directory

    def _holds_output(self, directory: Path) -> bool:
        """Return whether a hidden directory has the output that was to be replaced, while the new one has no name."""
        return (directory / _OLD).exists() and not self.output.exists()

    def _raise_flag(self) -> None:
        with contextlib.suppress(OSError):  # if the disk is full, other ranks notice only at the end of the phase
            self._flag.touch()

    def _publish(self, new: Path) -> None:
        # Again, since the output may have appeared while the ranks were working.
        refuse_existing(self._display_name, self._overwrite)
        try:
            # Its entries must be on the disk before the name is, or a crash could leave an output that is not whole.
            if new.is_dir():
                flush_path(new)
            if new.is_dir() and self.output.is_dir():
                _check_replaceable(self.output, self._display_name)
            replace(new, self.output, self.directory / _OLD)  # which __exit__ removes with the hidden directory
            flush_path(self.output.parent)
        except OSError as error:
            raise write_failed(self._display_name, error) from None


def _check_replaceable(directory: Path, display_name: str) -> None:
    """Check that --overwrite would remove only files that this program makes."""
    others = sorted(name for name in os.listdir(directory) if not _GENERATED.fullmatch(name))
    if others:
        raise OutputError(
            f"{display_name} holds files that this program does not make (such as {others[0]}), so --overwrite "
            "does not replace it; choose another --output"
        )


def _lock_if_dead(directory: str) -> BinaryIO | None:
    """Lock the hidden directory of a killed run; return None if a run that is still active holds the lock."""
    path = os.path.join(directory, "lock")
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(path, "r+b"))  # some network file systems lock only what may be written
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):  # not removed in the meantime
            stack.pop_all()
            return lock
    return None


def _remove_all_but(directory: Path, names: set[str]) -> None:
    for path in directory.iterdir():
        if path.name in names:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
