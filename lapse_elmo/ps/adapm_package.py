"""The parameter server of the package ``adapm`` (AdaPM, 2022): relocation and replication, by intent."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch

from lapse_elmo.ps.api import DONE, Array
from lapse_elmo.ps.package_node import PackageNode
from lapse_elmo.ps.package_server import PackageServer, Pending

_MARKERS = 32  # keys a node beyond the layout's, which never move: some of each node on each channel of messages
_HOPS = 3  # by which an update reaches the owner: where the row was last seen, its home, its owner


class AdapmNode(PackageNode):
    package = "adapm"
    repository = "https://github.com/alexrenz/AdaPM"
    techniques: ClassVar[dict[str, str]] = {
        "adaptive": "all", "relocation": "relocation_only", "replication": "replication_only", "static": "all",
    }

    def load(self) -> ModuleType:
        import adapm

        return adapm

    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        first, number = self.layout.num_keys, _MARKERS * self.world.size
        self._markers = np.arange(first, first + number)
        self.module.setup(first + number, 1, self.techniques[self.technique])
        widths = torch.cat([widths, torch.ones(number, dtype=widths.dtype)])
        server = self.module.Server(widths)  # blocks until all nodes are there
        return server, self.module.Worker(0, server)

    def sync(self) -> None:
        """Until updates of replicas here are with their owners, and those of the owners are here.

        AdaPM's wait_sync returns when a round has sent its messages. The second one waits for the answers to them.
        """
        self.worker.wait_sync()
        self.worker.wait_sync()

    def flush(self) -> None:
        """Until every message from here has been dealt with where it went: the answers to these pulls come after."""
        self.worker.pull(self._markers, np.empty(self._markers.size, np.float32))

    def stop(self) -> None:
        self.worker.finalize()
        self.worker = None
        self.server.shutdown()
        self.server = None


class AdapmServer(PackageServer):
    """Rows in AdaPM.

    A row that several nodes intend to use in the same clocks has replicas, which AdaPM brings up to date in rounds, up
    to 1,000 a second; how far one lags is bounded by the time of two rounds, not by clocks. :meth:`quiesce` waits for
    them. When a replica comes or goes, a pull can overtake even the node's own last updates to the row.

    Set rows before they are announced, as training does. A node aborts when it is asked to set a row of which it has a
    replica, which no other node can know; on several nodes ``set`` therefore pulls the rows and adds the difference.
    That is exact for rows that were 0, as all are at the start, and rounds for others; for rows that are replicated, or
    set by two at once, updates under way are added to it.

    AdaPM's threads start before what they use is ready. With several nodes some versions crash at the start or do not
    come up in time; the job then ends, and may well start the next time.
    """

    node_type = AdapmNode
    _node: AdapmNode
    reads_buffers_later = False
    emulated = (
        "localize is an intent for the present clock", "samples are drawn by us; the scheme local as naive",
        "update rules are computed by the workers, which pull and push whole rows",
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._first_clock = self._worker.current_clock()  # a node that served before has clocks behind it

    def localize_async(self, keys: Array) -> int:
        """Announce ``keys`` for the present clock. The ticket waits until rounds are over that bring the rows here.

        They stay until the clock advances, and where other nodes intend to use them they come as replicas.
        """
        keys, segment = self.checked_keys(keys)
        self.stats.localized_rows += keys.size
        if segment is None or self._world.size == 1:
            return DONE
        clock = self._first_clock + self.clock
        self._worker.intent(keys, clock, clock + 1)
        return self._ticket(Pending(self._node.sync, ()))

    def intent(self, keys: Array, start: int, end: int) -> None:
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
        clock = super().advance_clock()
        self._worker.advance_clock()
        return clock

    def quiesce(self) -> None:
        self.require_open()
        self._node.sync()
        for _ in range(_HOPS):  # a replica that was given up sends its last updates without waiting for an answer
            self._node.flush()
            self._world.barrier()
        self._node.sync()


def run_scheduler(num_keys: int) -> None:
    """Until every node has shut down."""
    import adapm

    adapm.scheduler(num_keys, 1)
