"""The parameter server's interface: the verbs of Lapse, NuPS and AdaPM.

Keys are int64, rows float32. The keys of a call belong to one segment, and buffers are (number of keys, width of the
segment). A segment may have an update rule (:mod:`lapse_elmo.ps.rules`). Then pushes are gradients, with which the
server updates the row's weights and state, and pulls return the weights only; ``set`` and ``pull_rows`` are for whole
rows.
Buffers are NumPy arrays or torch tensors on the CPU, and must be contiguous. A call with bad arguments raises
:class:`~lapse_elmo.errors.ServerError`, which names the argument, and changes nothing.

Consistency: A pull sees the worker's own completed pushes. A call is complete when it returns; an ``_async`` call when
its ticket has been waited for. Pushes are atomic per row: no pull sees half of one. After
:meth:`ParameterServer.quiesce`, sums of integer-valued pushes are exact. ``localize`` and ``intent`` may change where a
row is, never its value. A row with one copy is sequentially consistent per key, also while it moves. Each engine
documents how stale its replicas may be.

A step of an update rule starts from the current weights and state of the copy, not from what the worker has pulled.
So the steps on a row with one copy are serial. A step on a replica may lack what other nodes have pushed recently; what
it changes of weights and state is added to the owner's copy, so no step and no squared gradient is lost.

Ownership of buffers: Keys and values belong to the caller again as soon as a call returns, also an ``_async`` one.
Only ``out`` of :meth:`ParameterServer.pull_async` belongs to the server until its ticket has been waited for.

Threads: Only the thread that created a server may use it. Workers are ranks, and each makes one call at a time.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from lapse_elmo.errors import ServerError
from lapse_elmo.ps.layout import Layout, Segment
from lapse_elmo.ps.sampling import Sampler

Array: TypeAlias = "np.ndarray | torch.Tensor"

DONE = -1  # ticket of a call that was complete when it returned


@dataclass
class SegmentStats:
    """Counters of this rank and one segment since the start: rows, bytes, and seconds spent in calls.

    ``remote_`` rows had to be pulled from or pushed to another node; the worker waited ``wait_s`` seconds for them and
    sent ``sent_bytes``.
    """

    pulled_rows: int = 0
    pushed_rows: int = 0
    remote_pulled_rows: int = 0
    remote_pushed_rows: int = 0
    pulled_bytes: int = 0
    pushed_bytes: int = 0
    pull_s: float = 0.0
    push_s: float = 0.0
    lock_wait_s: float = 0.0
    wait_s: float = 0.0
    sent_bytes: int = 0

    def count_pull(self, rows: int, remote_rows: int, width: int) -> None:
        """Count a pull of ``rows``, ``remote_rows`` of them from other nodes."""
        self.pulled_rows += rows
        self.remote_pulled_rows += remote_rows
        self.pulled_bytes += rows * width * 4

    def count_push(self, rows: int, remote_rows: int, width: int) -> None:
        """Count a push of ``rows``, ``remote_rows`` of them to other nodes."""
        self.pushed_rows += rows
        self.remote_pushed_rows += remote_rows
        self.pushed_bytes += rows * width * 4


@dataclass
class NodeStats:
    """Counters of a node's manager and one segment since the start: rows, and bytes sent to other ranks."""

    relocated_in_rows: int = 0
    relocated_out_rows: int = 0
    replicated_rows: int = 0  # replicas received
    served_rows: int = 0  # pulled or pushed by workers of other nodes
    forwarded_rows: int = 0
    queued_rows: int = 0
    synchronised_rows: int = 0  # values and deltas sent in rounds
    sent_bytes: int = 0


@dataclass
class ServerStats:
    """Counters of one rank, per segment and in total."""

    segments: dict[str, SegmentStats] = field(default_factory=dict)
    intended_rows: int = 0
    localized_rows: int = 0
    sampled_rows: int = 0
    clock_wait_s: float = 0.0
    node: dict[str, NodeStats] = field(default_factory=dict)  # on the first rank of each of several nodes


@dataclass
class Call:
    """A call in progress; the time spent waiting for it is added to ``stats``, if given."""

    stats: SegmentStats | None = field(default=None, kw_only=True)


class ParameterServer(ABC):
    """Rows shared by all workers, through one object per worker; construction and ``close`` are collective.

    ``emulated`` lists features that the engine lacks and replaces, for the run log.
    """

    emulated: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0) -> None:
        """Initialise the state that all engines share.

        Args:
            layout: The segments.
            sampled: The segment that :meth:`prepare_sample` draws from, and how; None if nothing is sampled.
            first_sample: Number of the first sample to be prepared; greater than 0 in a resumed run.
        """
        self.layout = layout
        self.stats = ServerStats({segment.name: SegmentStats() for segment in layout.segments})
        self.clock = 0
        self.closed = False
        self._sampled = sampled
        self._samples: dict[int, tuple[int, np.ndarray | None]] = {}
        self._next_sample = first_sample
        self._rates: dict[str, float] = {}
        self._calls: dict[int, Call] = {}
        self._next_ticket = 0

    def pull(self, keys: Array, out: Array) -> None:
        """Copy the rows of ``keys`` (n,) into ``out`` (n, width). Keys may repeat, in any order."""
        self.wait(self.pull_async(keys, out))

    @abstractmethod
    def pull_rows(self, keys: Array, out: Array) -> None:
        """Copy whole rows, including the state of their update rule, into ``out`` (n, row_width)."""

    def push(self, keys: Array, values: Array) -> None:
        """Add ``values`` (n, width) to the rows of ``keys`` (n,); a repeated key gets all of its values.

        If the segment has an update rule, ``values`` are gradients, and each makes a step with the rate of
        :meth:`set_rate`. Sum the gradients of a repeated key first, to make one step.
        """
        self.wait(self.push_async(keys, values))

    def set_rate(self, name: str, rate: float) -> None:
        """Set the learning rate of this worker's further pushes to the segment ``name``."""
        self.require_open()
        segment = next((segment for segment in self.layout.segments if segment.name == name), None)
        if segment is None or segment.rule is None:
            raise ServerError(f"segment {name!r} does not exist or has no update rule")
        if not (math.isfinite(rate) and rate >= 0):
            raise ServerError(f"rate: {rate} is not a finite number of 0 or more")
        self._rates[name] = float(rate)

    def localize(self, keys: Array) -> None:
        """Move the rows of ``keys`` to this worker's node; another worker's call may move them away again."""
        self.wait(self.localize_async(keys))

    @abstractmethod
    def pull_async(self, keys: Array, out: Array) -> int:
        """Start a :meth:`pull`; return its ticket, :data:`DONE` if it is already complete."""

    @abstractmethod
    def push_async(self, keys: Array, values: Array) -> int:
        """Start a :meth:`push`; return its ticket, :data:`DONE` if it is already complete."""

    @abstractmethod
    def localize_async(self, keys: Array) -> int:
        """Start a :meth:`localize`; return its ticket, :data:`DONE` if it is already complete."""

    def wait(self, ticket: int) -> None:
        """Block until the call of ``ticket`` is complete. A ticket can be waited for once.

        Raises:
            ServerError: If the ticket was never given or has been waited for before.
        """
        self.require_open()
        if ticket == DONE:
            return
        if ticket not in self._calls:
            raise ServerError(f"ticket: {ticket} was never given or was waited for before")
        call = self._calls[ticket]
        start = time.perf_counter()
        try:
            self._complete(call)
        finally:
            del self._calls[ticket]
        if call.stats is not None:
            call.stats.wait_s += time.perf_counter() - start

    def wait_all(self) -> None:
        """Block until every call that this worker has started is complete."""
        self.require_open()
        for ticket in list(self._calls):
            self.wait(ticket)

    def _ticket(self, call: Call) -> int:
        """Register a call that has started; return its ticket."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._calls[ticket] = call
        return ticket

    @abstractmethod
    def _complete(self, call: Call) -> None:
        """Block until ``call`` is complete."""

    @abstractmethod
    def set(self, keys: Array, values: Array) -> None:
        """Overwrite the rows of the distinct ``keys`` (n,) with ``values`` (n, row_width)."""

    @abstractmethod
    def intent(self, keys: Array, start: int, end: int) -> None:
        """Announce that this worker will access the rows of ``keys`` in the clocks [start, end)."""

    def advance_clock(self) -> int:
        """End a step of this worker; return its new clock."""
        self.require_open()
        self.clock += 1
        return self.clock

    def prepare_sample(self, count: int, start: int, end: int) -> int:
        """Announce that ``count`` sampled rows will be pulled in the clocks [start, end); return a handle of them."""
        self.require_open()
        if self._sampled is None:
            raise ServerError("no segment is set up for sampling")
        name, sampler = self._sampled
        if count < 1 or (not sampler.replacement and count > sampler.distribution.num_rows):
            raise ServerError(f"count: cannot sample {count} of {sampler.distribution.num_rows} rows")
        self.checked_clocks(start, end)
        handle = self._next_sample
        rows = sampler.draw(handle, count) if sampler.scheme in ("preloc", "pool") else None
        if rows is not None:
            self.intent(self.layout[name].keys(rows), start, end)
        self._next_sample += 1
        self._samples[handle] = (count, rows)
        return handle

    def pull_sample(self, handle: int, keys_out: np.ndarray, out: Array | None = None) -> None:
        """Fill ``keys_out`` (count,) int64 with a sample's keys and, if given, ``out`` (count, width) with its rows.

        A handle can be used once. Without ``out``, the caller pulls the rows itself, together with others.
        """
        self.require_open()
        if handle not in self._samples:
            raise ServerError(f"handle: sample {handle} was never prepared or has already been pulled")
        count, rows = self._samples[handle]
        if keys_out.dtype != np.int64 or keys_out.shape != (count,):
            raise ServerError(f"keys_out should be int64 of shape ({count},), not {keys_out.dtype} {keys_out.shape}")
        name, sampler = self._sampled  # type: ignore[misc]
        if rows is None:
            is_local = self.is_local(name) if sampler.scheme == "local" else None
            rows = sampler.draw(handle, count, is_local)
        keys = self.layout[name].keys(rows)
        if out is not None:
            self.pull(keys, out)
        keys_out[:] = keys
        del self._samples[handle]
        self.stats.sampled_rows += count

    @abstractmethod
    def is_local(self, name: str) -> np.ndarray | None:
        """Return which rows of a segment are on this worker's node now, (num_rows,) bool; None if all are."""

    @abstractmethod
    def owned_rows(self, name: str) -> np.ndarray:
        """Return this rank's share of a partition of the segment's rows over all ranks, (n,) int64, ascending.

        For saving. Collective: to be called on every rank after :meth:`quiesce`, before anything else.
        """

    def placement(self, name: str, ends: np.ndarray) -> np.ndarray | None:
        """Count the rows of a segment on this node, as [main copies, replicas] (2, bands).

        Band i is the rows ``ends[i - 1]`` to ``ends[i] - 1``; ``ends`` (bands,) ascends. Returns None if the engine
        does not know, and on ranks that are not the first of their node.
        """
        return None

    @abstractmethod
    def quiesce(self) -> None:
        """Block until every completed push of every worker is visible to all (collective)."""

    @abstractmethod
    def barrier(self) -> None:
        """Block until every worker has called this (collective)."""

    @abstractmethod
    def close(self) -> None:
        """Free the rows (collective). Any later call raises ServerError."""

    def require_open(self) -> None:
        """Raise ServerError if the server is closed."""
        if self.closed:
            raise ServerError("the parameter server is closed")

    def checked_keys(self, keys: Array) -> tuple[np.ndarray, Segment | None]:
        """Check ``keys``; return them as a NumPy array, with their segment (None if there are no keys)."""
        self.require_open()
        keys = _numpy("keys", keys, np.int64)
        if keys.ndim != 1:
            raise ServerError(f"keys should be int64 of one dimension, not of shape {keys.shape}")
        if not keys.size:
            return keys, None
        first, last = int(keys.min()), int(keys.max())
        if first < 0 or last >= self.layout.num_keys:
            bad = first if first < 0 else last
            raise ServerError(f"keys: {bad} is outside [0, {self.layout.num_keys})")
        segment = self.layout.segment_of(first, last)
        if segment is None:
            raise ServerError(f"keys: {first} and {last} belong to different segments; a call takes keys of one")
        return keys, segment

    def checked(
        self, name: str, keys: Array, values: Array, *, writes: bool = False, whole: bool = False
    ) -> tuple[np.ndarray, torch.Tensor, Segment | None]:
        """Check that ``keys`` and ``values`` fit; return them, as array and tensor, with their segment.

        Args:
            name: Name of the argument ``values`` in errors.
            keys: (n,) int64.
            values: (n, width) float32, or (n, row_width) if ``whole``.
            writes: Whether the call writes to ``values``. Otherwise read-only values are copied.
            whole: Whether ``values`` are whole rows.
        """
        keys, segment = self.checked_keys(keys)
        values = _numpy(name, values, np.float32)
        width = (segment.row_width if whole else segment.width) if segment else 0
        expected = (keys.size, width)
        if segment is not None and values.shape != expected:
            raise ServerError(f"{name} should have shape {expected}, not {values.shape}")
        if not values.flags.writeable:
            if writes:
                raise ServerError(f"{name} should be writable")
            values = values.copy()  # a tensor cannot be read-only
        return keys, torch.from_numpy(values), segment

    def rate_of(self, segment: Segment) -> float:
        """Return the learning rate of this worker's pushes to ``segment``; 0 if it has no rule."""
        if segment.rule is None:
            return 0.0
        if segment.name not in self._rates:
            raise ServerError(f"the segment {segment.name} has an update rule but no rate yet: call set_rate first")
        return self._rates[segment.name]

    def checked_clocks(self, start: int, end: int) -> None:
        """Raise ServerError unless [start, end) is a non-empty interval of clocks."""
        if not 0 <= start < end:
            raise ServerError(f"start, end: [{start}, {end}) is not an interval of clocks")


def _numpy(name: str, array: Array, dtype: type[np.generic]) -> np.ndarray:
    """Return ``array``, which must be contiguous and of ``dtype``, as a NumPy view of the same memory."""
    expected = np.dtype(dtype)
    if isinstance(array, torch.Tensor):
        if array.dtype != getattr(torch, expected.name):
            raise ServerError(f"{name} should be {expected.name}, not {array.dtype}")
        if array.device.type != "cpu":
            raise ServerError(f"{name} should be in host memory, not on {array.device}")
        if array.requires_grad:
            raise ServerError(f"{name} should not require a gradient; pass its detach()")
        if not array.is_contiguous():
            raise ServerError(f"{name} should be contiguous")
        return array.numpy()
    if not isinstance(array, np.ndarray):
        raise ServerError(f"{name} should be a NumPy array or a torch tensor, not {type(array).__name__}")
    if array.dtype != expected:
        raise ServerError(f"{name} should be {expected.name}, not {array.dtype}")
    if not array.flags.c_contiguous:
        raise ServerError(f"{name} should be contiguous")
    return array
