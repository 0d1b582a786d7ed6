"""The native packages as engines of the contract suite, if installed, and the checks that cannot hold for them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import ParameterServer
from lapse_elmo.ps.layout import Layout

# Why a check is not asked of a package, by (package, check).
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("adapm", "own_pushes_are_seen_wherever_rows_are"): "where a replica comes or goes, a pull can overtake the node's "
    "own updates on their way to the owner: they are late, not lost",
    ("adapm", "pushes_are_seen_after_a_number_of_clocks"): "how far a replica lags is bounded by time, not by clocks",
    ("adapm", "sets_are_seen_wherever_rows_are"): "it cannot set rows that have replicas; the difference that is added "
    "instead is taken to what is seen, which such updates may not have reached",
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class OnOneNode:
    """One node for all servers of the suite, since a process can start only one; it ends with the process."""

    def __init__(self, package: str) -> None:
        self.package = package
        self._node: Any = None

    def __call__(self, world: World, layout: Layout, *args: Any) -> ParameterServer:
        adapter = importlib.import_module(f"lapse_elmo.ps.{self.package}_package")
        if self._node is None:
            self._node = getattr(adapter, f"{self.package.title()}Node")(world, layout, "adaptive")
        server: ParameterServer = getattr(adapter, f"{self.package.title()}Server")(
            world, layout, *args, node=self._node
        )
        return server
