"""The messages of the embedded engine: one frozen dataclass per kind.

docs/protocol.md lists who sends which kind to whom, and the order that each of them relies on. A new kind is a new
class here, with a ``KIND`` of its own, and a handler in the manager or the worker. ``segment`` is a segment's number,
``origin`` the rank of the worker that is answered, ``ticket`` its name for the call, ``rows`` are numbers within the
segment, and ``stamps`` are owner stamps (:mod:`lapse_elmo.ps.directory`).
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
    """Base of all kinds. ``block`` holds the bytes that all fields lie in."""

    KIND: ClassVar[int]

    block: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclass(frozen=True)
class Intent(Message):
    """Worker to its manager: worker ``worker`` of the node will use ``rows`` in the clocks [start, end)."""

    KIND = 1
    segment: int
    worker: int
    start: int
    end: int
    rows: Ints


@dataclass(frozen=True)
class Localize(Message):
    """Worker to its manager: bring ``rows`` here. Answered by `Done` with the number of rows."""

    KIND = 2
    segment: int
    worker: int
    origin: int
    ticket: int
    rows: Ints


@dataclass(frozen=True)
class Set(Message):
    """Worker to its manager, forwarded to owners: overwrite ``rows``. Answered by `SetDone` to ``node``'s manager."""

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
    """Worker to its manager: answer with `Done` after one whole round that has not begun yet."""

    KIND = 4
    origin: int
    ticket: int


@dataclass(frozen=True)
class Freeze(Message):
    """Worker to its manager: with ``frozen`` 1 begin no round and want no rows until the next one with 0."""

    KIND = 5
    origin: int
    ticket: int
    frozen: int


@dataclass(frozen=True)
class Stop(Message):
    """Worker to its manager: return from `Manager.serve`."""

    KIND = 6


@dataclass(frozen=True)
class Pull(Message):
    """Worker to the believed owner of ``rows``, forwarded: send `Rows`, and values of ``num_floats`` per row.

    ``indices`` are the rows' places in the worker's call. ``forwarded``: whether another manager passed it on.
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
    """Worker of ``node`` to the believed owner of ``rows``, forwarded: push ``values``. Answered by `Done`."""

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
    """Owner to the node of the pushing worker, which holds replicas of ``rows``: push there. Answered by `Done`."""

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
    """Manager to worker, for a `Pull`: the values of ``rows`` follow, in one transmission per chunk.

    ``stamps`` (n,) are the rows' true owner stamps where the request was forwarded, else (0,).
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
    """Manager to worker: ``count`` rows of the call ``ticket`` are done."""

    KIND = 11
    ticket: int
    count: int


@dataclass(frozen=True)
class SetDone(Message):
    """Owner to the manager of the worker that called set: ``rows`` are overwritten."""

    KIND = 12
    segment: int
    origin: int
    ticket: int
    rows: Ints


@dataclass(frozen=True)
class Want(Message):
    """Manager to the believed owner of ``rows``, forwarded: move or lend each of them to its node of ``nodes`` (n,)."""

    KIND = 13
    segment: int
    rows: Ints
    stamps: Ints
    nodes: Ints


@dataclass(frozen=True)
class Relocate(Message):
    """Owner to a node: the main copies of ``rows`` move there; ``stamps`` already name the new owner."""

    KIND = 14
    segment: int
    rows: Ints
    stamps: Ints
    values: Values


@dataclass(frozen=True)
class Replicate(Message):
    """Owner ``node`` to another node: replicas of ``rows``."""

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
    """Holder ``node`` to the owner: its replicas of ``rows`` are gone."""

    KIND = 17
    segment: int
    node: int
    rows: Ints


@dataclass(frozen=True)
class Deltas(Message):
    """Holder ``node`` to the owner: what was added to its replicas of ``rows`` since it last sent deltas."""

    KIND = 18
    segment: int
    node: int
    rows: Ints
    values: Values


@dataclass(frozen=True)
class Expiring(Message):
    """Holder ``node`` to the owner: it will drop its replicas of ``rows`` after this round and needs no values."""

    KIND = 22
    segment: int
    node: int
    rows: Ints


@dataclass(frozen=True)
class Sync(Message):
    """Holder ``node`` to an owner, after its `Deltas`: send what has changed of the rows that are lent to it.

    With ``exact`` also the rows whose replicas may differ from the main copy in rounding alone.
    """

    KIND = 19
    node: int
    exact: int


@dataclass(frozen=True)
class Refresh(Message):
    """Owner ``node`` to a holder, for a `Sync`: current values of ``rows``, which include all deltas sent before it."""

    KIND = 20
    segment: int
    node: int
    rows: Ints
    values: Values


@dataclass(frozen=True)
class SyncDone(Message):
    """Owner ``node`` to a holder: all that its `Sync` asked for was sent."""

    KIND = 21
    node: int


KINDS: tuple[type[Message], ...] = (
    Intent, Localize, Set, Flush, Freeze, Stop, Pull, Push, HolderPush, Rows, Done, SetDone, Want, Relocate, Replicate,
    Moved, Drop, Deltas, Expiring, Sync, Refresh, SyncDone,
)
