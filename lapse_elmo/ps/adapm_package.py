"""The parameter server of the package ``adapm`` (AdaPM, 2022): relocation and replication, by intent."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from lapse_elmo.ps.api import DONE, Array
from lapse_elmo.ps.package_node import PackageNode
from lapse_elmo.ps.package_server import PackageServer, Pending

_MARKERS = 32  # extra keys per node, which never move: enough that each node has some on each message channel
_HOPS = 3  # of an update on its way to the owner: the last known owner, the home, the owner


class AdapmNode(PackageNode):
    """A rank as a node of AdaPM."""

    package = "adapm"
    repository = "https://github.com/alexrenz/AdaPM"
    techniques: ClassVar[dict[str, str]] = {
        "adaptive": "all", "relocation": "relocation_only", "replication": "replication_only", "static": "all",
    }

    def load(self) -> ModuleType:
        """Import ``adapm``."""
        import adapm

        return adapm

    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        """Start the node and its worker, with marker keys after those of the layout."""
        first, number = self.layout.num_keys, _MARKERS * self.world.size
        self._markers = np.arange(first, first + number)
        self.module.setup(first + number, 1, self.techniques[self.technique])
        widths = torch.cat([widths, torch.ones(number, dtype=widths.dtype)])
        server = self.module.Server(widths)  # blocks until all nodes are up
        return server, self.module.Worker(0, server)

    def sync(self) -> None:
        """Wait until the owners have the updates of this node's replicas, and the replicas those of the owners.

        AdaPM's wait_sync returns when a round has sent its messages; the second call waits for their answers.
        """
        self.worker.wait_sync()
        self.worker.wait_sync()

    def flush(self) -> None:
        """Wait until every message from here has been handled: the pulls of markers follow them in each channel."""
        self.worker.pull(self._markers, np.empty(self._markers.size, np.float32))

    def stop(self) -> None:
        """Finalize the worker and shut the node down."""
        self.worker.finalize()
        self.worker = None
        self.server.shutdown()
        self.server = None


class AdapmServer(PackageServer):
    """Rows in AdaPM.

    A row that several nodes intend to use in the same clocks has replicas, which AdaPM synchronises in up to 1,000
    rounds per second. Their staleness is bounded by the time of two rounds, not by clocks. :meth:`quiesce` waits for
    them. When a replica is created or dropped, a pull can overtake even the node's own last updates to the row.

    Set rows before they are announced, as training does. A node aborts if it is asked to set a row of which it has a
    replica, and other nodes cannot know that. On several nodes, ``set`` therefore pulls the rows and adds the
    difference. That is exact for rows that were 0, as all are at the start, and rounds others; updates in transit to
    replicated rows, or from a concurrent ``set``, are added to the new value.

    AdaPM starts its threads before the data that they use is initialised. With several nodes, some versions crash at
    the start or do not come up in time. The job then ends; a second attempt often succeeds.
    """

    node_type = AdapmNode
    _node: AdapmNode
    reads_buffers_later = False
    emulated = (
        "localize is an intent for the current clock", "lapse-elmo draws the samples, with the scheme local as naive",
        "update rules are computed by the workers, which pull and push whole rows",
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._first_clock = self._worker.current_clock()  # not 0 if the node has served another object before

    def localize_async(self, keys: Array) -> int:
        """Announce ``keys`` for the current clock. Waiting for the ticket waits for the rounds that bring the rows.

        The rows stay until the clock advances; those that other nodes intend to use come as replicas.
        """
        keys, segment = self.checked_keys(keys)
        self.stats.localized_rows += keys.size
        if segment is None or self._world.size == 1:
            return DONE
        clock = self._first_clock + self.clock
        self._worker.intent(keys, clock, clock + 1)
        return self._ticket(Pending(self._node.sync, ()))

    def intent(self, keys: Array, start: int, end: int) -> None:
        """Announce access to AdaPM."""
        keys, segment = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size
        if segment is not None and self._uses_intents:
            self._worker.intent(keys, self._first_clock + start, self._first_clock + end)

    def _set(self, keys: np.ndarray, values: np.ndarray) -> None:
        if self._world.size == 1:
            self._worker.set(keys, values)
            return
        present = np.empty_like(values)
        self._worker.pull(keys, present)
        self._worker.push(keys, values - present)

    def advance_clock(self) -> int:
        """End a step, also of AdaPM's worker."""
        clock = super().advance_clock()
        self._worker.advance_clock()
        return clock

    def quiesce(self) -> None:
        """Wait until all completed pushes have reached the owners and all replicas (collective)."""
        self.require_open()
        self._node.sync()
        for _ in range(_HOPS):  # a dropped replica sends its last updates without waiting for an answer
            self._node.flush()
            self._world.barrier()
        self._node.sync()


def run_scheduler(num_keys: int) -> None:
    """Run AdaPM's scheduler until every node has shut down."""
    import adapm

    adapm.scheduler(num_keys, 1)
