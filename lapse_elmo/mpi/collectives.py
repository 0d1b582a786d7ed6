"""Collective calls, and agreement between ranks on results and errors.

All waiting polls, with short sleeps once a wait gets long: MPI libraries spin in blocking calls, which starves the
ranks that compute as soon as there are more ranks than cores.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lapse_elmo.errors import UserError
from lapse_elmo.progress import Progress

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

_SPIN_S = 0.002  # a rank with a core of its own spins this long before it starts to sleep
_LONGEST_SLEEP_S = 0.001
_MESSAGE_BYTES = 1 << 28  # of a large array at a time: MPI counts in 32 bits
_SENT = 33  # the tag of messages of send()


class Collectives:
    """Calls that all ranks of the job (or of a node) make together, in the same order.

    They must come from the main thread. ``obj`` arguments are anything that pickles; arrays are sent as they are.

    Attributes:
        comm: The communicator of all ranks; None for a process without MPI, where every call returns at once.
        node_comm: The communicator of this node's ranks; None without MPI.
        rank: This rank.
        size: The number of ranks.
        oversubscribed: Whether this machine has more ranks than cores for them, so that waits should not spin.
        progress: What this rank is doing, for the watchdog.
    """

    def __init__(self, comm: MPI.Comm | None) -> None:
        self.comm = comm
        self.node_comm: MPI.Intracomm | None = None
        self.rank, self.size = (comm.rank, comm.size) if comm is not None else (0, 1)
        self.oversubscribed = False
        self.progress = Progress()

    def wait(self, request: MPI.Request) -> None:
        """Complete a nonblocking operation without keeping a core busy."""
        # Test also drives MPI's progress, so messages of other operations move on while this rank polls.
        if not request.Test():
            self.progress.waiting()
            start = time.perf_counter()
            sleep_s = 1e-5
            while not request.Test():
                if self.oversubscribed or time.perf_counter() - start > _SPIN_S:
                    time.sleep(sleep_s)
                    sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        self.progress.work_done()

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.comm is not None:
            self.wait(self.comm.Ibarrier())

    def node_barrier(self) -> None:
        """Return once every rank of this node has called this."""
        self.start_node_barrier()()

    def start_node_barrier(self) -> Callable[[], None]:
        """Enter a barrier of this node's ranks; return a function that waits until all of them have entered it."""
        if self.node_comm is None:
            return lambda: None
        request = self.node_comm.Ibarrier()
        return lambda: self.wait(request)

    def bcast(self, obj: T, root: int = 0) -> T:
        """Return rank ``root``'s ``obj`` on every rank."""
        return obj if self.comm is None else self._bcast_on(self.comm, obj, root)

    def node_bcast(self, obj: T) -> T:
        """Return the ``obj`` of this node's first rank on every rank of the node."""
        return obj if self.node_comm is None else self._bcast_on(self.node_comm, obj, 0)

    def _bcast_on(self, comm: MPI.Comm, obj: T, root: int) -> T:
        data = bytearray(pickle.dumps(obj)) if comm.rank == root else bytearray()
        length = np.array([len(data)], np.int64)
        self.wait(comm.Ibcast(length, root))
        if comm.rank != root:
            data = bytearray(int(length[0]))
        self.wait(comm.Ibcast(data, root))
        return obj if comm.rank == root else pickle.loads(data)

    def bcast_array(self, array: np.ndarray) -> None:
        """Overwrite every rank's contiguous ``array`` with that of rank 0. All have the same shape and type."""
        assert array.flags.c_contiguous
        if self.comm is None:
            return
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _MESSAGE_BYTES):
            self.wait(self.comm.Ibcast(data[start : start + _MESSAGE_BYTES], 0))

    def deal(self, function: Callable[[], Sequence[T]]) -> T:
        """Run ``function`` on rank 0 alone, and give each rank its own item of the result.

        Unlike :meth:`agree` it sends to a rank only what that rank needs.

        Args:
            function: Returns an item for each rank. A UserError that it raises is raised on every rank.
        """
        items: list[T] = []
        self.agree(lambda: items.extend(function()))
        if self.comm is None:
            return items[0]
        from mpi4py import MPI

        assert self.rank or len(items) == self.size
        packed = [pickle.dumps(item) for item in items]
        lengths, length = np.array([len(data) for data in packed], np.int64), np.empty(1, np.int64)
        self.wait(self.comm.Iscatter(None if self.rank else lengths, length, 0))
        starts = (np.cumsum(lengths) - lengths).tolist()
        sent = None if self.rank else [b"".join(packed), lengths.tolist(), starts, MPI.BYTE]
        buffer = bytearray(int(length[0]))
        self.wait(self.comm.Iscatterv(sent, buffer, 0))
        return pickle.loads(buffer)

    def merge(self, part: Callable[[], T], add: Callable[[T], object]) -> None:
        """Unite what all ranks have on rank 0, pair by pair in a tree of log2(size) rounds.

        Args:
            part: Returns what this rank has, with all that was added to it. Called once, but not on rank 0.
            add: Adds another rank's part to what this rank has.
        """
        distance = 1
        while distance < self.size:
            if self.rank % (2 * distance):
                self.send(pickle.dumps(part()), self.rank - distance)
                return
            if self.rank + distance < self.size:
                add(pickle.loads(self.receive(self.rank + distance)))
            distance *= 2

    def send(self, data: bytes, rank: int) -> None:
        """Send ``data`` to ``rank``, which calls :meth:`receive`; messages to a rank arrive in their order."""
        assert self.comm is not None
        self.wait(self.comm.Isend(np.array([len(data)], np.int64), rank, _SENT))
        for start in range(0, len(data), _MESSAGE_BYTES):
            self.wait(self.comm.Isend(memoryview(data)[start : start + _MESSAGE_BYTES], rank, _SENT))

    def receive(self, rank: int) -> bytearray:
        """Return the next data that ``rank`` sends to this rank by :meth:`send`."""
        assert self.comm is not None
        length = np.empty(1, np.int64)
        self.wait(self.comm.Irecv(length, rank, _SENT))
        data = bytearray(int(length[0]))
        for start in range(0, len(data), _MESSAGE_BYTES):
            self.wait(self.comm.Irecv(memoryview(data)[start : start + _MESSAGE_BYTES], rank, _SENT))
        return data

    def allgather(self, obj: T) -> list[T]:
        """Return every rank's ``obj``, ordered by rank, on every rank."""
        return self._gathered(obj, everywhere=True)

    def gather(self, obj: T) -> list[T]:
        """Return every rank's ``obj``, ordered by rank, on rank 0; an empty list on the others."""
        return self._gathered(obj, everywhere=False)

    def _gathered(self, obj: T, *, everywhere: bool) -> list[T]:
        if self.comm is None:
            return [obj]
        from mpi4py import MPI

        data = pickle.dumps(obj)
        lengths = self.gather_numbers(np.array([len(data)]))[:, 0]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        here = everywhere or self.rank == 0
        buffer = bytearray(int(starts[-1]) if here else 0)
        into = [buffer, lengths.tolist(), starts[:-1].tolist(), MPI.BYTE]
        self.wait(self.comm.Iallgatherv(data, into) if everywhere else self.comm.Igatherv(data, into if here else None))
        return [pickle.loads(buffer[a:b]) for a, b in itertools.pairwise(starts)] if here else []

    def node_gather_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Return the ``numbers`` (k,) of every rank of this node as an array (ranks of the node, k)."""
        return self._gather_numbers_on(self.node_comm, numbers)

    def gather_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Return every rank's ``numbers`` (k,) as an array (size, k), in one small message.

        Cheaper than :meth:`allgather`: for what the ranks exchange at each step.
        """
        return self._gather_numbers_on(self.comm, numbers)

    def _gather_numbers_on(self, comm: MPI.Comm | None, numbers: np.ndarray) -> np.ndarray:
        if comm is None:
            return numbers[None].copy()
        out = np.empty((comm.size, *numbers.shape), numbers.dtype)
        self.wait(comm.Iallgather(np.ascontiguousarray(numbers), out))
        return out

    def sum_(self, array: np.ndarray) -> np.ndarray:
        """Add up the ranks' contiguous arrays in place; every rank gets the same bits."""
        self.start_sum(array)()
        return array

    def start_sum(self, array: np.ndarray) -> Callable[[], None]:
        """Begin :meth:`sum_`.

        Returns:
            A function that waits for the sum. ``array`` must not be touched before it returns.
        """
        if self.comm is None:
            return lambda: None
        from mpi4py import MPI

        request = self.comm.Iallreduce(MPI.IN_PLACE, array)
        return lambda: self.wait(request)

    def agree(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 alone, and return its result, or raise its UserError, on every rank."""
        result: T | None = None
        error: UserError | None = None
        if self.rank == 0:
            try:
                result = function()
            except UserError as caught:
                error = caught
        result, error = self.bcast((result, error))
        if error is not None:
            raise error.on_every_rank()
        return result  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank; if it raises a UserError on any, raise the first one on all.

        The message names the rank it comes from, unless all ranks raise the same one.
        """
        result: T | None = None
        error: UserError | None = None
        try:
            result = function()
        except UserError as caught:
            error = caught
        errors = self.allgather((error, str(self)))
        for other, where in errors:
            if other is not None:
                alike = all(str(e) == str(other) for e, _ in errors)
                raised = other if alike else type(other)(f"[{where}] {other}")
                raise raised.on_every_rank()
        return result  # type: ignore[return-value]
