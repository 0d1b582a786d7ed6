"""How rows come to a node: wants, relocations, replicas, and the promotion of a replica that is the last one used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.ps.directory import group_by_node, home_of, node_of
from lapse_elmo.ps.intents import Intents
from lapse_elmo.ps.messages import Localize, Moved, Relocate, Replicate, Want
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import Rounds, SendToNode
from lapse_elmo.ps.routing import Router
from lapse_elmo.ps.transport import Transport
from lapse_elmo.ps.wire import chunks, new


@dataclass
class _PendingLocalize:
    """A localize under way: the rows that are still to come."""

    request: Localize
    rows: np.ndarray


class Moves:
    """Moves rows to and from one node.

    :param send, start: see :class:`~lapse_elmo.ps.rounds.Rounds`.
    :param done: answers (origin, ticket, count) a worker's call.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, num_nodes: int, technique: str, transport: Transport,
        send: SendToNode, start: Callable[[int, Iterator[None]], None], router: Router, rounds: Rounds,
        intents: Intents, clocks: np.ndarray, done: Callable[[int, int, int], None],
    ) -> None:
        self.technique = technique
        self._states, self._node, self._num_nodes = states, node, num_nodes
        self._transport, self._send, self._start = transport, send, start
        self._router, self._rounds = router, rounds
        self._intents, self._clocks, self._done = intents, clocks, done
        self._wants: list[list[np.ndarray]] = [[] for _ in states]
        self._pending_wants: list[list[Want]] = [[] for _ in states]
        self._moved: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in states]
        self._localizing: list[_PendingLocalize] = []

    # Asking for rows

    def want(self, state: SegmentState, rows: np.ndarray) -> None:
        """Have the distinct ``rows`` asked for that are neither here nor asked for already."""
        rows = rows[~(state.rows.present(rows) | state.wanted[rows])]
        if rows.size:
            state.wanted[rows] = True
            self._wants[state.number].append(rows)

    def send_wants(self) -> bool:
        """Ask for what is wanted; return whether there was anything."""
        if not any(self._wants):
            return False
        self._rounds.send_drops()  # an owner must not take a row that is wanted again for one that is held still
        for state, waiting in zip(self._states, self._wants, strict=True):
            if waiting:
                rows = np.concatenate(waiting)
                waiting.clear()
                stamps = state.stamps[rows]
                for node, chosen in group_by_node(node_of(stamps)):
                    some = rows[chosen]
                    nodes = np.full(some.size, self._node)
                    self._send(node, new(
                        Want, segment=state.number, rows=some, stamps=stamps[chosen], nodes=nodes
                    ))
        return True

    def on_localize(self, message: Localize) -> None:
        """Ask for the rows that are not here, and answer when all have come."""
        state = self._states[message.segment]
        rows = message.rows[~state.rows.present(message.rows)]
        self._localizing.append(_PendingLocalize(message, rows))
        self.want(state, rows)
        self._answer_localizes(state)

    def _answer_localizes(self, state: SegmentState) -> None:
        unfinished = []
        for waiting in self._localizing:
            if waiting.request.segment == state.number:
                waiting.rows = waiting.rows[state.wanted[waiting.rows]]
            if waiting.rows.size:
                unfinished.append(waiting)
            else:
                self._done(waiting.request.origin, waiting.request.ticket, waiting.request.rows.size)
        self._localizing = unfinished

    # Giving rows away

    def on_want(self, message: Want) -> None:
        """Serve a want together with those that come at about the same time."""
        self._pending_wants[message.segment].append(message)

    @property
    def num_pending_wants(self) -> int:
        """Wants that have come and are not being served yet."""
        return sum(map(len, self._pending_wants))

    @property
    def num_unreported(self) -> int:
        """Relocations of which the homes have not been reported."""
        return sum(map(len, self._moved))

    def serve_wants(self) -> bool:
        """Begin to serve all wants that have come; return whether there were any."""
        if not self.num_pending_wants:
            return False
        for state, waiting in zip(self._states, self._pending_wants, strict=True):
            if not waiting:
                continue
            rows = np.concatenate([message.rows for message in waiting])
            stamps = np.concatenate([message.stamps for message in waiting])
            nodes = np.concatenate([message.nodes for message in waiting])
            waiting.clear()
            owned = state.rows.owned(rows)
            if not owned.all():
                self._router.route(
                    new(Want, segment=state.number, rows=rows[~owned], stamps=stamps[~owned], nodes=nodes[~owned])
                )
                rows, stamps, nodes = rows[owned], stamps[owned], nodes[owned]
            may_move = self._may_relocate(state, rows)
            if self.technique == "adaptive" and rows.size:  # what several ask for at a time had better stay
                _, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
                may_move &= counts[inverse] == 1
            for node, chosen in group_by_node(nodes):
                request = new(
                    Want, segment=state.number, rows=rows[chosen], stamps=stamps[chosen], nodes=nodes[chosen]
                )
                self._start(node, self._serve(state, request, node, may_move[chosen]))
        return True

    def _may_relocate(self, state: SegmentState, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` may be relocated (n,) bool: under ``adaptive`` those that nobody else uses."""
        if self.technique == "adaptive":
            return (state.holders.num_holders[rows] == 0) & (state.intents[rows] == 0)
        return np.full(rows.size, self.technique == "relocation")

    def _serve(self, state: SegmentState, request: Want, node: int, may_move: np.ndarray) -> Iterator[None]:
        """Relocate rows to the node that wants them, or lend it replicas; one message or two per step."""
        for chunk in chunks(request.rows.size, state.segment.row_width):
            here = state.rows.owned(request.rows[chunk])
            if not here.all():  # given away since
                self._router.route(request, np.flatnonzero(~here) + chunk.start)
            rows = request.rows[chunk][here]
            moving = may_move[chunk][here] & self._may_relocate(state, rows)
            if moving.any():
                self._relocate(state, rows[moving], node)
            if not moving.all():
                self._replicate(state, rows[~moving], node)
            yield

    def promote(self, holder: int) -> Iterator[None]:
        """Let ``holder`` own the rows that are lent to it alone and that nobody uses here; one message per step."""
        if self.technique != "adaptive":
            return
        for state in self._states:
            rows = state.holders.sole_rows_of(holder)
            rows = rows[state.intents[rows] == 0]
            for chunk in chunks(rows.size, state.segment.row_width):
                some = rows[chunk]
                unused = some[state.intents[some] == 0]
                if unused.size:
                    state.holders.remove(unused, holder)
                    self._relocate(state, unused, holder)
                    yield

    def _relocate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Give main copies to ``receiver``, and tell their homes."""
        width = state.segment.row_width
        message = new(Relocate, self._transport, segment=state.number, rows=rows, stamps=rows.size, width=width)
        message.stamps[:] = state.give_main(rows, receiver, message.values)
        self._send(receiver, message)
        self._moved[state.number].append((rows, message.stamps.copy()))
        state.stats.relocated_out_rows += rows.size

    def send_moved(self) -> None:
        """Tell the homes of relocated rows their new owners."""
        for state, moved in zip(self._states, self._moved, strict=True):
            if not moved:
                continue
            rows, stamps = (np.concatenate(arrays) for arrays in zip(*moved, strict=True))
            moved.clear()
            homes = home_of(rows, self._num_nodes)
            reported = (homes != self._node) & (homes != node_of(stamps))
            for home, chosen in group_by_node(homes[reported]):
                self._send(home, new(
                    Moved, segment=state.number, rows=rows[reported][chosen], stamps=stamps[reported][chosen]
                ))

    def _replicate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Send ``receiver`` replicas."""
        # Changes that are not counted yet belong to no holder's version but to the next.
        state.holders.mark_changed(rows[state.rows.clear_dirty(rows)])
        state.holders.add(rows, receiver)
        message = new(
            Replicate, self._transport, segment=state.number, node=self._node, rows=rows, stamps=state.stamps[rows],
            width=state.segment.row_width,
        )
        state.rows.pull(rows, message.values)
        self._send(receiver, message)

    # Receiving rows

    def on_relocate(self, message: Relocate) -> None:
        """Main copies arrive."""
        state = self._states[message.segment]
        state.add_main(message.rows, message.stamps, message.values)
        state.stats.relocated_in_rows += message.rows.size
        self._answer_localizes(state)
        self._router.rows_arrived()

    def on_replicate(self, message: Replicate) -> None:
        """Replicas arrive."""
        state = self._states[message.segment]
        state.add_replicas(message.rows, message.stamps, message.values, message.node)
        state.stats.replicated_rows += message.rows.size
        for waiting in self._localizing:  # what a worker localized it has for its present clock, as by an intent
            if waiting.request.segment == state.number:
                rows = waiting.rows[~state.wanted[waiting.rows]]
                clock = int(self._clocks[waiting.request.worker])
                self._intents.add(state.number, rows, waiting.request.worker, clock, clock + 1)
        self._answer_localizes(state)
        self._rounds.schedule_release(state.number, message.rows[state.intents[message.rows] == 0])
