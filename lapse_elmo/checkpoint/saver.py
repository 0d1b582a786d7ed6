"""Save checkpoints in the background: training pauses for a copy of the state, which a thread then writes.

A save has three phases. While no rank trains, each copies its share of the state (:class:`Snapshot`). Then a thread of
every rank writes the rank's part of its node's files. Ranks exchange votes at every step; once all have written and
flushed theirs, a thread of rank 0 writes the manifest, renames the directory and removes old checkpoints. There is one
save at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from lapse_elmo.checkpoint.checksums import Piece, entries_of
from lapse_elmo.checkpoint.files import (
    Layout,
    TableShare,
    lay_out,
    read_gaps,
    table_arrays,
    write_file,
    write_table_share,
)
from lapse_elmo.checkpoint.folder import mark_best, partial_of, path_of, prune, publish, step_of
from lapse_elmo.checkpoint.manifest import DENSE, FORMAT, MANIFEST, SENTENCES, VERSION, Manifest, encode, table_file
from lapse_elmo.checkpoint.sentences import gather_sentences
from lapse_elmo.corpus.files import flush_file
from lapse_elmo.cursor import Cursor
from lapse_elmo.errors import OutputError, in_one_line
from lapse_elmo.metrics.versions import versions
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.step_report import Tally

T = TypeVar("T")

NUM_NEWEST = 2  # checkpoints kept by default, in addition to the best one
_CHUNK_ROWS = 16384  # rows per pull
_CANCEL_S = 5.0  # how long a cancelled thread is waited for: it may be flushing a file for minutes


@dataclass
class Snapshot:
    """A copy of a rank's share of the state, taken while no rank trains, and freed part by part as it is written.

    Attributes:
        tables: The rank's share of each table.
        dense: On rank 0, arrays by their name in ``dense.h5``.
        sentences: On rank 0 in mid-epoch, arrays by their name in ``sentences.h5``.
    """

    tables: dict[str, TableShare] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    sentences: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def take(cls, parameters: Parameters, sentences: tuple[np.ndarray, np.ndarray] | None, world: World) -> Snapshot:
        """Copy this rank's share (collective). On return, all ranks have copied theirs.

        Args:
            parameters: The parameters.
            sentences: In mid-epoch, this rank's sentences of the epoch and those of them still to be trained.
            world: The ranks.
        """
        snapshot = cls()
        parameters.sync_parameters()
        owned = {table.segment.name: parameters.server.owned_rows(table.segment.name) for table in parameters.tables}
        counts = world.node_gather_numbers(np.array([rows.size for rows in owned.values()], np.int64))
        firsts, totals = counts[: world.local_rank].sum(0).tolist(), counts.sum(0).tolist()
        for table, first, total in zip(parameters.tables, firsts, totals, strict=True):
            segment, rows = table.segment, owned[table.segment.name]
            values = _array_of_its_own(rows.size, segment.row_width)
            for start in range(0, rows.size, _CHUNK_ROWS):
                end = start + _CHUNK_ROWS
                table.server.pull_rows(segment.keys(rows[start:end]), values[start:end])
                world.progress.work_done()
            snapshot.tables[segment.name] = TableShare(rows, values, first, total)
        if world.rank == 0:
            snapshot.dense = {name: t.cpu().numpy().copy() for name, t in parameters.dense_tensors().items()}
        if sentences is not None:  # on all ranks or on none: they end an epoch together
            snapshot.sentences = gather_sentences(*sentences, world)
        parameters.server.barrier()
        return snapshot


class Saver:
    """Saves a run's checkpoints, and keeps the newest, the best and the pinned ones.

    All methods are collective. As a context manager it cancels the current save if the block raises.

    Attributes:
        pinned: Directories of checkpoints that are never removed.
        best: Held-out perplexity and directory of the best checkpoint, if there is one.
    """

    def __init__(
        self, run_dir: Path, world: World, kept: Sequence[Path] = (), best: tuple[float, Path] | None = None,
        num_newest: int = NUM_NEWEST,
    ) -> None:
        """Prepare to save checkpoints of the run in ``run_dir``.

        Args:
            run_dir: The run's directory.
            world: The ranks.
            kept: Existing checkpoints to keep, oldest first; the next save removes all others.
            best: Held-out perplexity and directory of the best of them.
            num_newest: How many of the newest checkpoints to keep.
        """
        self.run_dir = run_dir
        self.pinned: set[Path] = set()
        self._num_newest = num_newest
        self.best = best
        self._world = world
        # Of the code that runs, and not of a later checkout in the same place.
        self._versions = versions() if world.rank == 0 else {}
        self._kept = list(kept)
        self._snapshot = Snapshot()  # of the current save, until it is written
        self._layouts: dict[str, Layout] = {}  # of this node's file of each table
        self._thread: threading.Thread | None = None
        self._error: OutputError | None = None
        self._pieces: list[Piece] = []  # what this rank has written
        self._final: Path | None = None  # of the current save, until rank 0 begins to finish it
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
        """Start to save, after finishing the previous save.

        Args:
            parameters: The parameters to save.
            cursor: The position in the corpus.
            manifest: Further entries of the manifest.
            perplexity: Held-out perplexity, if it was measured at this step.

        Returns:
            The directory of the checkpoint, which exists once :meth:`finish` has returned.

        Raises:
            OutputError: On every rank, if this save or the previous one fails.
        """
        self.finish()
        final = path_of(self.run_dir, cursor.step)
        if perplexity is not None and (self.best is None or perplexity <= self.best[0]):
            self.best = perplexity, final
        best = {"step": step_of(self.best[1]), "perplexity": self.best[0]} if self.best else None
        self._manifest = {
            "format": FORMAT, "version": VERSION, **vars(cursor.position), "world_size": self._world.size,
            "num_nodes": self._world.num_nodes, **manifest,
            "best": best, "versions": self._versions,
        }
        self._world.agree(lambda: self._guarded(final, lambda: _make(partial_of(final))))
        self._final, self._written = final, False
        self._snapshot = Snapshot.take(parameters, cursor.sentences(), self._world)
        try:
            layouts = self._world.together(lambda: self._guarded(final, self._lay_out))
        except OutputError:
            self._abandon()
            raise
        self._layouts = self._world.node_bcast(layouts)
        self._run(final, self._write)
        return final

    def poll(self, votes: Tally) -> None:
        """Let rank 0 finish the save if all ranks have written their files; called after each step.

        Args:
            votes: How many ranks were :attr:`written` and :attr:`failed` at this step.

        Raises:
            OutputError: On every rank, if one has failed.
        """
        if votes.failed:
            self.finish()
        if self._final is not None and votes.written == votes.num_ranks:
            self._commit()

    def finish(self) -> None:
        """Wait for the current save.

        Raises:
            OutputError: On every rank, if it fails. Nothing of it is left behind.
        """
        try:
            self._world.together(self._join)
            if self._final is not None:
                self._commit()
                self._world.together(self._join)
        except OutputError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Give up the current save, of which nothing is left behind (collective)."""
        self._world.barrier()  # no rank writes any more
        self._snapshot = Snapshot()
        if self._world.rank == 0 and self._final is not None:
            shutil.rmtree(partial_of(self._final), ignore_errors=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop writing after an error, and remove the incomplete checkpoint. Not collective."""
        if kind is None:
            return
        self._cancelled = True
        # The error is reported only after this, and the other ranks do not wait for long. But a thread of rank 0 that
        # gives a complete checkpoint its name is waited for.
        if self._thread is not None:
            self._thread.join(_CANCEL_S if self._final is not None else None)
        if self._final is not None:
            shutil.rmtree(partial_of(self._final), ignore_errors=True)

    def _commit(self) -> None:
        assert self._final is not None
        gathered, self._pieces = self._world.gather(self._pieces), []
        final, self._final = self._final, None
        self._kept = [path for path in self._kept if path.name != final.name] + [final]
        if self._world.rank == 0:
            entries = entries_of(piece for pieces in gathered for piece in pieces)
            self._run(final, lambda: self._publish(final, {**self._manifest, "files": entries}))

    def _publish(self, final: Path, manifest: Manifest) -> None:
        # Old checkpoints are removed last, so that a crash on the way leaves the previous ones.
        partial = partial_of(final)
        try:
            with open(partial / MANIFEST, "wb") as file:
                file.write(encode(manifest))
                flush_file(file)
            publish(partial, final)
        except (OSError, RuntimeError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._kept = self._kept[-self._num_newest :]
        keep = set(self._kept) | self.pinned
        if self.best is not None:
            mark_best(self.run_dir, self.best[1])
            keep.add(self.best[1])
        prune(self.run_dir, keep)

    def _table_file(self, name: str) -> Path:
        assert self._final is not None
        return partial_of(self._final) / table_file(name, self._world.node, self._world.num_nodes)

    def _lay_out(self) -> dict[str, Layout]:
        """Create the files of this node's rows, on its first rank."""
        if self._world.local_rank:
            return {}
        return {
            name: lay_out(self._table_file(name), table_arrays(share.num_all, share.values.shape[1]))
            for name, share in self._snapshot.tables.items()
        }

    def _write(self) -> None:
        assert self._final is not None
        folder, tables, pieces = partial_of(self._final), self._snapshot.tables, []
        names = list(self._layouts)
        turn = self._world.local_rank % len(names)  # a file system may let one rank at a time write to a file
        for name in names[turn:] + names[:turn]:
            path, layout = self._table_file(name), self._layouts[name]
            pieces += write_table_share(path, tables.pop(name), layout, self._is_cancelled)  # and free the share
            pieces += read_gaps(path, layout) if self._world.local_rank == 0 else []
        for name, arrays in ((DENSE, self._snapshot.dense), (SENTENCES, self._snapshot.sentences)):
            if arrays:
                pieces += write_file(folder / name, arrays, self._is_cancelled)
        self._snapshot = Snapshot()
        self._pieces = pieces
        self._written = True

    def _is_cancelled(self) -> bool:
        """Return whether to stop writing; called before each block, so it also tells the watchdog of progress."""
        self._world.progress.work_done_in_thread()
        return self._cancelled

    def _run(self, final: Path, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread, which sets this rank's error if a write fails. Other exceptions are bugs."""

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

    def _guarded(self, final: Path, work: Callable[[], T]) -> T:
        try:
            return work()
        except (OSError, RuntimeError) as error:  # HDF5 raises both for a failed write
            reason = getattr(error, "strerror", None) or in_one_line(error)
            message = f"cannot write checkpoint {final}: {reason}; free some space or choose another --run-dir"
            raise OutputError(message) from None


def _make(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _array_of_its_own(num_rows: int, width: int) -> np.ndarray:
    """Return a new float32 array whose memory the system gets back with the last reference to it.

    What ``malloc`` gets back it may keep: after each save, the memory of a share would be lost to the rest of the run.
    """
    size = 4 * num_rows * width
    if not size:
        return np.empty((num_rows, width), np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # fewer page faults while training pauses, where the kernel allows it
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(num_rows, width)
