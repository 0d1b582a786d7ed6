"""Requests for rows that a node does not own: forwarded to their owner, or queued until they arrive here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lapse_elmo.ps.directory import epoch_of, group_by_node, node_of
from lapse_elmo.ps.messages import Message, Pull, Push, Set, Want
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import SendToNode
from lapse_elmo.ps.wire import select

Request = TypeVar("Request", Pull, Push, Set, Want)


class Router:
    """Forwards and queues the requests of one node's manager."""

    def __init__(self, states: Sequence[SegmentState], node: int, send: SendToNode) -> None:
        self._states, self._node, self._send = states, node, send
        self._queued: list[Pull | Push | Set | Want] = []
        self._arrived = False

    def select_owned(self, message: Request, chunk: slice | None = None) -> Request:
        """Return the part of a request (or of its ``chunk``) whose main copies are here, and :meth:`route` the rest.

        Replicas do not serve the workers of other nodes: a push to a replica would reach the owner, where the same
        worker's next pull may look for it, only by the next round.
        """
        rows = self._states[message.segment].rows
        wanted = message.rows if chunk is None else message.rows[chunk]
        if rows.all_owned(wanted):
            whole = chunk is None or wanted.size == message.rows.size
            return message if whole else select(message, chunk)  # type: ignore[arg-type]
        owned = rows.owned(wanted)
        start = 0 if chunk is None else chunk.start
        self.route(message, np.flatnonzero(~owned) + start)
        return select(message, np.flatnonzero(owned) + start)

    def route(self, message: Request, indices: np.ndarray | None = None) -> None:
        """Forward the rows at ``indices`` (default: all) to their owners, or queue those in transit to this node.

        A stamp of the request that is newer than this node's own says that the row is on its way here. Otherwise this
        node's stamp is sent along, which is at least as new: each hop leads to a higher epoch, so the chain ends.
        """
        if indices is None:
            indices = np.arange(message.rows.size)
        if not indices.size:
            return
        state = self._states[message.segment]
        stamps = state.stamps[message.rows[indices]]
        coming = epoch_of(message.stamps[indices]) > epoch_of(stamps)
        if coming.any():
            self._queued.append(select(message, indices[coming]))
            state.stats.queued_rows += int(coming.sum())
            indices, stamps = indices[~coming], stamps[~coming]
        changes = {"forwarded": 1} if isinstance(message, Pull) else {}
        for node, chosen in group_by_node(node_of(stamps)):
            assert node != self._node, "a row is neither here nor on its way"
            self._send(node, select(message, indices[chosen], stamps=stamps[chosen], **changes))
        state.stats.forwarded_rows += indices.size

    def rows_arrived(self) -> None:
        """Have queued requests handled again, since main copies have arrived."""
        self._arrived = True

    def take_queued(self) -> list[Message]:
        """Return the queued requests if rows have arrived since; handling queues those that came too early again."""
        if not self._arrived:
            return []
        self._arrived = False
        # A copy, since handling them appends to the queue.
        queued, self._queued = self._queued, []
        return list(queued)


def complement(indices: np.ndarray, number: int) -> np.ndarray:
    """Return those of 0, ..., ``number`` - 1 that are not in ``indices``, ascending."""
    kept = np.ones(number, bool)
    kept[indices] = False
    return np.flatnonzero(kept)
