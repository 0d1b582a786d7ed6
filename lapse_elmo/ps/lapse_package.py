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
    """A rank as a node of Lapse."""

    package = "lapse"
    repository = "https://github.com/alexrenz/lapse-ps"
    techniques = ("adaptive", "relocation", "static")

    def load(self) -> ModuleType:
        """Import ``lapse``."""
        import lapse

        return lapse

    def start(self, widths: torch.Tensor) -> tuple[Any, Any]:
        """Start the node and its worker."""
        self.module.setup(self.layout.num_keys, 1)  # blocks until all nodes are up
        server = self.module.Server(widths)
        return server, self.module.Worker(0, 1, server)

    def stop(self) -> None:
        """Delete the worker and shut the node down."""
        # Not by the worker's finalize(), which waits in a barrier while holding the interpreter's lock.
        self.worker = None
        self.server.shutdown()
        self.server = None


class LapseServer(PackageServer):
    """Rows in Lapse.

    A row has one copy, so operations are sequentially consistent per key, and a barrier makes all of them visible.
    ``intent`` localizes asynchronously at once, regardless of its clocks; if several ranks announce a row, the last one
    gets it.
    """

    node_type = LapseNode
    reads_buffers_later = True
    emulated = (
        "intent is an asynchronous localize", "lapse-elmo counts the clocks",
        "lapse-elmo draws the samples, with the scheme local as naive",
        "update rules are computed by the workers, which pull and push whole rows",
    )

    def localize(self, keys: Array) -> None:
        """Relocate rows to this node and wait for them."""
        self._localize(keys, later=False)

    def localize_async(self, keys: Array) -> int:
        """Start to relocate rows to this node."""
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
        """Start to relocate rows to this node, without a ticket."""
        keys, segment = self.checked_keys(keys)
        self.checked_clocks(start, end)
        self.stats.intended_rows += keys.size
        if segment is not None and self._uses_intents:
            self._worker.localize(distinct(keys), True)

    def quiesce(self) -> None:
        """Wait for all ranks: with one copy per row, completed pushes are visible to all."""
        self.barrier()


def run_scheduler(num_keys: int) -> None:
    """Run Lapse's scheduler until every node has shut down."""
    import lapse

    lapse.scheduler(num_keys, 1)
