"""Metrics of the parameter server between two reports, over all ranks: locality of accesses, traffic, placement."""

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
    """Turns the server's counters into metrics of the steps since the last report."""

    def __init__(self, server: ParameterServer, world: World) -> None:
        self._server, self._world = server, world
        self._previous = self._counts()
        self._band_ends = {segment.name: band_ends(segment.num_rows) for segment in server.layout.segments}

    def metrics(self, num_steps: int) -> dict[str, float]:
        """Return the metrics since the last call by name (collective).

        Rows and bytes are per step, summed over ranks; waits are in seconds per step and rank.
        """
        current = self._counts()
        sums = self._world.sum_(current - self._previous)
        self._previous = current
        steps = max(num_steps, 1)
        metrics: dict[str, float] = {"server/clock_wait_s": float(sums[-1]) / steps / self._world.size}
        width = len(_WORKER) + len(_NODE)
        for number, name in enumerate(self._band_ends):
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
    def excluded(self) -> Iterator[None]:
        """Return a context manager that excludes its body, such as a save or an evaluation, from the metrics."""
        start = self._counts()
        yield
        self._previous = self._previous + self._counts() - start

    def pending(self) -> list[float]:
        """Return all ranks' counts since the last report (collective), for a checkpoint."""
        return self._world.sum_(self._counts() - self._previous).tolist()

    def resume(self, pending: list[float]) -> None:
        """Continue from the result of :meth:`pending`; ignored if an engine with other counters saved it."""
        if self._world.rank == 0 and len(pending) == self._previous.size:
            self._previous = self._previous - np.array(pending)

    def placement(self, report: int) -> dict[str, Any]:
        """Return the current placement of rows for metrics.jsonl, for every ``num_nodes``-th report (collective).

        Its size grows with the number of nodes. Given at each report, it would make up nearly all of metrics.jsonl: on
        64 nodes gigabytes per week.

        Args:
            report: The number of the report since the run began, from 0, so that a resumed run has the same turns.

        Returns:
            ``{segment: {"ends": [...], "main": [[...], ...], "replicas": [[...], ...]}}``: the ends of the bands of row
            numbers, and for each node the number of main copies and of replicas in each band. Empty on ranks other than
            0, if it is not the turn, and if the server does not report it.
        """
        is_due = report % self._world.num_nodes == 0
        placement = {}
        for name, ends in self._band_ends.items() if is_due else ():
            found = self._world.gather(self._server.placement(name, ends))
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
    """Return the ends of at most ``NUM_BANDS`` bands of row numbers, equally wide on a logarithmic scale.

    Rows are ordered by word frequency, which falls roughly as a power of the row number.
    """
    return np.unique(np.geomspace(1, num_rows, NUM_BANDS).round().astype(np.int64))
