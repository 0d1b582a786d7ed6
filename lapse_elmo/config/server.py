"""The options of the parameter server."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lapse_elmo.config.checks import require
from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError

MAX_TRACED_ROWS = 10_000  # a traced row costs several lines of a file per step


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
    trace_rows: tuple[str, ...] = option(
        (), metavar="ROWS",
        help="trace accesses, relocations and replicas of these rows of both tables, to --run-dir/trace: a row number, "
        f"a range such as 0-99, or random:N; at most {MAX_TRACED_ROWS:,} in all (default: none)"
    )

    def __post_init__(self) -> None:
        require(self.staleness >= 2, "staleness", self.staleness, "2 or more")
        require(self.frequent_rows >= -1, "frequent_rows", self.frequent_rows, "-1 or more")
        require(self.nodes >= 0, "nodes", self.nodes, "0 or more")
        if self.nodes > 1 and self.ps != "embedded":
            raise ConfigError(f"--nodes is for the embedded server; with --ps {self.ps} each rank is a node: drop one")
        if self.frequent_rows > 0 and self.ps != "embedded":
            raise ConfigError(f"--frequent-rows is for the embedded server, not for --ps {self.ps}: drop one")
        if self.trace_rows and self.ps != "embedded":
            raise ConfigError(f"--trace-rows is for the embedded server, not for --ps {self.ps}: drop one")
        ranges, num_random = self.traced
        total = num_random + sum(last - first + 1 for first, last in ranges)
        require(total <= MAX_TRACED_ROWS, "trace_rows", f"{total:,} rows", f"at most {MAX_TRACED_ROWS:,}")

    @property
    def traced(self) -> tuple[list[tuple[int, int]], int]:
        """The rows of ``--trace-rows``: ranges (first, last), and a number of random rows.

        Raises:
            ConfigError: If one of them is malformed.
        """
        ranges, num_random = [], 0
        for text in self.trace_rows:
            found = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?|random:(\d{1,12})", text)
            require(found is not None, "trace_rows", text, "a row number, a range such as 0-99, or random:N")
            assert found is not None
            first, last, number = found.groups()
            num_random += int(number or 0)
            if first:
                require(int(first) <= int(last or first), "trace_rows", text, "a range from low to high")
                ranges.append((int(first), int(last or first)))
        return ranges, num_random

    @property
    def shares_rows(self) -> bool:
        """Whether the ranks of a node have the same rows in their memory; for the packages each rank is a node."""
        return self.ps == "embedded"

    def technique_for(self, sync: bool) -> str:
        """Return the technique asked for, or the default for this server; with ``sync`` rows must have one copy."""
        return self.technique or ("relocation" if sync or self.ps == "lapse" else "adaptive")
