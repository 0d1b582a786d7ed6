"""Messages between workers and managers: thousands of rows at a time over MPI, never one message a row.

A message is a header of ten int64 and up to four arrays over its n rows, in one block of bytes, which is filled in
place, sent, and read in place. All waiting is done by polling with short sleeps, so that no core is kept busy.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

TO_MANAGER, TO_WORKER, VALUES = 1, 2, 3  # tags
FORWARDED = 1  # extra of what came by way of another manager

_HEADER = 10
_HAS_STAMPS, _HAS_POSITIONS, _HAS_VALUES = 1, 2, 4
_SPIN_S = 2e-4  # how long a wait polls without a break, where every rank has a core
_SHORTEST_SLEEP_S = 2e-5
# Of the time waited so far, what the next sleep lasts, and its bound in seconds. Of a rank's speed the polling of the
# alert takes 7 %; rows that are chased from node to node, as by relocation, arrive in a third of the time.
_CALM, _ALERT = (1 / 8, 4e-3), (1 / 32, 1e-3)
_PIECE_BYTES = 1 << 20  # of values in a message, so that sender and receiver work at the same time
_SMALLEST_REQUEST_BYTES, _LARGEST_REQUEST_BYTES, _GROWTH = 1 << 19, 1 << 24, 4  # of values that one message asks for
_SMALLEST_KEPT, _LARGEST_KEPT, _MOST_KEPT = 1 << 16, _PIECE_BYTES + (1 << 16), 32  # bytes, bytes, blocks
_UNUSED = 3  # references to a kept block: the list's, the loop's and the argument's


class Kind(IntEnum):
    """What a message asks for or answers.

    From workers: PULL, PUSH to where a row is believed to be; SET, LOCALIZE, INTENT, FLUSH, FREEZE, STOP to the manager
    of their own node. To workers: ROWS answers PULL, and the values follow in messages of their own, one for each of
    their `pieces`, for the worker to receive where they belong; its stamps are what the worker did not know. DONE (rows
    done in ``extra``) answers all others but INTENT and STOP.
    Between managers: WANT asks for rows; OWN and REPLICA bring them; OWNER tells a row's home who has it; DELTAS,
    APPLIED, REFRESH, REFRESHED and DROP keep replicas; RELAY is a DONE on its way to the worker.
    """

    PULL, PUSH, SET, LOCALIZE, INTENT, FLUSH, FREEZE, STOP = range(8)
    ROWS, DONE = range(8, 10)
    WANT, OWN, REPLICA, OWNER, DELTAS, APPLIED, REFRESH, REFRESHED, DROP, RELAY = range(10, 20)


@dataclass
class Message:
    """One message; arrays that it does not have are None.

    ``origin`` is the rank that is to be answered and ``ticket`` its name for the call. ``rows`` (n,) int64 of the
    segment number ``segment``; ``stamps`` (n,) int64, see :mod:`lapse_elmo.ps.whereabouts`; ``positions`` (n,) int64
    within the worker's call; ``values`` (n, width) float32. ``worker``: the asking worker's node (PUSH, SET) or its
    place in the node (LOCALIZE, INTENT); ``start`` is how many floats per row are wanted (PULL) or the bits of the
    learning rate (PUSH); ``start``, ``end``, ``extra`` of others: by kind.
    """

    kind: Kind
    segment: int
    origin: int
    ticket: int
    rows: np.ndarray
    stamps: np.ndarray | None
    positions: np.ndarray | None
    values: np.ndarray | None
    worker: int
    start: int
    end: int
    extra: int
    block: np.ndarray  # the bytes that all of this lies in

    @classmethod
    def of(
        cls, kind: Kind, segment: int = 0, origin: int = 0, ticket: int = 0, rows: np.ndarray | None = None, *,
        stamps: np.ndarray | None = None, positions: np.ndarray | None = None, width: int = 0,
        values: np.ndarray | None = None, worker: int = 0, start: int = 0, end: int = 0, extra: int = 0,
        blocks: Blocks | None = None,
    ) -> Message:
        """A message with copies of the arrays. With a ``width``, its values (n, width) are for the caller to fill.

        :param blocks: where the message's memory comes from.
        """
        number = 0 if rows is None else rows.size
        if values is not None:
            width = values.shape[1]
        has = (
            _HAS_STAMPS * (stamps is not None) | _HAS_POSITIONS * (positions is not None) | _HAS_VALUES * (width > 0)
        )
        arrays = 1 + (stamps is not None) + (positions is not None)
        size = 8 * (_HEADER + arrays * number) + 4 * width * number
        block = np.empty(size, np.uint8) if blocks is None else blocks.take(size)
        header = block[: 8 * _HEADER].view(np.int64)
        header[:] = (kind, segment, origin, ticket, number, has, worker, start, end, extra)
        message = cls.read(block)
        if rows is not None:
            message.rows[:] = rows
        if message.stamps is not None:
            message.stamps[:] = stamps
        if message.positions is not None:
            message.positions[:] = positions
        if values is not None and message.values is not None:
            message.values[:] = values
        return message

    @classmethod
    def read(cls, block: np.ndarray) -> Message:
        """The message in a block of bytes, as views."""
        kind, segment, origin, ticket, number, has, worker, start, end, extra = (
            block[: 8 * _HEADER].view(np.int64).tolist()
        )
        arrays: list[np.ndarray | None] = []
        at = 8 * _HEADER
        for flag in (0, _HAS_STAMPS, _HAS_POSITIONS):
            if flag and not has & flag:
                arrays.append(None)
                continue
            arrays.append(block[at : at + 8 * number].view(np.int64))
            at += 8 * number
        values = None
        if has & _HAS_VALUES and number:
            values = block[at:].view(np.float32).reshape(number, -1)
        rows = arrays[0]
        assert rows is not None
        return cls(
            Kind(kind), segment, origin, ticket, rows, arrays[1], arrays[2], values, worker, start, end, extra, block
        )

    def part(self, chosen: np.ndarray | slice, stamps: np.ndarray | None = None) -> Message:
        """The same message about the rows at ``chosen`` only; with new ``stamps``, if given, it counts as forwarded."""
        extra = self.extra if stamps is None else FORWARDED
        if stamps is None and self.stamps is not None:
            stamps = self.stamps[chosen]
        return Message.of(
            self.kind, self.segment, self.origin, self.ticket, self.rows[chosen], stamps=stamps,
            positions=None if self.positions is None else self.positions[chosen],
            values=None if self.values is None else self.values[chosen],
            worker=self.worker, start=self.start, end=self.end, extra=extra,
        )


class Blocks:
    """Memory for messages, used again: that of a new block costs more than to fill it. For one thread.

    A block is free again when nothing but this list refers to it. The first free one is taken: few stay in the cache.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _MOST_KEPT * _LARGEST_KEPT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # where the machine allows it, MPI then looks up fewer pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._blocks: list[np.ndarray] = []

    def rows(self, number: int, width: int) -> np.ndarray:
        """Room for values (number, width) float32."""
        return self.take(4 * number * width).view(np.float32).reshape(number, width)

    def take(self, size: int) -> np.ndarray:
        """A block of ``size`` bytes."""
        if size < _SMALLEST_KEPT or size > _LARGEST_KEPT:
            return np.empty(size, np.uint8)
        for block in self._blocks:
            if sys.getrefcount(block) == _UNUSED:
                return block[:size]
        if len(self._blocks) == _MOST_KEPT:
            return np.empty(size, np.uint8)
        block = np.frombuffer(self._map, np.uint8, _LARGEST_KEPT, len(self._blocks) * _LARGEST_KEPT)
        self._blocks.append(block)
        return block[:size]


def pieces(number: int, width: int) -> Iterator[slice]:
    """Slices of ``number`` rows whose values fit into a message each."""
    size = _rows_in(_PIECE_BYTES, width)
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def growing_pieces(number: int, width: int) -> Iterator[slice]:
    """Slices of ``number`` rows to ask for in a message each: ever more, so that their owner can soon begin."""
    start, size = 0, _rows_in(_SMALLEST_REQUEST_BYTES, width)
    while start < number:
        yield slice(start, min(start + size, number))
        start += size
        size = min(_GROWTH * size, _rows_in(_LARGEST_REQUEST_BYTES, width))


def _rows_in(num_bytes: int, width: int) -> int:
    return max(num_bytes // (4 * width), 1)


class Patience:
    """Waits that get longer: first without a break, then asleep.

    :param spin: whether there is a core for it.
    :param alert: whether to sleep less; of effect only with ``spin``.
    """

    def __init__(self, spin: bool, alert: bool = False) -> None:
        self._spin_s = _SPIN_S if spin else 0.0
        self._share, self._longest_s = _ALERT if spin and alert else _CALM
        self.reset()

    def reset(self, spin: bool = True) -> None:
        """Something happened: the next wait is short again, or at least (without ``spin``) the shortest sleep."""
        self._start = time.perf_counter() - (0.0 if spin else self._spin_s)

    def wait(self) -> None:
        """Let a moment pass, and others work."""
        waited_s = time.perf_counter() - self._start
        if waited_s < self._spin_s:
            time.sleep(0)  # lets the rank's other thread have Python's lock
            return
        time.sleep(min(max(self._share * waited_s, _SHORTEST_SLEEP_S), self._longest_s))


class Mailbox:
    """What one thread of a rank sends and receives.

    :param comm: a communicator for the server's messages alone.
    :param tag: of the messages that are for this mailbox.
    """

    def __init__(self, comm: MPI.Comm, tag: int, patience: Patience) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._tag = tag
        self._patience = patience
        self._outgoing: list[tuple[MPI.Request, np.ndarray]] = []
        self._status = MPI.Status()
        self.blocks = Blocks()
        self.sent = 0
        self.sent_bytes = 0

    def send(self, rank: int, tag: int, message: Message) -> None:
        """Begin to send; the message must not be changed any more."""
        block = message.block
        self._outgoing.append((self._comm.Isend([block, self._mpi.BYTE], rank, tag), block))
        self.sent += 1
        self.sent_bytes += block.size

    def send_values(self, rank: int, values: np.ndarray) -> None:
        """Begin to send ``values`` to the worker of ``rank``; they must not be changed any more."""
        self._let_go()
        self._outgoing.append((self._comm.Isend([values, self._mpi.FLOAT], rank, VALUES), values))
        self.sent_bytes += values.nbytes

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        """Receive into ``values`` the next that ``rank`` sends by :meth:`send_values`."""
        self._complete(self._comm.Irecv([values, self._mpi.FLOAT], rank, VALUES))

    def receive(self) -> Message | None:
        """The next message, or None if none has come. Messages of one sender come in the order of sending."""
        self._let_go()
        found = self._comm.Improbe(self._mpi.ANY_SOURCE, self._tag, self._status)
        if found is None:
            return None
        block = self.blocks.take(self._status.Get_count(self._mpi.BYTE))
        self._complete(found.Irecv([block, self._mpi.BYTE]))
        return Message.read(block)

    def _complete(self, request: MPI.Request) -> None:
        self._patience.reset()
        while not request.Test():
            self._patience.wait()
        self._patience.reset()

    def finish(self) -> None:
        """Return when everything that was sent has left."""
        self._patience.reset()
        while self._outgoing:
            self._let_go()
            self._patience.wait()

    def _let_go(self) -> None:
        """Forget what has left, so that its memory can be used again."""
        if self._outgoing:
            self._outgoing = [pair for pair in self._outgoing if not pair[0].Test()]
