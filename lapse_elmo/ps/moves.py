"""How rows come to a node: wants, relocations, replicas, and the promotion of a replica that is the last one used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.ps.directory import groups, home_of, node_of
from lapse_elmo.ps.intents import Intents
from lapse_elmo.ps.messages import Lend, Localize, Moved, Own, Want
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import Rounds, SendToNode
from lapse_elmo.ps.routing import Router
from lapse_elmo.ps.transport import Transport
from lapse_elmo.ps.wire import new, pieces

_MERGE_S = 0.001  # wants wait so long for others, to be sent together


@dataclass
class _Waiting:
    """A localize under way: the rows that are still to come."""

    request: Localize
    rows: np.ndarray


class Moves:
    """Moves rows to and from one node.

    :param done: answers (origin, ticket, count) a worker's call.
    """

    def __init__(
        self, states: Sequence[SegmentState], node: int, num_nodes: int, technique: str, transport: Transport,
        send: SendToNode, router: Router, rounds: Rounds, intents: Intents, clocks: np.ndarray,
        done: Callable[[int, int, int], None],
    ) -> None:
        self.technique = technique
        self._states, self._node, self._num_nodes = states, node, num_nodes
        self._transport, self._send, self._router, self._rounds = transport, send, router, rounds
        self._intents, self._clocks, self._done = intents, clocks, done
        self._wants: list[list[np.ndarray]] = [[] for _ in states]
        self._wanted_since: float | None = None
        self._localizing: list[_Waiting] = []

    # Asking for rows

    def want(self, state: SegmentState, rows: np.ndarray) -> None:
        """Have the distinct ``rows`` asked for that are neither here nor asked for already."""
        rows = rows[~(state.rows.present(rows) | state.wanted[rows])]
        if rows.size:
            state.wanted[rows] = True
            self._wants[state.number].append(rows)
            if self._wanted_since is None:
                self._wanted_since = self._transport.now()

    def send_wants(self) -> bool:
        """Ask for what is wanted, unless more may be about to come; return whether anything was sent."""
        if self._wanted_since is None or self._transport.now() - self._wanted_since < _MERGE_S:
            return False
        self._wanted_since = None
        self._rounds.send_drops()  # an owner must not take a row that is wanted again for one that is held still
        for state, waiting in zip(self._states, self._wants, strict=True):
            if waiting:
                rows = np.concatenate(waiting)
                waiting.clear()
                stamps = state.stamps[rows]
                for node, chosen in groups(node_of(stamps)):
                    self._send(node, new(
                        Want, segment=state.number, node=self._node, rows=rows[chosen], stamps=stamps[chosen]
                    ))
        return True

    def on_localize(self, message: Localize) -> None:
        """Ask for the rows that are not here, and answer when all have come."""
        state = self._states[message.segment]
        rows = message.rows[~state.rows.present(message.rows)]
        self._localizing.append(_Waiting(message, rows))
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

    def serve_want(self, message: Want) -> Iterator[None]:
        """Relocate rows to the node that wants them, or lend it replicas; one message per step."""
        state = self._states[message.segment]
        for piece in pieces(message.rows.size, state.segment.row_width):
            some = self._router.owned_part(message, piece).rows
            if self.technique == "adaptive":
                leave = (state.lending.num_holders[some] == 0) & (state.intents[some] == 0)
            else:
                leave = np.full(some.size, self.technique == "relocation")
            if leave.any():
                self._relocate(state, some[leave], message.node)
            if not leave.all():
                self._lend(state, some[~leave], message.node)
            yield

    def promote(self, holder: int) -> Iterator[None]:
        """Let ``holder`` own the rows that are lent to it alone and that nobody uses here; one message per step."""
        if self.technique != "adaptive":
            return
        for state in self._states:
            rows = state.lending.rows_of(holder)
            rows = rows[(state.lending.num_holders[rows] == 1) & (state.intents[rows] == 0)]
            for piece in pieces(rows.size, state.segment.row_width):
                some = rows[piece]
                unused = some[state.intents[some] == 0]
                if unused.size:
                    state.lending.give_up(unused, holder)
                    self._relocate(state, unused, holder)
                    yield

    def _relocate(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Give main copies to ``receiver``, and tell their homes."""
        width = state.segment.row_width
        message = new(Own, self._transport, segment=state.number, rows=rows, stamps=rows.size, width=width)
        message.stamps[:] = state.give_main(rows, receiver, message.values)
        self._send(receiver, message)
        for home, chosen in groups(home_of(rows, self._num_nodes)):
            if home not in (self._node, receiver):
                self._send(home, new(
                    Moved, segment=state.number, rows=rows[chosen], stamps=message.stamps[chosen]
                ))
        state.stats.relocated_out_rows += rows.size

    def _lend(self, state: SegmentState, rows: np.ndarray, receiver: int) -> None:
        """Send ``receiver`` replicas."""
        # Changes that are not counted yet belong to no holder's version but to the next.
        state.lending.changed(rows[state.rows.clean(rows)])
        state.lending.lend(rows, receiver)
        message = new(
            Lend, self._transport, segment=state.number, node=self._node, rows=rows, stamps=state.stamps[rows],
            width=state.segment.row_width,
        )
        state.rows.pull(rows, message.values)
        self._send(receiver, message)

    # Receiving rows

    def on_own(self, message: Own) -> None:
        """Main copies arrive."""
        state = self._states[message.segment]
        state.add_main(message.rows, message.stamps, message.values)
        state.stats.relocated_in_rows += message.rows.size
        self._answer_localizes(state)
        self._router.arrived()

    def on_lend(self, message: Lend) -> None:
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
        self._rounds.release_later(state.number, message.rows[state.intents[message.rows] == 0])
