"""The embedded engine: rows in shared memory, on one node or several.

A worker accesses the rows of its node in place. For rows of other nodes it sends requests to their managers
(:mod:`lapse_elmo.ps.manager`). To make rows local, ``localize`` moves them, and ``intent`` announces access to them;
the ``technique`` determines what an intent leads to:

===============  ==============================================================================================
``adaptive``     a row moves to the node that intends to use it, unless another node does so too: then it stays, and
                 the other nodes get replicas until their intents end (AdaPM). ``localize`` does the same
``relocation``   a row moves to the node that announced it last (Lapse, with intents as asynchronous ``localize``)
``replication``  rows stay at their homes, and nodes that announce them get replicas
``static``       rows stay at their homes: a classic parameter server
===============  ==============================================================================================

Consistency: Rows with one copy (all rows under ``relocation`` and ``static``) are sequentially consistent per key, also
while they move, for calls that are waited for. Replicas are eventually consistent with bounded staleness: a worker
waits in ``advance_clock`` if its node's last complete round of synchronisation started more than ``staleness / 2 - 1``
clocks ago. So a push reaches the row's owner within ``staleness / 2`` further clocks of the pushing worker, and each
holder within as many clocks of the holder's workers: if clocks advance together, all see it after ``staleness`` clocks.
As long as rounds keep pace with steps, that is unless cores are oversubscribed, it takes one or two clocks.
``quiesce`` makes all copies equal to the bit. docs/protocol.md describes the messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import numpy as np

from lapse_elmo.errors import ServerError
from lapse_elmo.mpi.node_memory import require_room
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import DONE, Array, Call, ParameterServer
from lapse_elmo.ps.directory import MAX_NODES, is_copied
from lapse_elmo.ps.draining import drain
from lapse_elmo.ps.layout import Layout, Segment, distinct
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.manager import REPLICATING, TECHNIQUES, Manager
from lapse_elmo.ps.messages import Flush, Freeze, Intent, Localize, Pull, Push, Stop
from lapse_elmo.ps.node_state import SegmentState, cached_name, stamps_name
from lapse_elmo.ps.ordering import fence
from lapse_elmo.ps.platform import MpiPlatform, Platform, Shapes
from lapse_elmo.ps.requests import Requests, RowsCall
from lapse_elmo.ps.ring import Ring, ring_shapes
from lapse_elmo.ps.rows import COPY, MAIN, MAIN_ROWS, REPLICA_ROWS, NativeRows, array_shapes
from lapse_elmo.ps.sampling import Sampler
from lapse_elmo.ps.transport import TO_MANAGER, TO_WORKER, Backoff
from lapse_elmo.ps.wire import chunks, growing_chunks, new


class EmbeddedServer(ParameterServer):
    """The embedded parameter server (construction is collective); see the module for the consistency it promises.

    Args:
        world: The ranks.
        layout: The segments, whose rows are 0 at first.
        sampled: See :class:`~lapse_elmo.ps.api.ParameterServer`, as ``first_sample``.
        first_sample: Number of the first sample.
        technique: One of ``TECHNIQUES``; without effect on one node.
        staleness: Bound on the staleness of replicas in clocks, at least 2.
        platform: Access to the machine; by default the shared memory and the MPI of ``world``.

    Raises:
        ConfigError: If a node's share of the rows does not fit into its shared memory.
    """

    _new_state = SegmentState

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0, *,
        technique: str = "adaptive", staleness: int = 4, platform: Platform | None = None,
    ) -> None:
        super().__init__(layout, sampled, first_sample)
        assert technique in TECHNIQUES and staleness >= 2 and world.num_nodes <= MAX_NODES
        self._world, self._technique = world, technique
        self._slack = staleness // 2 - 1
        self._replicates = technique in REPLICATING and world.num_nodes > 1
        self._manager: Manager | None = None
        if platform is None:
            require_room(world, layout.bytes_on(world.num_nodes))
        self._platform = platform or MpiPlatform(world)
        several = world.num_nodes > 1
        wanted: Shapes = {"clocks": ((world.local_size,), np.int64), "synced": ((world.local_size,), np.int64)}
        for segment in layout.segments:
            wanted |= array_shapes(segment, several)
            wanted |= {name(segment): ((segment.num_rows,), np.int64) for name in (stamps_name, cached_name)}
        if several:
            wanted |= ring_shapes(world.local_size)
        self._memory = self._platform.memory(wanted)
        self._rows = {segment.name: self._platform.rows(self._memory, segment) for segment in layout.segments}
        self._number = {segment.name: number for number, segment in enumerate(layout.segments)}
        arrays = self._memory.arrays
        self._stamps = {segment.name: arrays[stamps_name(segment)] for segment in layout.segments}
        self._cached = {segment.name: arrays[cached_name(segment)] for segment in layout.segments}
        self._clocks, self._synced, self._fence = arrays["clocks"], arrays["synced"], fence()
        states = self._occupy()
        if several:
            self._connect(states)
        world.barrier()

    @property
    def is_native(self) -> bool:
        """Whether rows are accessed through rows.c, not under kernel locks."""
        return all(isinstance(rows, NativeRows) for rows in self._rows.values())

    def _occupy(self) -> list[SegmentState]:
        """Create this node's share of the rows; return the manager's bookkeeping on the node's first rank, else []."""
        world = self._world
        states: list[SegmentState] = []

        def take() -> None:
            if world.local_rank == 0:
                for name, array in self._memory.arrays.items():
                    if not name.endswith((MAIN_ROWS, REPLICA_ROWS)):  # these are reserved as slots are used
                        self._memory.reserve(name, 0, len(array))
                for number, segment in enumerate(self.layout.segments):
                    rows = self._platform.rows(self._memory, segment)
                    state = self._new_state(number, segment, self._memory, rows, world.node, world.num_nodes)
                    state.occupy()
                    states.append(state)

        world.together(take)
        return states

    def _connect(self, states: list[SegmentState]) -> None:
        """Connect the worker and, on the node's first rank, start the manager."""
        world = self._world
        spin, low_latency = not world.oversubscribed, self._technique == "relocation"
        arrays = self._memory.arrays
        rings = [Ring(*ends) for ends in zip(arrays["ring counters"], arrays["rings"], strict=True)]
        transport = self._platform.transport(TO_WORKER, low_latency=low_latency)
        self._requests = Requests(
            world, Mailbox(transport), Backoff(transport, spin, low_latency), rings[world.local_rank], self._calls,
            *([array[segment.name] for segment in self.layout.segments] for array in (self._stamps, self._cached)),
        )
        if world.local_rank == 0:
            transport = self._platform.transport(TO_MANAGER, low_latency=low_latency)
            self._manager = Manager(
                Mailbox(transport, rings), Backoff(transport, spin, low_latency), states, self._technique, world.node,
                world.leaders, self._clocks, self._synced,
            )
            self.stats.node = {state.segment.name: state.stats for state in states}
            self._platform.start(self._manager.serve, f"manager of node {world.node}", self.halt)

    def pull_async(self, keys: Array, out: Array) -> int:
        """Start a pull: rows of this node are copied at once, others requested."""
        return self._pull(keys, out, whole=False)

    def pull_rows(self, keys: Array, out: Array) -> None:
        """Copy whole rows, including the state of their update rule."""
        self.wait(self._pull(keys, out, whole=True))

    def _pull(self, keys: Array, out: Array, whole: bool) -> int:
        keys, out, segment = self.checked("out", keys, out, writes=True, whole=whole)
        if segment is None:
            return DONE
        start = time.perf_counter()
        ticket, missing = self._access(Pull, segment, keys, out.numpy())
        stats = self.stats.segments[segment.name]
        stats.count_pull(keys.size, missing, out.shape[1])
        stats.pull_s += time.perf_counter() - start
        return ticket

    def push_async(self, keys: Array, values: Array) -> int:
        """Start a push: rows of this node are changed at once, others sent to their owners."""
        keys, values, segment = self.checked("values", keys, values)
        if segment is None:
            return DONE
        start = time.perf_counter()
        ticket, missing = self._access(Push, segment, keys, values.numpy(), self.rate_of(segment))
        stats = self.stats.segments[segment.name]
        stats.count_push(keys.size, missing, segment.width)
        stats.push_s += time.perf_counter() - start
        return ticket

    def set(self, keys: Array, values: Array) -> None:
        """Overwrite rows; wait until their owners have done so and no replica on this node shows the old values.

        Copies of frequent rows on other nodes than their homes are overwritten by the next :meth:`quiesce`.
        """
        keys, values, segment = self.checked("values", keys, values, whole=True)
        if segment is None:
            return
        if distinct(keys).size != keys.size:
            raise ServerError("keys should be distinct in a set")
        rows = keys - segment.first_key
        elsewhere = self._is_copied(segment, rows)
        elsewhere[self._rows[segment.name].set(rows, values.numpy())] = True
        missing = np.flatnonzero(elsewhere)
        for chunk in chunks(missing.size, segment.row_width):  # waits for each: managers forward them without a limit
            some = missing[chunk]
            ticket = self._ticket(RowsCall(some.size))
            self._requests.send_set(segment, self._number[segment.name], ticket, rows[some], values.numpy()[some])
            self.wait(ticket)

    def localize_async(self, keys: Array) -> int:
        """Request rows through this node's manager."""
        keys, segment = self.checked_keys(keys)
        self.stats.localized_rows += keys.size
        if segment is None or self._world.num_nodes == 1 or self._technique == "static":
            return DONE
        rows = distinct(keys - segment.first_key)
        rows = rows[~self._rows[segment.name].present(rows)]
        if not rows.size:
            return DONE
        ticket = self._ticket(RowsCall(rows.size))
        for chunk in self._requests.ring_chunks(rows.size, 8):
            self._requests.send_local(new(
                Localize, segment=self._number[segment.name], worker=self._world.local_rank, origin=self._world.rank,
                ticket=ticket, rows=rows[chunk],
            ))
        return ticket

    def intent(self, keys: Array, start: int, end: int) -> None:
        """Announce access to this node's manager."""
        keys, segment = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size
        if segment is None or self._world.num_nodes == 1 or self._technique == "static":
            return
        rows = distinct(keys - segment.first_key)
        rows = rows[rows >= segment.frequent]
        for chunk in self._requests.ring_chunks(rows.size, 8):
            self._requests.send_local(new(
                Intent, segment=self._number[segment.name], worker=self._world.local_rank, start=start, end=end,
                rows=rows[chunk],
            ))

    def advance_clock(self) -> int:
        """End a step; wait while replicas could be staler than promised."""
        clock = super().advance_clock()
        self._fence()  # the manager, which reads the clock, must see the pushes before it
        self._clocks[self._world.local_rank] = clock
        if self._replicates and clock - self._synced[self._world.local_rank] > self._slack:
            start = time.perf_counter()
            self._requests.backoff.reset()
            while clock - self._synced[self._world.local_rank] > self._slack:
                self._requests.receive()  # drives MPI's progress, on which other ranks may depend
            self._fence()  # read replicas only after the clocks of the round that refreshed them
            self._world.progress.work_done()
            self.stats.clock_wait_s += time.perf_counter() - start
        return clock

    def _complete(self, call: Call) -> None:
        assert isinstance(call, RowsCall)
        if call.remaining:
            self._requests.backoff.reset(spin=call.rows is not None)  # else this node's manager needs the core
        while call.remaining:
            self._requests.receive()

    def is_local(self, name: str) -> np.ndarray | None:
        """Return which rows are on this node, (num_rows,) bool; None on one node."""
        if self._world.num_nodes == 1:
            return None
        return self._rows[name].present(np.arange(self.layout[name].num_rows))

    def placement(self, name: str, ends: np.ndarray) -> np.ndarray | None:
        """Count main copies and replicas on this node by bands of rows, on its first rank."""
        if self._world.local_rank:
            return None
        starts = np.concatenate([[0], ends[:-1]])
        kinds = self._rows[name].kinds()
        kinds[self._is_copied(self.layout[name], np.arange(kinds.size))] = COPY
        return np.stack([np.add.reduceat(kinds == kind, starts) for kind in (MAIN, COPY)])

    def owned_rows(self, name: str) -> np.ndarray:
        """Return this rank's share of the rows that its node owns."""
        self.require_open()
        if self._world.num_nodes > 1:
            self._freeze(True)
            drain(self._world, self._requests, self._manager)
        rows = np.flatnonzero(self._rows[name].owned())
        rows = rows[~self._is_copied(self.layout[name], rows)]
        if self._world.num_nodes > 1:
            self._world.barrier()
            self._freeze(False)
        rank, size = self._world.local_rank, self._world.local_size
        return rows[rows.size * rank // size : rows.size * (rank + 1) // size]

    def quiesce(self) -> None:
        """Make all copies of all rows equal (collective)."""
        self.wait_all()
        self._world.barrier()
        if self._replicates:
            for _ in range(2):  # deltas to the owners, then values to the holders
                if self._manager is not None:
                    self._ask_manager(Flush)
                self._world.barrier()
        if self._world.num_nodes > 1:
            self._copy_frequent_rows()

    def _copy_frequent_rows(self) -> None:
        """Overwrite this node's copies of frequent rows with the values at their homes (collective)."""
        for number, segment in enumerate(self.layout.segments):
            if not segment.frequent:
                continue
            rows = np.flatnonzero(self._is_copied(segment, np.arange(segment.frequent)))
            if self._world.local_rank == 0 and rows.size:
                values = np.empty((rows.size, segment.row_width), np.float32)
                ticket = self._ticket(call := RowsCall(rows.size, segment, rows, values))
                self._requests.ask(Pull, number, ticket, call, np.arange(rows.size))
                self.wait(ticket)
                self._rows[segment.name].set(rows, values)
            self._world.barrier()

    def _is_copied(self, segment: Segment, rows: np.ndarray) -> np.ndarray:
        return is_copied(rows, segment.frequent, self._world.num_nodes, self._world.node)

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        self.require_open()
        self._world.barrier()

    def close(self) -> None:
        """Complete all calls, stop the managers and free the rows (collective)."""
        if self.closed:
            return
        self.wait_all()
        self._world.barrier()
        if self._world.num_nodes > 1:
            self._freeze(True)
            drain(self._world, self._requests, self._manager)
            if self._manager is not None:
                self._requests.send_local(new(Stop))
                self._platform.join()
                for state in self._manager.states:
                    state.close()
            self._requests.mailbox.transport.finish()
            self._world.barrier()
        self.closed = True
        for rows in self._rows.values():
            rows.close()
        self._stamps.clear()
        self._cached.clear()
        if self._world.num_nodes > 1:
            del self._requests
        del self._clocks, self._synced, self._manager
        self._platform.close()

    def halt(self) -> None:
        """Stop this node's manager at once; for a rank that is about to finalize MPI after an error."""
        if self._manager is not None:
            self._manager.halt()
            self._platform.join()

    # Talking to managers

    def _access(
        self, kind: type[Pull] | type[Push], segment: Segment, keys: np.ndarray, values: np.ndarray, rate: float = 0.0
    ) -> tuple[int, int]:
        """Pull into or push from ``values`` (n, width): access local rows, send requests for others.

        Works in chunks, so that owners serve one while the next is looked up.

        Returns:
            The ticket, ``DONE`` if all rows are local, and the number of rows that are not.
        """
        rows = keys - segment.first_key
        here = self._rows[segment.name]
        access = here.pull if kind is Pull else partial(here.push, rate=rate)
        stats = self.stats.segments[segment.name]
        call = RowsCall(0, segment, rows, values, rate, stats=stats)
        ticket, num_missing = DONE, 0
        for chunk in self._chunks(kind, rows.size, values.shape[1]):
            missing = access(rows[chunk], values[chunk])
            if missing.size:
                if ticket is DONE:
                    ticket = self._ticket(call)
                call.remaining += missing.size
                num_missing += missing.size
                stats.sent_bytes += self._requests.ask(
                    kind, self._number[segment.name], ticket, call, missing + chunk.start
                )
        return ticket, num_missing

    def _chunks(self, kind: type[Pull] | type[Push], number: int, width: int) -> Iterable[slice]:
        if self._world.num_nodes == 1:
            return (slice(0, number),)
        return growing_chunks(number, width) if kind is Pull else chunks(number, width)

    def _ask_manager(self, kind: type[Flush] | type[Freeze], **fields: int) -> None:
        """Send this node's manager a message, and wait for its answer."""
        ticket = self._ticket(RowsCall(1))
        self._requests.send_local(new(kind, origin=self._world.rank, ticket=ticket, **fields))
        self.wait(ticket)

    def _freeze(self, frozen: bool) -> None:
        """Freeze or thaw all managers (collective); once frozen and drained, no row moves until they are thawed."""
        if self._manager is not None:
            self._ask_manager(Freeze, frozen=int(frozen))
        self._world.barrier()
