"""The messages of the embedded engine: one frozen dataclass per kind.

docs/protocol.md lists the sender and the receiver of each kind and the order that it relies on. To add a kind, add a
class here with a new ``KIND``, an entry in ``KINDS``, a handler in the manager or the worker, and a row in the
document's table, which a test compares with this file. Fields that several kinds share:

- ``segment``: a segment's number, in the order of the layout.
- ``node``: the sender's node; of `Set`, `Push` and `HolderPush`, the node of the worker that called.
- ``origin``: the rank of the worker to answer. ``ticket``: the number by which it knows the call.
- ``rows``: (n,) row numbers within the segment. ``stamps``: (n,) their owner stamps as the sender knows them
  (:mod:`lapse_elmo.ps.directory`). ``values``: (n, width), whole rows unless the kind says otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

Ints: TypeAlias = np.ndarray  # (n,) int64
Values: TypeAlias = np.ndarray  # (n, width) float32


@dataclass(frozen=True)
class Message:
    """Base of all kinds. ``block`` holds the encoded message (:mod:`lapse_elmo.ps.wire`); arrays are views of it."""

    KIND: ClassVar[int]

    block: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclass(frozen=True)
class Intent(Message):
    """Worker to its manager: local rank ``worker`` will access ``rows`` in the clocks [start, end)."""

    KIND = 1
    segment: int
    worker: int
    start: int
    end: int
    rows: Ints


@dataclass(frozen=True)
class Localize(Message):
    """Worker to its manager: move ``rows`` to this node. Answered by `Done` when all have arrived."""

    KIND = 2
    segment: int
    worker: int
    origin: int
    ticket: int
    rows: Ints


@dataclass(frozen=True)
class Set(Message):
    """Worker to its manager, forwarded to the owners: overwrite ``rows``. Answered by `SetDone` to its manager."""

    KIND = 3
    segment: int
    node: int
    origin: int
    ticket: int
    rows: Ints
    stamps: Ints
    values: Values


@dataclass(frozen=True)
class Flush(Message):
    """Worker to its manager: send `Done` at the end of the next round to start, which is exact."""

    KIND = 4
    origin: int
    ticket: int


@dataclass(frozen=True)
class Freeze(Message):
    """Worker to its manager: with ``frozen`` 1 start no round and request no rows; with 0 resume. Then send `Done`."""

    KIND = 5
    origin: int
    ticket: int
    frozen: int


@dataclass(frozen=True)
class Stop(Message):
    """Worker to its manager: return from ``Manager.serve``."""

    KIND = 6


@dataclass(frozen=True)
class Pull(Message):
    """Worker to the believed owner of ``rows``, forwarded: send `Rows` and the first ``num_floats`` floats per row.

    ``indices`` (n,) are the rows' indices in the worker's call, returned with the answer. ``forwarded`` is 1 if a
    manager forwarded the request; the answer then carries the rows' stamps.
    """

    KIND = 7
    segment: int
    origin: int
    ticket: int
    num_floats: int
    forwarded: int
    rows: Ints
    stamps: Ints
    indices: Ints


@dataclass(frozen=True)
class Push(Message):
    """Worker of ``node`` to the believed owner of ``rows``, forwarded: push ``values``. Answered by `Done`.

    ``values`` are (n, segment width): gradients at the learning rate ``rate`` if the segment has a rule, else deltas.
    """

    KIND = 8
    segment: int
    node: int
    origin: int
    ticket: int
    rate: float
    rows: Ints
    stamps: Ints
    values: Values


@dataclass(frozen=True)
class HolderPush(Message):
    """Owner to the manager of the pushing worker, whose node holds replicas of ``rows``: apply the `Push` to them.

    Answered by `Done` to the worker.
    """

    KIND = 9
    segment: int
    node: int
    origin: int
    ticket: int
    rate: float
    rows: Ints
    values: Values


@dataclass(frozen=True)
class Rows(Message):
    """Manager, of rank ``sender``, to worker: answers a `Pull`; the values of ``rows`` follow in one transmission.

    ``stamps`` (n,) are the rows' current owner stamps if the request was forwarded, else (0,).
    """

    KIND = 10
    segment: int
    sender: int
    ticket: int
    rows: Ints
    stamps: Ints
    indices: Ints


@dataclass(frozen=True)
class Done(Message):
    """Manager to worker: ``count`` rows of the call ``ticket`` are complete."""

    KIND = 11
    ticket: int
    count: int


@dataclass(frozen=True)
class SetDone(Message):
    """Owner to the manager of the worker that called ``set``: ``rows`` are overwritten."""

    KIND = 12
    segment: int
    origin: int
    ticket: int
    rows: Ints


@dataclass(frozen=True)
class Want(Message):
    """Manager to the believed owner of ``rows``, forwarded: relocate or replicate each to its node of ``nodes``."""

    KIND = 13
    segment: int
    rows: Ints
    stamps: Ints
    nodes: Ints


@dataclass(frozen=True)
class Relocate(Message):
    """Owner to the new owner: the main copies of ``rows``; ``stamps`` already name the new owner."""

    KIND = 14
    segment: int
    rows: Ints
    stamps: Ints
    values: Values


@dataclass(frozen=True)
class Replicate(Message):
    """Owner ``node`` to a new holder: replicas of ``rows``."""

    KIND = 15
    segment: int
    node: int
    rows: Ints
    stamps: Ints
    values: Values


@dataclass(frozen=True)
class Moved(Message):
    """Former owner to the home of ``rows``: their new owner stamps."""

    KIND = 16
    segment: int
    rows: Ints
    stamps: Ints


@dataclass(frozen=True)
class Drop(Message):
    """Holder ``node`` to the owner: it has dropped its replicas of ``rows``, whose deltas were all sent."""

    KIND = 17
    segment: int
    node: int
    rows: Ints


@dataclass(frozen=True)
class Deltas(Message):
    """Holder ``node`` to the owner: the sums of what was added to its replicas of ``rows`` since its last `Deltas`."""

    KIND = 18
    segment: int
    node: int
    rows: Ints
    values: Values


@dataclass(frozen=True)
class Expiring(Message):
    """Holder ``node`` to the owner: it will drop its replicas of ``rows`` after this round; do not refresh them."""

    KIND = 22
    segment: int
    node: int
    rows: Ints


@dataclass(frozen=True)
class Sync(Message):
    """Holder ``node`` to an owner, after its `Deltas`: send the current values of its replicas that are out of date.

    With ``exact`` 1 also of those that may differ from the main copy by rounding alone.
    """

    KIND = 19
    node: int
    exact: int


@dataclass(frozen=True)
class Refresh(Message):
    """Owner ``node`` to a holder: answers a `Sync` with values of ``rows`` that include all deltas sent before it."""

    KIND = 20
    segment: int
    node: int
    rows: Ints
    values: Values


@dataclass(frozen=True)
class SyncDone(Message):
    """Owner ``node`` to a holder: the answer to its `Sync` is complete."""

    KIND = 21
    node: int


KINDS: tuple[type[Message], ...] = (
    Intent, Localize, Set, Flush, Freeze, Stop, Pull, Push, HolderPush, Rows, Done, SetDone, Want, Relocate, Replicate,
    Moved, Drop, Deltas, Expiring, Sync, Refresh, SyncDone,
)
