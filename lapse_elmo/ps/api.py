"""The parameter server's interface: the verbs of Lapse, NuPS and AdaPM.

Keys are int64, rows float32. A call concerns keys of one segment, whose width is that of the buffer's second dimension.
A segment may have an update rule (:mod:`lapse_elmo.ps.rules`). Then pushes are gradients, with which the server changes
the row's weights and state; pulls give the weights alone. Only ``set`` and ``pull_rows`` are about whole rows.
NumPy arrays and CPU torch tensors both serve; both must be contiguous. A call that is refused raises
:class:`~lapse_elmo.errors.ServerError`, which names the argument, and changes nothing.

Consistency. A pull sees the worker's own completed pushes; a call is completed when it returns, one of the ``_async``
form when its ticket was waited for. Pushes are atomic per row: no pull sees half of one, and after
:meth:`ParameterServer.quiesce` the sum of integer-valued additions is exact. ``localize`` and ``intent`` may change
where a row is, never what it is. A row with one copy is sequentially consistent per key, also while it moves; how far a
replica may lag behind is the engine's to document.

A step of an update rule starts from the weights and state that the copy of the row has at that moment, whatever the
worker has pulled. Steps on a row with one copy thus come one after another, as if one worker had taken them all. A step
on a replica starts from the replica's state, which may lack what other nodes have pushed within the engine's staleness;
what it changes of weights and state is added to the owner's copy, so that no step and no square of a gradient is lost.

Ownership of buffers. Keys and values belong to the caller again as soon as a call returns, in the ``_async``
forms too. Only ``out`` of :meth:`ParameterServer.pull_async` belongs to the server until its ticket was waited for.

A server is for the thread that made it: workers are ranks, and calls of one worker come one after another.
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

DONE = -1  # the ticket of a call that was complete when it returned


@dataclass
class SegmentStats:
    """What this rank did to one segment since the start: rows, bytes moved, seconds spent in the calls.

    ``remote_``: of the rows, those that had to come from or go to another node; for them the worker waited ``wait_s``
    and sent ``sent_bytes``.
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
        """A pull of ``rows``, ``remote_rows`` of them from other nodes."""
        self.pulled_rows += rows
        self.remote_pulled_rows += remote_rows
        self.pulled_bytes += rows * width * 4

    def count_push(self, rows: int, remote_rows: int, width: int) -> None:
        """A push of ``rows``, ``remote_rows`` of them to other nodes."""
        self.pushed_rows += rows
        self.remote_pushed_rows += remote_rows
        self.pushed_bytes += rows * width * 4


@dataclass
class NodeStats:
    """What the server of a node did with one segment since the start: rows, and bytes sent by it to other ranks."""

    relocated_in_rows: int = 0
    relocated_out_rows: int = 0
    replicated_rows: int = 0  # replicas that came
    served_rows: int = 0  # pulled or pushed by workers of other nodes
    forwarded_rows: int = 0
    queued_rows: int = 0
    synchronised_rows: int = 0  # values and deltas sent to keep replicas alike
    sent_bytes: int = 0


@dataclass
class ServerStats:
    """Counters of one rank: by segment, and of announcements."""

    segments: dict[str, SegmentStats] = field(default_factory=dict)
    intended_rows: int = 0
    localized_rows: int = 0
    sampled_rows: int = 0
    clock_wait_s: float = 0.0
    node: dict[str, NodeStats] = field(default_factory=dict)  # on the first rank of a node, where there are several


@dataclass
class Call:
    """A call under way; the time in which it is waited for counts in ``stats``, where there are any."""

    stats: SegmentStats | None = field(default=None, kw_only=True)


class ParameterServer(ABC):
    """Rows shared by all workers; one object a worker, all constructed and closed together (collective calls).

    :cvar emulated: what the engine lacks and does in another way, for the run log.
    """

    emulated: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0) -> None:
        """Collective.

        :param sampled: the segment that :meth:`prepare_sample` draws from, and how; None if nothing is sampled.
        :param first_sample: number of the first sample to be prepared; a resumed run goes on where it was.
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
        """Copy whole rows, with the state of their update rule, into ``out`` (n, row_width)."""

    def push(self, keys: Array, values: Array) -> None:
        """Add ``values`` (n, width) to the rows of ``keys`` (n,). The values of a repeated key are all added.

        In a segment with an update rule ``values`` are gradients, and each of them makes a step of its own, with the
        rate of :meth:`set_rate`: the gradients of a repeated key should be summed first.
        """
        self.wait(self.push_async(keys, values))

    def set_rate(self, name: str, rate: float) -> None:
        """Set the learning rate of this worker's pushes to the segment ``name`` from now on."""
        self.require_open()
        segment = next((segment for segment in self.layout.segments if segment.name == name), None)
        if segment is None or segment.rule is None:
            raise ServerError(f"name: there is no segment {name} with an update rule")
        if not (math.isfinite(rate) and rate >= 0):
            raise ServerError(f"rate: {rate} is not a finite number of 0 or more")
        self._rates[name] = float(rate)

    def localize(self, keys: Array) -> None:
        """Bring the rows of ``keys`` to this worker's node; another worker's call may take them away again."""
        self.wait(self.localize_async(keys))

    @abstractmethod
    def pull_async(self, keys: Array, out: Array) -> int:
        """Begin a :meth:`pull`; its ticket, :data:`DONE` where it is complete already."""

    @abstractmethod
    def push_async(self, keys: Array, values: Array) -> int:
        """Begin a :meth:`push`; its ticket, :data:`DONE` where it is complete already."""

    @abstractmethod
    def localize_async(self, keys: Array) -> int:
        """Begin a :meth:`localize`; its ticket, :data:`DONE` where it is complete already."""

    def wait(self, ticket: int) -> None:
        """Return when the call of ``ticket`` is complete. A ticket serves once.

        :raises ServerError: for a ticket that was never given or was waited for before.
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
        """Return when every call that this worker has begun is complete."""
        self.require_open()
        for ticket in list(self._calls):
            self.wait(ticket)

    def _ticket(self, call: Call) -> int:
        """The ticket of a call that has begun."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._calls[ticket] = call
        return ticket

    @abstractmethod
    def _complete(self, call: Call) -> None:
        """Return when ``call`` is complete."""

    @abstractmethod
    def set(self, keys: Array, values: Array) -> None:
        """Overwrite the rows of the distinct ``keys`` (n,) by ``values`` (n, row_width)."""

    @abstractmethod
    def intent(self, keys: Array, start: int, end: int) -> None:
        """Announce access to the rows of ``keys`` by this worker in the clocks [start, end)."""

    def advance_clock(self) -> int:
        """One step is done; returns the new clock."""
        self.require_open()
        self.clock += 1
        return self.clock

    def prepare_sample(self, count: int, start: int, end: int) -> int:
        """Announce that ``count`` sampled rows will be pulled in clocks [start, end); a handle for ``pull_sample``."""
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
        """Fill ``keys_out`` (count,) int64 with a sample's keys and, where given, ``out`` (count, width) with its rows.

        A handle serves once. Leaving ``out`` away is for callers that pull the rows together with others.
        """
        self.require_open()
        if handle not in self._samples:
            raise ServerError(f"handle: sample {handle} was never prepared or is already pulled")
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
        """Which rows of a segment are on this worker's node now (num_rows,) bool; None where all are."""

    @abstractmethod
    def owned_rows(self, name: str) -> np.ndarray:
        """Rows (n,) int64, ascending, of the segment ``name`` that this rank should save: over all ranks, each once.

        Collective in meaning: to be asked on every rank after :meth:`quiesce`, before anything else is called.
        """

    def placement(self, name: str, ends: np.ndarray) -> np.ndarray | None:
        """How many rows of a segment are on this node, as [main copies, replicas] (2, bands).

        A band goes from the one before to its of the ascending row numbers ``ends`` (bands,). None where the engine
        does not know, or on ranks that are not the first of a node.
        """
        return None

    @abstractmethod
    def quiesce(self) -> None:
        """Collective: return when every completed push of every worker is visible to every other."""

    @abstractmethod
    def barrier(self) -> None:
        """Collective: return when every worker has come here."""

    @abstractmethod
    def close(self) -> None:
        """Collective: give the rows' memory back. Any later call is refused."""

    def require_open(self) -> None:
        if self.closed:
            raise ServerError("the parameter server is closed")

    def checked_keys(self, keys: Array) -> tuple[np.ndarray, Segment | None]:
        """``keys`` as a NumPy array, and the segment that they all belong to (None if there are none)."""
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
        """``keys``, ``values`` as a CPU tensor, and their segment; ServerError unless they fit each other.

        :param writes: whether the call writes to ``values``.
        :param whole: whether ``values`` are whole rows.
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
        """The rate of this worker's pushes to ``segment``; 0 for one without a rule, whose pushes are added."""
        if segment.rule is None:
            return 0.0
        if segment.name not in self._rates:
            raise ServerError(f"the segment {segment.name} has an update rule but no rate yet: call set_rate first")
        return self._rates[segment.name]

    def checked_clocks(self, start: int, end: int) -> None:
        """ServerError unless [start, end) is an interval of clocks."""
        if not 0 <= start < end:
            raise ServerError(f"start, end: [{start}, {end}) is not an interval of clocks")


def _numpy(name: str, array: Array, dtype: type[np.generic]) -> np.ndarray:
    """``array`` of ``dtype`` as a NumPy view of the same memory."""
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
