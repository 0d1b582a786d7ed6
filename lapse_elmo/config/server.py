"""The options of the parameter server."""

from __future__ import annotations

from dataclasses import dataclass

from lapse_elmo.config.checks import require
from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Which parameter server stores the rows, and how it moves them."""

    ps: str = option(
        "embedded", choices=("embedded", "lapse", "adapm"),
        help="parameter server: our own, or the installed package lapse or adapm, with which each rank is a node",
    )
    technique: str = option(
        "", choices=("", "adaptive", "relocation", "replication", "static"), metavar="NAME",
        help="how rows come to the node that needs them: relocation (they move), replication (they are copied), "
        "adaptive (whichever fits), or static (they stay) (default: adaptive; relocation with --sync or --ps lapse)",
    )
    staleness: int = option(4, metavar="N", help="how many steps a replica may lag behind, 2 or more")
    frequent_rows: int = option(
        -1, metavar="N",
        help="on several nodes, copy the first N rows of each table to every node, and sum their gradients over all "
        "nodes at each step (-1: as many as a node uses in at least a quarter of its steps; 0: none)"
    )
    nodes: int = option(
        0, metavar="N",
        help="split the ranks of each machine into N nodes, to try several nodes on one machine (0: one node per "
        "machine)"
    )

    def __post_init__(self) -> None:
        require(self.staleness >= 2, "staleness", self.staleness, "2 or more")
        require(self.frequent_rows >= -1, "frequent_rows", self.frequent_rows, "-1 or more")
        require(self.nodes >= 0, "nodes", self.nodes, "0 or more")
        if self.nodes > 1 and self.ps != "embedded":
            raise ConfigError(f"--nodes is for the embedded server; with --ps {self.ps} each rank is a node: drop one")
        if self.frequent_rows > 0 and self.ps != "embedded":
            raise ConfigError(f"--frequent-rows is for the embedded server, not for --ps {self.ps}: drop one")

    @property
    def shares_rows(self) -> bool:
        """Whether the ranks of a node have the same rows in their memory; for the packages each rank is a node."""
        return self.ps == "embedded"

    def technique_for(self, sync: bool) -> str:
        """Return the technique asked for, or the default for this server; with ``sync`` rows must have one copy."""
        return self.technique or ("relocation" if sync or self.ps == "lapse" else "adaptive")
