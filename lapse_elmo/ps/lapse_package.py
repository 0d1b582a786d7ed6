"""The parameter server of the package ``lapse`` (VLDB 2020): relocation, one copy of each row."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lapse_elmo.ps.api import DONE, Array
from lapse_elmo.ps.layout import distinct
from lapse_elmo.ps.package_node import PackageNode
from lapse_elmo.ps.package_server import PackageServer, Pending


class LapseNode(PackageNode):
    package = "lapse"
    repository = "https://github.com/alexrenz/lapse-ps"
    techniques = ("adaptive", "relocation", "static")

    def load(self) -> ModuleType:
        import lapse

        return lapse

    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        self.module.setup(self.layout.num_keys, 1)  # blocks until all nodes are there
        server = self.module.Server(widths)
        return server, self.module.Worker(0, 1, server)

    def stop(self) -> None:
        # The worker's own finalize() waits in a barrier with Python's lock held; deleting the object is what it needs.
        self.worker = None
        self.server.shutdown()
        self.server = None


class LapseServer(PackageServer):
    """Rows in Lapse.

    A row has one copy: operations are sequentially consistent per key, and a barrier makes all of them visible.
    ``intent`` localizes at once, whatever its clocks are, and does not wait; where ranks announce the same rows, the
    last one has them.
    """

    node_type = LapseNode
    reads_buffers_later = True
    emulated = (
        "intent is an asynchronous localize", "clocks are ours", "samples are drawn by us; the scheme local as naive",
        "update rules are computed by the workers, which pull and push whole rows",
    )

    def localize(self, keys: Array) -> None:
        self._localize(keys, later=False)

    def localize_async(self, keys: Array) -> int:
        return self._localize(keys, later=True)

    def _localize(self, keys: Array, later: bool) -> int:
        keys, segment = self.checked_keys(keys)
        if segment is None:
            return DONE
        timestamp = self._worker.localize(distinct(keys), later)
        self.stats.localized_rows += keys.size
        if not later or timestamp == DONE:
            return DONE
        return self._ticket(Pending(lambda: self._worker.wait(timestamp), ()))

    def intent(self, keys: Array, start: int, end: int) -> None:
        keys, segment = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size
        if segment is not None and self._uses_intents:
            self._worker.localize(distinct(keys), True)

    def quiesce(self) -> None:
        self.barrier()


def run_scheduler(num_keys: int) -> None:
    """Until every node has shut down."""
    import lapse

    lapse.scheduler(num_keys, 1)
