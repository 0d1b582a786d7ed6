"""The common part of the adapters of the two native packages: our interface on top of the package's worker object.

Each rank is a node with one worker. All arguments are checked before the package gets them: a negative key, another
dtype or a buffer that is not contiguous would crash it or be read as garbage.

Both packages hold the interpreter's lock while they wait for the network, which blocks all threads of the rank.

The packages can only add to whole rows. The worker therefore computes update rules: a push pulls whole rows and adds
what the rule changes of them. A pull transfers whole rows, too, and discards their state.

Sampling uses our own code, on top of ``pull`` and ``intent``: Lapse's bindings have none, and AdaPM's schemes can hang
or crash (its ``pool`` never uses a pool, and a sample pulled twice aborts the process).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from lapse_elmo.errors import ConfigError, ServerError
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import DONE, Array, Call, ParameterServer, SegmentStats
from lapse_elmo.ps.layout import Layout, Segment, by_occurrence, distinct, distinct_with_inverse
from lapse_elmo.ps.package_node import PackageNode
from lapse_elmo.ps.rules import Rule
from lapse_elmo.ps.sampling import Sampler


@dataclass
class Pending(Call):
    """A call in progress: how to wait for it, the buffers it uses until then, and what to do at the end."""

    wait: Callable[[], None]
    buffers: tuple[Any, ...]
    finish: Callable[[], None] | None = None


class PackageServer(ParameterServer):
    """Rows of ``layout`` in a native package, with one node per rank (construction is collective).

    ``remote_`` statistics are upper bounds: a package reports only whether all rows of a call were local, so otherwise
    all of them count as remote. ``lock_wait_s`` stays 0.

    Args:
        world: The ranks.
        layout: The segments.
        sampled: See :class:`~lapse_elmo.ps.api.ParameterServer`, as ``first_sample``.
        first_sample: Number of the first sample.
        technique: One of ``node_type.techniques``.
        node: A running node of the same layout to use, since a process can start one only once; :meth:`close` leaves it
            running. By default the object starts and ends its own.

    Raises:
        ConfigError: If the package is absent or lacks the technique.
        LaunchError: If the nodes do not come up.
    """

    node_type: ClassVar[type[PackageNode]]
    reads_buffers_later: ClassVar[bool]
    """Whether the package reads the buffers of an asynchronous push after the call has returned."""

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0, *,
        technique: str = "adaptive", node: PackageNode | None = None,
    ) -> None:
        super().__init__(layout, sampled, first_sample)
        if technique not in self.node_type.techniques:
            known = ", ".join(self.node_type.techniques)
            raise ConfigError(f"--ps {self.node_type.package} has no technique {technique}, only {known}")
        self._world = world
        self._own_node = node is None
        self._node = node or self.node_type(world, layout, technique)
        assert self._node.layout == layout
        self._worker = self._node.worker
        self._uses_intents = technique != "static" and world.size > 1

    def pull(self, keys: Array, out: Array) -> None:
        """Copy rows into ``out``."""
        self._pull(keys, out, later=False)

    def pull_rows(self, keys: Array, out: Array) -> None:
        """Copy whole rows into ``out``."""
        self._pull(keys, out, later=False, whole=True)

    def push(self, keys: Array, values: Array) -> None:
        """Add ``values`` to rows, or take a step with them."""
        self._push(keys, values, later=False)

    def pull_async(self, keys: Array, out: Array) -> int:
        """Start a pull."""
        return self._pull(keys, out, later=True)

    def push_async(self, keys: Array, values: Array) -> int:
        """Start a push."""
        return self._push(keys, values, later=True)

    def _pull(self, keys: Array, out: Array, later: bool, whole: bool = False) -> int:
        keys, out, segment = self.checked("out", keys, out, writes=True, whole=whole)
        if segment is None:
            return DONE
        start = time.perf_counter()
        # The package matches replies with keys by value: two replies for a repeated key would go to the same row.
        asked, inverse = distinct_with_inverse(keys)
        rows, finish = out.numpy(), None
        if inverse is not None or out.shape[1] < segment.row_width:
            rows = np.empty((asked.size, segment.row_width), np.float32)
            wanted = rows[:, : out.shape[1]]
            finish = partial(np.copyto, out.numpy(), wanted)
            if inverse is not None:
                finish = partial(np.take, wanted, inverse, 0, out.numpy())
        if later and inverse is None:
            asked = asked.copy()  # the package reads the keys again when rows arrive, the caller may overwrite theirs
        timestamp = self._worker.pull(asked, rows, later)
        stats = self.stats.segments[segment.name]
        stats.count_pull(keys.size, keys.size * self._is_remote(timestamp), segment.row_width)
        pending = Pending(partial(self._worker.wait, timestamp), (asked, rows), finish)
        ticket, seconds = self._begun(timestamp, later, start, stats, pending)
        stats.pull_s += seconds
        return ticket

    def _push(self, keys: Array, values: Array, later: bool) -> int:
        keys, values, segment = self.checked("values", keys, values)
        if segment is None:
            return DONE
        start = time.perf_counter()
        rows = values.numpy()
        if segment.rule is not None:
            keys, rows = self._changes(segment, segment.rule, keys, values)
        elif later and self.reads_buffers_later:
            keys, rows = keys.copy(), rows.copy()
        timestamp = self._worker.push(keys, rows, later)
        stats = self.stats.segments[segment.name]
        stats.count_push(keys.size, keys.size * self._is_remote(timestamp), segment.row_width)
        pending = Pending(partial(self._worker.wait, timestamp), (keys, rows))
        ticket, seconds = self._begun(timestamp, later, start, stats, pending)
        stats.push_s += seconds
        return ticket

    def _changes(
        self, segment: Segment, rule: Rule, keys: np.ndarray, gradients: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute the steps of ``rule`` with ``gradients`` (n, width) here.

        Returns:
            The distinct keys (m,), and what to add to their rows (m, row_width).
        """
        rate = self.rate_of(segment)
        asked, inverse = distinct_with_inverse(keys)
        asked = asked.copy()  # the caller may overwrite theirs before the package has read them
        before = torch.empty(asked.size, segment.row_width)
        self._worker.pull(asked, before.numpy(), False)
        if inverse is None:
            return asked, rule.changes(before, gradients, rate).numpy()
        after = before.clone()
        for chosen in by_occurrence(inverse):  # steps of a repeated key must follow one another
            rows = torch.from_numpy(inverse[chosen])
            after[rows] += rule.changes(after[rows], gradients[torch.from_numpy(chosen)], rate)
        return asked, (after - before).numpy()

    def _begun(
        self, timestamp: int, later: bool, start: float, stats: SegmentStats, pending: Pending
    ) -> tuple[int, float]:
        """Register a call that the package has started, or finish it if it is complete.

        Returns:
            The ticket (``DONE`` if the call is complete), and the seconds since ``start``.
        """
        complete = not later or timestamp == DONE
        if complete and pending.finish is not None:
            pending.finish()
        seconds = time.perf_counter() - start
        if self._is_remote(timestamp):
            pending.stats = stats
            stats.wait_s += seconds if complete else 0.0
        return DONE if complete else self._ticket(pending), seconds

    def _is_remote(self, timestamp: int) -> bool:
        """Return whether a call involved other nodes."""
        return timestamp != DONE and self._world.size > 1

    def _complete(self, call: Call) -> None:
        assert isinstance(call, Pending)
        call.wait()
        if call.finish is not None:
            call.finish()

    def set(self, keys: Array, values: Array) -> None:
        """Overwrite rows."""
        keys, values, segment = self.checked("values", keys, values, whole=True)
        if segment is None:
            return
        if distinct(keys).size != keys.size:
            raise ServerError("keys should be distinct in a set")
        self._set(keys, values.numpy())

    def _set(self, keys: np.ndarray, values: np.ndarray) -> None:
        self._worker.set(keys, values)

    def is_local(self, name: str) -> np.ndarray | None:
        """Return None: the packages do not report where a row is, so the scheme ``local`` draws as ``naive`` does."""
        return None

    def owned_rows(self, name: str) -> np.ndarray:
        """Return an equal share of the rows: any node can pull any row."""
        self.require_open()
        total, world = self.layout[name].num_rows, self._world
        return np.arange(total * world.rank // world.size, total * (world.rank + 1) // world.size)

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        self.require_open()
        self._world.barrier()

    def close(self) -> None:
        """Complete all calls and, unless it was given, end the node (collective)."""
        if self.closed:
            return
        self.wait_all()
        self.quiesce()
        self.closed = True
        if self._own_node:
            self._node.close()
