"""What the parameter server did between two reports, over all ranks: how local the rows were and where they lived."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.api import NodeStats, ParameterServer, SegmentStats

NUM_BANDS = 32
_WORKER = ("pulled_rows", "pushed_rows", "remote_pulled_rows", "remote_pushed_rows", "wait_s", "sent_bytes")
_NODE = ("relocated_in_rows", "replicated_rows", "synchronised_rows", "sent_bytes")


class ServerMeter:
    """Differences of the server's statistics from report to report."""

    def __init__(self, server: ParameterServer, world: World) -> None:
        self._server, self._world = server, world
        self._before = self._counts()
        self._ends = {segment.name: band_ends(segment.num_rows) for segment in server.layout.segments}

    def metrics(self, num_steps: int) -> dict[str, float]:
        """Return metrics since the last call, by name (collective).

        Rows and bytes are per step, summed over ranks; waits are seconds per step and rank.
        """
        now = self._counts()
        sums = self._world.sum_(now - self._before)
        self._before = now
        steps = max(num_steps, 1)
        metrics: dict[str, float] = {"server/clock_wait_s": float(sums[-1]) / steps / self._world.size}
        width = len(_WORKER) + len(_NODE)
        for number, name in enumerate(self._ends):
            part = sums[number * width : (number + 1) * width].tolist()
            worker, node = dict(zip(_WORKER, part, strict=False)), dict(zip(_NODE, part[len(_WORKER) :], strict=True))
            touched = worker["pulled_rows"] + worker["pushed_rows"]
            remote = worker["remote_pulled_rows"] + worker["remote_pushed_rows"]
            metrics |= {
                f"server/{name}_pulled_rows": worker["pulled_rows"] / steps,
                f"server/{name}_pushed_rows": worker["pushed_rows"] / steps,
                f"server/{name}_local_share": 1.0 - remote / max(touched, 1.0),
                f"server/{name}_wait_s": worker["wait_s"] / steps / self._world.size,
                f"server/{name}_relocated_rows": node["relocated_in_rows"] / steps,
                f"server/{name}_replicated_rows": node["replicated_rows"] / steps,
                f"server/{name}_synchronised_rows": node["synchronised_rows"] / steps,
                f"server/{name}_sent_bytes": (worker["sent_bytes"] + node["sent_bytes"]) / steps,
            }
        return metrics

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude what happens inside, such as a save or an evaluation, from the statistics."""
        start = self._counts()
        yield
        self._before = self._before + self._counts() - start

    def pending(self) -> list[float]:
        """Return (collective) all ranks' counts since the last report, for a run that goes on in another process."""
        return self._world.sum_(self._counts() - self._before).tolist()

    def go_on(self, pending: list[float]) -> None:
        """Count from where :meth:`pending` was; other engines may count other things, and start anew."""
        if self._world.rank == 0 and len(pending) == self._before.size:
            self._before = self._before - np.array(pending)

    def placement(self) -> dict[str, Any]:
        """Return (collective) where rows live now, for metrics.jsonl; nothing where the server does not tell.

        ``{segment: {"ends": [...], "main": [[...] of each node], "replicas": [[...]]}}``, rows by band of row numbers.
        """
        placement = {}
        for name, ends in self._ends.items():
            found = self._world.allgather(self._server.placement(name, ends))
            nodes = [rows for rows in found if rows is not None]
            if nodes:
                main, replicas = ([node[kind].tolist() for node in nodes] for kind in (0, 1))
                placement[name] = {"ends": ends.tolist(), "main": main, "replicas": replicas}
        return placement

    def _counts(self) -> np.ndarray:
        stats = self._server.stats
        counts: list[float] = []
        for segment in self._server.layout.segments:
            worker: dict[str, float] = asdict(stats.segments.get(segment.name, SegmentStats()))
            node: dict[str, float] = asdict(stats.node.get(segment.name, NodeStats()))
            counts += [worker[key] for key in _WORKER] + [node[key] for key in _NODE]
        return np.array([*counts, stats.clock_wait_s], np.float64)


def band_ends(num_rows: int) -> np.ndarray:
    """Return the ends of at most ``NUM_BANDS`` bands of row numbers, equally wide in the logarithm of the number.

    Rows are ordered by frequency, which falls about as a power of the row number.
    """
    return np.unique(np.geomspace(1, num_rows, NUM_BANDS).round().astype(np.int64))
