"""Copy a rank's share of the state while no rank trains, for threads to write while training continues."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field

import numpy as np

from lapse_elmo.checkpoint.sentences import gather_sentences
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters

_CHUNK_ROWS = 16384  # rows per pull


@dataclass(frozen=True)
class TableShare:
    """A rank's share of the rows of a table that its node saves in one file.

    Attributes:
        rows: (n,) int64, the row numbers.
        values: (n, width) float32, the rows with the state of their update rule.
        first: Index of the share in the rows of the file.
        num_all: Rows of the file.
    """

    rows: np.ndarray
    values: np.ndarray
    first: int
    num_all: int


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
