"""The embedded engine: rows in memory that the ranks of a node share, on as many nodes as there are.

A worker reads and changes the rows of its node in place. For rows of other nodes it asks their managers
(:mod:`lapse_elmo.ps.manager`), and it can have them brought near: ``localize`` moves them; ``intent`` announces access,
and the ``technique`` decides what comes of it:

===============  ==============================================================================================
``adaptive``     a row moves to the node that intends to use it, unless another one does too: then it stays, and
                 all others that use it get replicas until their intents end (AdaPM). ``localize`` is the same
``relocation``   a row moves to whoever announced it last (Lapse, with intents as asynchronous ``localize``)
``replication``  rows stay at their homes, and nodes that announce them get replicas
``static``       rows stay at their homes, whatever is announced: a classic parameter server
===============  ==============================================================================================

Consistency. Rows with one copy (all of them under ``relocation`` and ``static``) are sequentially consistent per key,
also while they move, for calls that are waited for. Replicas are eventually consistent, with a bound: a worker waits in
:meth:`advance_clock` where its node's last complete round of synchronisation began more than ``staleness / 2 - 1``
clocks ago. So a push is at the row's owner after at most ``staleness / 2`` further clocks of the pushing worker, and at
all holders after as many of the owner's workers: where clocks advance together, everybody sees it ``staleness`` clocks
later. While rounds keep pace with steps, as they do unless cores are crowded, it takes one or two clocks.
:meth:`quiesce` makes all replicas equal at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lapse_elmo import native
from lapse_elmo.errors import ServerError
from lapse_elmo.ps.api import DONE, Array, Call, ParameterServer
from lapse_elmo.ps.layout import Layout, Segment, distinct
from lapse_elmo.ps.manager import TECHNIQUES, Manager
from lapse_elmo.ps.memory import NodeMemory, require_room
from lapse_elmo.ps.messages import TO_MANAGER, TO_WORKER, Kind, Mailbox, Message, Patience, growing_pieces, pieces
from lapse_elmo.ps.node_state import SegmentState, where_name
from lapse_elmo.ps.rows import COPY, MAIN, MAIN_ROWS, REPLICA_ROWS, SOURCE, open_rows, shapes_of
from lapse_elmo.ps.rules import bits_of
from lapse_elmo.ps.sampling import Sampler
from lapse_elmo.ps.whereabouts import groups, learn, node_of
from lapse_elmo.world import World


@dataclass
class _Call(Call):
    """A call that waits for ``remaining`` rows or answers; ``values`` (n, width) are pulled, or pushed at ``rate``."""

    remaining: int
    segment: Segment | None = None
    rows: np.ndarray | None = None
    values: np.ndarray | None = None
    rate: float = 0.0


class EmbeddedServer(ParameterServer):
    """Rows of ``layout`` on all nodes of ``world`` (collective).

    :param technique: see above; of no effect on one node.
    :param staleness: see above, in clocks; at least 2.
    :raises ConfigError: if a node's share of the rows does not fit into its shared memory.
    """

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0, *,
        technique: str = "adaptive", staleness: int = 4,
    ) -> None:
        super().__init__(layout, sampled, first_sample)
        assert technique in TECHNIQUES and staleness >= 2
        self._world = world
        self._technique = technique
        self._slack = staleness // 2 - 1
        self._replicates = technique in ("adaptive", "replication") and world.num_nodes > 1
        self._handled = 0
        self._manager: Manager | None = None
        require_room(world, layout.num_bytes)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "clocks": ((world.local_size,), np.int64), "synced": ((world.local_size,), np.int64)
        }
        for segment in layout.segments:
            shapes |= shapes_of(segment, world.num_nodes > 1) | {where_name(segment): ((segment.num_rows,), np.int64)}
        self._memory = NodeMemory(world, shapes)
        self.is_native = all(world.allgather(native.load(SOURCE) is not None))
        self._rows = {segment.name: open_rows(self._memory, segment, self.is_native) for segment in layout.segments}
        self._number = {segment.name: number for number, segment in enumerate(layout.segments)}
        self._where = {segment.name: self._memory.arrays[where_name(segment)] for segment in layout.segments}
        self._seen = {segment.name: np.zeros(segment.num_rows, np.int64) for segment in layout.segments}
        self._clocks, self._synced = self._memory.arrays["clocks"], self._memory.arrays["synced"]
        states = self._occupy()
        if world.num_nodes > 1:
            self._connect(states)
        world.barrier()

    def _occupy(self) -> list[SegmentState]:
        """Take this node's share of the rows; what its first rank knows of them."""
        world = self._world
        states: list[SegmentState] = []

        def take() -> None:
            if world.local_rank == 0:
                for name, array in self._memory.arrays.items():
                    if not name.endswith((MAIN_ROWS, REPLICA_ROWS)):  # of these, what is used
                        self._memory.reserve(name, 0, len(array))
                for number, segment in enumerate(self.layout.segments):
                    state = SegmentState(number, segment, self._memory, world.node, world.num_nodes, self.is_native)
                    state.occupy(world.num_nodes)
                    states.append(state)

        world.together(take)
        return states

    def _connect(self, states: list[SegmentState]) -> None:
        world = self._world
        assert world.comm is not None
        self._comm = world.comm.Dup()
        spin, alert = not world.oversubscribed, self._technique == "relocation"
        self._patience = Patience(spin, alert)
        self._mailbox = Mailbox(self._comm, TO_WORKER, self._patience)
        if world.local_rank == 0:
            patience = Patience(spin, alert)
            mailbox = Mailbox(self._comm, TO_MANAGER, patience)
            self._manager = Manager(
                mailbox, patience, states, self._technique, world.node, world.leaders, self._clocks, self._synced
            )
            self.stats.node = {state.segment.name: state.stats for state in states}
            self._manager.start()

    def pull_async(self, keys: Array, out: Array) -> int:
        return self._pull(keys, out, whole=False)

    def pull_rows(self, keys: Array, out: Array) -> None:
        self.wait(self._pull(keys, out, whole=True))

    def _pull(self, keys: Array, out: Array, whole: bool) -> int:
        keys, out, segment = self.checked("out", keys, out, writes=True, whole=whole)
        if segment is None:
            return DONE
        start = time.perf_counter()
        ticket, missing = self._access(Kind.PULL, segment, keys, out.numpy())
        stats = self.stats.segments[segment.name]
        stats.count_pull(keys.size, missing, out.shape[1])
        stats.pull_s += time.perf_counter() - start
        return ticket

    def push_async(self, keys: Array, values: Array) -> int:
        keys, values, segment = self.checked("values", keys, values)
        if segment is None:
            return DONE
        start = time.perf_counter()
        ticket, missing = self._access(Kind.PUSH, segment, keys, values.numpy(), self.rate_of(segment))
        stats = self.stats.segments[segment.name]
        stats.count_push(keys.size, missing, segment.width)
        stats.push_s += time.perf_counter() - start
        return ticket

    def set(self, keys: Array, values: Array) -> None:
        keys, values, segment = self.checked("values", keys, values, whole=True)
        if segment is None:
            return
        if distinct(keys).size != keys.size:
            raise ServerError("keys should be distinct in a set")
        rows = keys - segment.first_key
        missing = self._rows[segment.name].set(rows, values.numpy())
        if missing.size:
            # By way of this node's manager, see Manager._on_set.
            stamps = self._where[segment.name][rows[missing]]
            self.wait(self._request(
                missing.size, Kind.SET, self._number[segment.name], rows=rows[missing], stamps=stamps,
                values=values.numpy()[missing], worker=self._world.node,
            ))

    def localize_async(self, keys: Array) -> int:
        keys, segment = self.checked_keys(keys)
        self.stats.localized_rows += keys.size
        if segment is None or self._world.num_nodes == 1 or self._technique == "static":
            return DONE
        rows = distinct(keys - segment.first_key)
        rows = rows[~self._rows[segment.name].present(rows)]
        if not rows.size:
            return DONE
        number = self._number[segment.name]
        return self._request(rows.size, Kind.LOCALIZE, number, rows=rows, worker=self._world.local_rank)

    def intent(self, keys: Array, start: int, end: int) -> None:
        keys, segment = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size
        if segment is None or self._world.num_nodes == 1 or self._technique == "static":
            return
        self._send_home(Message.of(
            Kind.INTENT, self._number[segment.name], self._world.rank, rows=distinct(keys - segment.first_key),
            worker=self._world.local_rank, start=start, end=end,
        ))

    def advance_clock(self) -> int:
        clock = super().advance_clock()
        self._clocks[self._world.local_rank] = clock
        if self._replicates and clock - self._synced[self._world.local_rank] > self._slack:
            start = time.perf_counter()
            self._patience.reset()
            while clock - self._synced[self._world.local_rank] > self._slack:
                self._patience.wait()
            self.stats.clock_wait_s += time.perf_counter() - start
        return clock

    def _complete(self, call: Call) -> None:
        assert isinstance(call, _Call)
        if call.remaining:
            self._patience.reset(spin=call.rows is not None)  # else this node's manager needs the core
        while call.remaining:
            self._receive()

    def is_local(self, name: str) -> np.ndarray | None:
        if self._world.num_nodes == 1:
            return None
        return self._rows[name].present(np.arange(self.layout[name].num_rows))

    def placement(self, name: str, ends: np.ndarray) -> np.ndarray | None:
        if self._world.local_rank:
            return None
        starts = np.concatenate([[0], ends[:-1]])
        kinds = self._rows[name].kinds()
        return np.stack([np.add.reduceat(kinds == kind, starts) for kind in (MAIN, COPY)])

    def owned_rows(self, name: str) -> np.ndarray:
        self.require_open()
        if self._world.num_nodes > 1:
            self._freeze(True)
            self._drain()
        rows = np.flatnonzero(self._rows[name].owned())
        if self._world.num_nodes > 1:
            self._world.barrier()
            self._freeze(False)
        rank, size = self._world.local_rank, self._world.local_size
        return rows[rows.size * rank // size : rows.size * (rank + 1) // size]

    def quiesce(self) -> None:
        self.wait_all()
        self._world.barrier()
        if self._replicates:
            for _ in range(2):  # deltas to the owners, then values to the holders
                if self._manager is not None:
                    self.wait(self._request(1, Kind.FLUSH))
                self._world.barrier()

    def barrier(self) -> None:
        self.require_open()
        self._world.barrier()

    def close(self) -> None:
        if self.closed:
            return
        self.wait_all()
        self._world.barrier()
        if self._world.num_nodes > 1:
            self._freeze(True)
            self._drain()
            if self._manager is not None:
                self._send_home(Message.of(Kind.STOP))
                self._manager.join()
                for state in self._manager.states:
                    state.close()
            self._mailbox.finish()
            self._world.barrier()
            self._comm.Free()
        self.closed = True
        for rows in self._rows.values():
            rows.close()
        self._where.clear()
        del self._clocks, self._synced, self._manager
        self._memory.close()

    # Talking to managers

    def _access(
        self, kind: Kind, segment: Segment, keys: np.ndarray, values: np.ndarray, rate: float = 0.0
    ) -> tuple[int, int]:
        """Pull or push what is here and ask other nodes for the rest: (ticket, number of rows that are not here).

        Part by part, so that others work on one while the next is looked up.
        """
        rows = keys - segment.first_key
        here = self._rows[segment.name]
        access = here.pull if kind is Kind.PULL else partial(here.push, rate=rate)
        call = _Call(0, segment, rows, values, rate, stats=self.stats.segments[segment.name])
        ticket = DONE
        for part in self._parts(kind, rows.size, values.shape[1]):
            missing = access(rows[part], values[part])
            if missing.size:
                if ticket is DONE:
                    ticket = self._ticket(call)
                call.remaining += missing.size
                self._ask(kind, ticket, call, missing + part.start)
        return ticket, call.remaining

    def _parts(self, kind: Kind, number: int, width: int) -> Iterable[slice]:
        if self._world.num_nodes == 1:
            return (slice(0, number),)
        return growing_pieces(number, width) if kind is Kind.PULL else pieces(number, width)

    def _ask(self, kind: Kind, ticket: int, call: _Call, missing: np.ndarray) -> None:
        """Send what a call needs of the rows at ``missing`` to the nodes that have them."""
        segment = call.segment
        assert segment is not None and call.rows is not None and call.values is not None
        asked = call.rows[missing]
        stamps = np.maximum(self._where[segment.name][asked], self._seen[segment.name][asked])
        for node, chosen in groups(node_of(stamps)):
            places = missing[chosen]
            message = Message.of(
                kind, self._number[segment.name], self._world.rank, ticket, asked[chosen], stamps=stamps[chosen],
                positions=places if kind is Kind.PULL else None, width=segment.width if kind is Kind.PUSH else 0,
                worker=self._world.node, start=call.values.shape[1] if kind is Kind.PULL else bits_of(call.rate),
                blocks=self._mailbox.blocks,
            )
            if message.values is not None:
                np.take(call.values, places, 0, message.values, mode="clip")  # (else through a buffer)
            self._mailbox.send(self._world.leaders[node], TO_MANAGER, message)
            self.stats.segments[segment.name].sent_bytes += message.block.size

    def _request(self, number: int, kind: Kind, segment: int = 0, **what: Any) -> int:
        """Ask this node's manager for something that is answered by ``number`` in all; the ticket."""
        ticket = self._ticket(_Call(number))
        self._send_home(Message.of(kind, segment, self._world.rank, ticket, **what))
        return ticket

    def _send_home(self, message: Message) -> None:
        self._mailbox.send(self._world.leaders[self._world.node], TO_MANAGER, message)

    def _receive(self) -> None:
        """Take in one answer, or let a moment pass."""
        message = self._mailbox.receive()
        if message is None:
            self._patience.wait()
            return
        call = self._calls[message.ticket]
        assert isinstance(call, _Call)
        if message.kind is Kind.ROWS:
            self._take_rows(call, message)
            call.remaining -= message.rows.size
        else:
            call.remaining -= message.extra
        self._handled += 1

    def _take_rows(self, call: _Call, message: Message) -> None:
        """Receive the rows that ``message`` announces: where they belong if they lie there side by side."""
        assert call.segment is not None and call.values is not None and message.positions is not None
        places, width = message.positions, call.values.shape[1]
        first, end = int(places[0]), int(places[-1]) + 1
        for piece in pieces(places.size, width):
            if end - first == places.size:  # positions ascend
                self._mailbox.receive_values(message.origin, call.values[first + piece.start : first + piece.stop])
            else:
                values = self._mailbox.blocks.rows(piece.stop - piece.start, width)
                self._mailbox.receive_values(message.origin, values)
                torch.from_numpy(call.values).index_copy_(0, torch.from_numpy(places[piece]), torch.from_numpy(values))
        if message.stamps is not None:
            learn(self._seen[call.segment.name], message.rows, message.stamps)

    def _freeze(self, frozen: bool) -> None:
        """Collective: from when all have returned no row moves, or again."""
        if self._manager is not None:
            self.wait(self._request(1, Kind.FREEZE, extra=int(frozen)))
        self._world.barrier()

    def _drain(self) -> None:
        """Collective: return when no message is on its way or being handled.

        Messages sent and handled are counted over all ranks; nothing is under way where as many were handled by one
        count as had been sent by the next.
        """
        handled_before = -1
        while True:
            counts = np.array([self._mailbox.sent, self._handled], np.int64)
            if self._manager is not None:
                counts += [self._manager.mailbox.sent, self._manager.handled]
            self._world.sum_(counts)
            if counts[0] == handled_before:
                return
            handled_before = int(counts[1])
