"""What the adapters of the two native packages share: our interface on the package's worker object.

A rank is a node with one worker. All arguments are checked here before the package sees them: a negative key, a row of
another type or a buffer with gaps would crash it or be read as garbage.

Both packages keep Python's lock while they wait for the network: other threads of the rank stand still meanwhile.

The packages know additions of whole rows only. An update rule is therefore computed by the worker: a push pulls whole
rows, and adds what the rule changes of them. A pull moves whole rows too, and leaves their state out.

Sampling is ours, over ``pull`` and ``intent``: Lapse's bindings have none, and AdaPM's schemes can hang or crash (its
``pool`` never uses a pool, and a sample pulled twice aborts the process).
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
    """How to wait for a call, what must stay alive until then, and what is left to do."""

    wait: Callable[[], None]
    buffers: tuple[Any, ...]
    finish: Callable[[], None] | None = None


class PackageServer(ParameterServer):
    """Rows of ``layout`` in a native package, a node a rank.

    ``remote_`` statistics are upper bounds: a package says of a call whether it was answered on the node as a whole,
    not of how many rows, so all rows of another call count. ``lock_wait_s`` stays 0.

    :param technique: one of ``node_type.techniques``.
    :param node: a node of the same layout that is to serve this object and later ones, since a process can start one
        only once; :meth:`close` leaves it running. By default the object starts and ends its own.
    :raises ConfigError: if the package is absent or lacks the technique.
    :raises LaunchError: if its nodes do not come up.
    """

    node_type: ClassVar[type[PackageNode]]
    reads_buffers_later: ClassVar[bool]
    """Whether the asynchronous forms of push read their buffers after they have returned."""

    def __init__(
        self, world: World, layout: Layout, sampled: tuple[str, Sampler] | None = None, first_sample: int = 0, *,
        technique: str = "adaptive", node: PackageNode | None = None,
    ) -> None:
        super().__init__(layout, sampled, first_sample)
        if technique not in self.node_type.techniques:
            known = ", ".join(self.node_type.techniques)
            raise ConfigError(f"--ps {self.node_type.package} knows no technique {technique}, only {known}")
        self._world = world
        self._own_node = node is None
        self._node = node or self.node_type(world, layout, technique)
        assert self._node.layout == layout
        self._worker = self._node.worker
        self._uses_intents = technique != "static" and world.size > 1

    def pull(self, keys: Array, out: Array) -> None:
        self._pull(keys, out, later=False)

    def pull_rows(self, keys: Array, out: Array) -> None:
        self._pull(keys, out, later=False, whole=True)

    def push(self, keys: Array, values: Array) -> None:
        self._push(keys, values, later=False)

    def pull_async(self, keys: Array, out: Array) -> int:
        return self._pull(keys, out, later=True)

    def push_async(self, keys: Array, values: Array) -> int:
        return self._push(keys, values, later=True)

    def _pull(self, keys: Array, out: Array, later: bool, whole: bool = False) -> int:
        keys, out, segment = self.checked("out", keys, out, writes=True, whole=whole)
        if segment is None:
            return DONE
        start = time.perf_counter()
        # Their replies are matched with the keys by value: two of a key from two nodes would land in one place.
        asked, inverse = distinct_with_inverse(keys)
        rows, finish = out.numpy(), None
        if inverse is not None or out.shape[1] < segment.row_width:
            rows = np.empty((asked.size, segment.row_width), np.float32)
            wanted = rows[:, : out.shape[1]]
            finish = partial(np.copyto, out.numpy(), wanted)
            if inverse is not None:
                finish = partial(np.take, wanted, inverse, 0, out.numpy())
        if later and inverse is None:
            asked = asked.copy()  # the caller may overwrite his, the package reads it again when the rows arrive
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
        """Each of ``keys`` (n,) once, and what the steps of ``rule`` change of these rows (m, row_width)."""
        rate = self.rate_of(segment)
        asked, inverse = distinct_with_inverse(keys)
        asked = asked.copy()  # not the caller's, who may overwrite his
        before = torch.empty(asked.size, segment.row_width)
        self._worker.pull(asked, before.numpy(), False)
        if inverse is None:
            return asked, rule.changes(before, gradients, rate).numpy()
        after = before.clone()
        for chosen in by_occurrence(inverse):  # the steps of a repeated key, one after another
            rows = torch.from_numpy(inverse[chosen])
            after[rows] += rule.changes(after[rows], gradients[torch.from_numpy(chosen)], rate)
        return asked, (after - before).numpy()

    def _begun(
        self, timestamp: int, later: bool, start: float, stats: SegmentStats, pending: Pending
    ) -> tuple[int, float]:
        """A call that the package has taken: its ticket (DONE, and its rest done, where it is complete), seconds."""
        complete = not later or timestamp == DONE
        if complete and pending.finish is not None:
            pending.finish()
        seconds = time.perf_counter() - start
        if self._is_remote(timestamp):
            pending.stats = stats
            stats.wait_s += seconds if complete else 0.0
        return DONE if complete else self._ticket(pending), seconds

    def _is_remote(self, timestamp: int) -> bool:
        return timestamp != DONE and self._world.size > 1

    def _complete(self, call: Call) -> None:
        assert isinstance(call, Pending)
        call.wait()
        if call.finish is not None:
            call.finish()

    def set(self, keys: Array, values: Array) -> None:
        keys, values, segment = self.checked("values", keys, values, whole=True)
        if segment is None:
            return
        if distinct(keys).size != keys.size:
            raise ServerError("keys should be distinct in a set")
        self._set(keys, values.numpy())

    def _set(self, keys: np.ndarray, values: np.ndarray) -> None:
        self._worker.set(keys, values)

    def is_local(self, name: str) -> np.ndarray | None:
        """None: the packages do not tell where a row is, so the scheme ``local`` draws as ``naive`` does."""
        return None

    def owned_rows(self, name: str) -> np.ndarray:
        """An equal share: any node can pull any row."""
        self.require_open()
        total, world = self.layout[name].num_rows, self._world
        return np.arange(total * world.rank // world.size, total * (world.rank + 1) // world.size)

    def barrier(self) -> None:
        self.require_open()
        self._world.barrier()

    def close(self) -> None:
        if self.closed:
            return
        self.wait_all()
        self.quiesce()
        self.closed = True
        if self._own_node:
            self._node.close()
