"""Saving in the background: a quick copy while all ranks stand still, then a thread that writes while they train.

A save passes through three states, at steps at which all ranks see each other's votes: every rank's thread writes
its files; when all have, rank 0's thread writes the manifest, gives the folder its name and removes old ones. There is
one save at a time.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lapse_elmo.checkpoint.files import Snapshot, write_dense_file, write_rank_file
from lapse_elmo.checkpoint.folder import clear, mark_best, partial_of, path_of, put
from lapse_elmo.checkpoint.manifest import DENSE, FORMAT, MANIFEST, VERSION, Manifest, encode, rank_file
from lapse_elmo.cursor import Cursor
from lapse_elmo.errors import OutputError, in_one_line
from lapse_elmo.metrics.versions import versions
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.step_report import Tally

NUM_NEWEST = 2


class Saver:
    """Saves a run's checkpoints, and keeps the newest, the best and pinned ones (collective, but for the properties).

    A context that stops a save under way when an error ends it.

    :param kept: checkpoints that are there already, oldest first; whatever else lies there goes with the next save.
    :param best: (held-out perplexity, folder) of the best of them.
    :param num_newest: how many of the newest stay.
    :ivar pinned: folders that stay, whatever comes later.
    """

    def __init__(
        self, run_dir: Path, world: World, kept: Sequence[Path] = (), best: tuple[float, Path] | None = None,
        num_newest: int = NUM_NEWEST,
    ) -> None:
        self.run_dir = run_dir
        self.pinned: set[Path] = set()
        self._num_newest = num_newest
        self.best = best
        self._world = world
        self._kept = list(kept)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: OutputError | None = None
        self._files: dict[str, Any] = {}
        self._final: Path | None = None  # of the save under way, until rank 0 has been told to finish it
        self._manifest: Manifest = {}
        self._written = self._cancelled = False

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of the save under way."""
        return not self.failed and self._final is not None and self._written

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its files."""
        return self._error is not None

    def start(self, parameters: Parameters, cursor: Cursor, manifest: Manifest, perplexity: float | None) -> Path:
        """Begin to save; the folder that it will be, once :meth:`look` or :meth:`finish` has said so.

        :param manifest: what is to be told beside the files.
        :param perplexity: held-out, where it was measured at this step.
        :raises OutputError: on every rank, if this or the save before fails.
        """
        self.finish()
        final = path_of(self.run_dir, cursor.step)
        if perplexity is not None and (self.best is None or perplexity <= self.best[0]):
            self.best = perplexity, final
        best = {"step": int(self.best[1].name.removeprefix("step-")), "perplexity": self.best[0]} if self.best else None
        self._manifest = {
            "format": FORMAT, "version": VERSION, **vars(cursor.position), "world_size": self._world.size, **manifest,
            "best": best, "versions": versions() if self._world.rank == 0 else {},
        }
        self._world.agree(lambda: self._guarded(final, lambda: _make(partial_of(final))))
        self._snapshot.take(parameters, cursor.sentences(), self._world)
        self._final, self._written = final, False
        self._run(final, self._write)
        return final

    def look(self, votes: Tally) -> None:
        """After a step: let rank 0 finish a save that all ranks have written.

        :param votes: how many ranks were :attr:`written` and :attr:`failed` at this step.
        :raises OutputError: on every rank, if a rank has failed.
        """
        if votes.failed:
            self.finish()
        if self._final is not None and votes.written == votes.num_ranks:
            self._commit()

    def finish(self) -> None:
        """Wait for the save under way. :raises OutputError: on every rank, if it fails."""
        try:
            self._world.together(self._join)
            if self._final is not None:
                self._commit()
                self._world.together(self._join)
        except OutputError:
            self._world.barrier()  # nobody writes any more
            if self._world.rank == 0 and self._final is not None:
                shutil.rmtree(partial_of(self._final), ignore_errors=True)
            raise

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Not collective: after an error stop writing, and leave nothing half-written behind."""
        if kind is None:
            return
        self._cancelled = True
        if self._thread is not None:
            self._thread.join()
        if self._final is not None:
            shutil.rmtree(partial_of(self._final), ignore_errors=True)

    def _commit(self) -> None:
        assert self._final is not None
        parts = self._world.allgather(self._files)
        files = {name: entry for part in parts for name, entry in part.items()}
        final, self._final = self._final, None
        self._kept = [path for path in self._kept if path.name != final.name] + [final]
        if self._world.rank == 0:
            self._run(final, lambda: self._put(final, {**self._manifest, "files": files}))

    def _put(self, final: Path, manifest: Manifest) -> None:
        partial = partial_of(final)
        try:
            with open(partial / MANIFEST, "wb") as file:
                file.write(encode(manifest))
                file.flush()
                os.fsync(file.fileno())
            put(partial, final)
        except (OSError, RuntimeError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._kept = self._kept[-self._num_newest :]
        keep = set(self._kept) | self.pinned
        if self.best is not None:
            mark_best(self.run_dir, self.best[1])
            keep.add(self.best[1])
        clear(self.run_dir, keep)

    def _write(self) -> None:
        assert self._final is not None
        partial, world = partial_of(self._final), self._world
        name = rank_file(world.rank, world.size)
        files = {name: write_rank_file(partial / name, self._snapshot, self._is_cancelled)}
        if world.rank == 0:
            files[DENSE] = write_dense_file(partial / DENSE, self._snapshot, self._is_cancelled)
        self._files = files
        self._written = True

    def _is_cancelled(self) -> bool:
        self._world.progress.made_aside()  # asked before each block
        return self._cancelled

    def _run(self, final: Path, work: Callable[[], None]) -> None:
        """Do ``work`` in a thread. What a disk refuses becomes this rank's error; a bug ends the job."""

        def guarded() -> None:
            try:
                self._guarded(final, work)
            except OutputError as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, name="checkpoint")
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _guarded(self, final: Path, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:  # HDF5 has both for a disk that refuses
            reason = getattr(error, "strerror", None) or in_one_line(error)
            message = f"cannot write checkpoint {final}: {reason}; free some room or choose another --run-dir"
            raise OutputError(message) from None


def save(run_dir: Path, parameters: Parameters, cursor: Cursor, manifest: Manifest, world: World) -> Path:
    """Collective: save once and wait for it; the checkpoint's folder.

    :raises OutputError: on every rank, if it cannot be written; nothing of it is left behind.
    """
    saver = Saver(run_dir, world)
    path = saver.start(parameters, cursor, manifest, None)
    saver.finish()
    return path


def _make(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
