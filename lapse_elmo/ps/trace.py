"""Trace of the accesses to some rows, and of their relocations and replicas, in files of tab-separated values.

:class:`TracedServer` is the embedded server with a trace. It adds to methods of :class:`EmbeddedServer` and of the
manager's :class:`SegmentState`, so a server without a trace runs the same code as if this module did not exist.

Each rank writes ``rank-RANK.tsv`` with the calls of its worker, and the first rank of each node ``node-NODE.tsv`` with
what the node's manager does. They are two files since two threads write them, neither of which must wait for the other.
:data:`COLUMNS` is the header of each; :func:`read_trace` reads them all. The events that AdaPM's ``sys.trace.keys``
also has are named as there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from lapse_elmo.errors import OutputError
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import Array
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout, Segment
from lapse_elmo.ps.messages import Pull, Push
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rows import REPLICA
from lapse_elmo.ps.sampling import Sampler

_BUFFER_BYTES = 1 << 18
_LOCAL = {True: "1", False: "0", None: ""}


class Event(NamedTuple):
    """What happened to one row; a line of a trace.

    Attributes:
        time_s: When, in seconds since 1970 by the clock of this machine.
        clock: The worker's clock; for events of a manager, the smallest clock of the node's workers.
        node: The node.
        rank: The worker's rank; None for events of a manager.
        segment: The segment.
        row: The row's number within the segment.
        event: By a worker: ``pull``, ``push``, ``set``, ``localize``, ``intent``. By a manager: ``alloc`` and
            ``dealloc`` (the main copy is on the node from now on, or no longer), ``replica_setup``, ``replica_drop``.
        local: Whether the row was on the worker's node; None for events of a manager.
        start: First clock of an intent, else None.
        end: Clock at which an intent ends, else None.
    """

    time_s: float
    clock: int
    node: int
    rank: int | None
    segment: str
    row: int
    event: str
    local: bool | None
    start: int | None
    end: int | None


COLUMNS = Event._fields


def read_trace(folder: Path) -> list[Event]:
    """Return the events of all files of a trace, by time.

    The last line of a file may be cut off, if its job was killed. Such lines are skipped.
    """
    events = []
    for path in sorted(folder.glob("*.tsv")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            fields = line[:-1].split("\t")
            if line.endswith("\n") and len(fields) == len(COLUMNS) and fields[0] != COLUMNS[0]:
                events.append(_parsed(fields))
    return sorted(events, key=lambda event: event.time_s)


def _parsed(fields: list[str]) -> Event:
    time_s, clock, node, rank, segment, row, event, local, start, end = fields
    rank_, start_, end_ = (int(text) if text else None for text in (rank, start, end))
    local_ = bool(int(local)) if local else None
    return Event(float(time_s), int(clock), int(node), rank_, segment, int(row), event, local_, start_, end_)


class _Log:
    """The file of one thread. It has no effect until it is opened.

    Args:
        traced: (num_rows,) bool by segment, the rows to trace.
        node: The node.
        rank: The worker's rank, or None for a manager.
        clocks: (workers,) int64, the clocks of the workers whose events these are; only read.
    """

    def __init__(self, traced: Mapping[str, np.ndarray], node: int, rank: int | None, clocks: np.ndarray) -> None:
        self._traced, self._clocks = traced, clocks
        self._who = f"{node}\t{'' if rank is None else rank}"
        self._name = f"node-{node:05d}.tsv" if rank is None else f"rank-{rank:05d}.tsv"
        self._file: TextIO | None = None

    def open(self, folder: Path) -> None:
        """Create the file, or append to that of the run which this one resumes."""
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self._name
            last = _last_byte(path)
            file = open(path, "a", _BUFFER_BYTES, encoding="utf-8")  # noqa: SIM115 (open for as long as the server)
        if not last:
            file.write("\t".join(COLUMNS) + "\n")
        elif last != b"\n":  # a line that a killed job has cut off must not run into the next one
            file.write("\n")
        self._file = file

    def flush(self) -> None:
        """Write what the buffer holds, if the file is open."""
        if self._file is not None:
            with _writing(Path(self._file.name).parent):
                self._file.flush()

    def close(self) -> None:
        """Write what is left, if the file is open."""
        self._clocks = self._clocks.copy()  # else the view would keep the node's shared memory
        file, self._file = self._file, None
        if file is not None:
            with _writing(Path(file.name).parent):
                file.close()

    def select(self, segment: Segment, rows: np.ndarray) -> np.ndarray:
        """Return those of ``rows`` that are traced."""
        return rows[self._traced[segment.name][rows]]

    def add(
        self, event: str, segment: Segment, rows: np.ndarray, local: np.ndarray | None = None,
        clocks: tuple[int, int] | None = None,
    ) -> None:
        """Write an event of each of ``rows``.

        Args:
            event: Its name.
            segment: The segment.
            rows: (n,) rows, all of them traced.
            local: (n,) bool, which of them are on the node.
            clocks: Start and end of an intent.
        """
        if self._file is None or not rows.size:
            return
        start, end = clocks or ("", "")
        before = f"{time.time():.6f}\t{self._clocks.min()}\t{self._who}\t{segment.name}"
        flags = [None] * rows.size if local is None else local.tolist()
        with _writing(Path(self._file.name).parent):
            self._file.writelines(
                f"{before}\t{row}\t{event}\t{_LOCAL[flag]}\t{start}\t{end}\n"
                for row, flag in zip(rows.tolist(), flags, strict=True)
            )


def _last_byte(path: Path) -> bytes:
    """Return the last byte of a file, of which the rest may not fit into memory; none if it is empty or missing."""
    if not path.exists() or not path.stat().st_size:
        return b""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Report that a trace cannot be written to ``folder`` if what is within cannot write."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write a trace to {folder}: {error.strerror}; make room, or drop --trace-rows"
        ) from None


class _TracedState(SegmentState):
    """The manager's bookkeeping of a segment, which also writes down what changes."""

    log: _Log

    def add_main(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray) -> None:
        some = self.log.select(self.segment, rows)
        promoted = some[self.rows.flags[some] & REPLICA != 0]
        super().add_main(rows, stamps, values)
        self.log.add("replica_drop", self.segment, promoted)
        self.log.add("alloc", self.segment, some)

    def give_main(self, rows: np.ndarray, receiver: int, out: np.ndarray) -> np.ndarray:
        new_stamps = super().give_main(rows, receiver, out)
        self.log.add("dealloc", self.segment, self.log.select(self.segment, rows))
        return new_stamps

    def add_replicas(self, rows: np.ndarray, stamps: np.ndarray, values: np.ndarray, owner: int) -> None:
        super().add_replicas(rows, stamps, values, owner)
        self.log.add("replica_setup", self.segment, self.log.select(self.segment, rows))

    def release(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gone, owners = super().release(rows)
        self.log.add("replica_drop", self.segment, self.log.select(self.segment, gone))
        return gone, owners


class TracedServer(EmbeddedServer):
    """The embedded server with a trace of some rows from :meth:`start_trace` on (construction is collective).

    Args:
        world: As for :class:`EmbeddedServer`, like all that follow but ``traced``.
        layout: The segments.
        sampled: What samples are drawn from.
        first_sample: Number of the first sample.
        traced: (n,) int64, the keys to trace. A call costs one look-up per key, and a line per traced key.
        **options: Further arguments of :class:`EmbeddedServer`.
    """

    _new_state = _TracedState

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0, *,
        traced: np.ndarray, **options: Any,
    ) -> None:
        self._traced = {segment.name: np.zeros(segment.num_rows, bool) for segment in layout.segments}
        for segment in layout.segments:
            rows = traced - segment.first_key
            self._traced[segment.name][rows[(rows >= 0) & (rows < segment.num_rows)]] = True
        super().__init__(world, layout, sampled, first_sample, **options)
        here = world.local_rank
        self._log = _Log(self._traced, world.node, world.rank, self._clocks[here : here + 1])

    def _occupy(self) -> list[SegmentState]:
        self._node_log = _Log(self._traced, self._world.node, None, self._clocks)
        states = super()._occupy()
        for state in states:
            assert isinstance(state, _TracedState)
            state.log = self._node_log
        return states

    def start_trace(self, folder: Path) -> None:
        """Begin to write; the trace starts with an ``alloc`` for each traced row that the node has.

        To be called before any worker announces an intent: rows that move meanwhile could be missed.

        Raises:
            OutputError: If the files cannot be written.
        """
        self._log.open(folder)
        if self._world.local_rank == 0:
            self._node_log.open(folder)
            for segment in self.layout.segments:
                rows = np.flatnonzero(self._traced[segment.name])
                self._node_log.add("alloc", segment, rows[self._rows[segment.name].owned(rows)])

    def _access(
        self, kind: type[Pull] | type[Push], segment: Segment, keys: np.ndarray, values: np.ndarray, rate: float = 0.0
    ) -> tuple[int, int]:
        some, local = self._look_up(segment, keys)  # before the access, which may wait for rows to arrive
        result = super()._access(kind, segment, keys, values, rate)
        self._log.add("pull" if kind is Pull else "push", segment, some, local)
        return result

    def set(self, keys: Array, values: Array) -> None:
        """Overwrite rows, and trace it."""
        super().set(keys, values)
        self._trace_call("set", keys)

    def localize_async(self, keys: Array) -> int:
        """Request rows, and trace it."""
        ticket = super().localize_async(keys)
        self._trace_call("localize", keys)
        return ticket

    def intent(self, keys: Array, start: int, end: int) -> None:
        """Announce access, and trace it."""
        super().intent(keys, start, end)
        self._trace_call("intent", keys, (start, end))

    def close(self) -> None:
        """Close the server, then the files.

        Raises:
            OutputError: On every rank, if what is left of the trace cannot be written.
        """
        super().close()
        # Together: after a stop by a signal, rank 0 ends the job as soon as its own files are closed.
        self._world.together(self._close_logs)

    def save_trace(self) -> None:
        """Write what the buffers hold (collective), for the end of a job by an error of all ranks.

        Raises:
            OutputError: On every rank, if it cannot be written.
        """

        def flush() -> None:
            self._log.flush()
            self._node_log.flush()

        self._world.together(flush)

    def halt(self) -> None:
        """Stop this node's manager at once, and write what is left of the trace."""
        super().halt()
        self._close_logs()

    def _close_logs(self) -> None:
        self._log.close()
        self._node_log.close()

    def _trace_call(self, event: str, keys: Array, clocks: tuple[int, int] | None = None) -> None:
        checked, segment = self.checked_keys(keys)
        if segment is not None:
            self._log.add(event, segment, *self._look_up(segment, checked), clocks)

    def _look_up(self, segment: Segment, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the traced rows among ``keys``, and which of them are on this node."""
        rows = self._log.select(segment, keys - segment.first_key)
        return rows, self._rows[segment.name].present(rows)
