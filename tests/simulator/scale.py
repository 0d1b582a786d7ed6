"""Count what a training job costs the server at any number of nodes, with the real code on the simulated network.

Rows are one float wide, so that many nodes fit into one process; bytes are counted as for rows of the given width. As
in bin/train, each worker announces the rows of its next batch, pulls those of the current one, pushes them, and waits
for all others. The rows are distinct input words, distinct targets, and negative samples shared by the node's workers.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from lapse_elmo.ps import wire
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.messages import HolderPush, Push
from lapse_elmo.ps.rows import MAIN_ROWS, REPLICA_ROWS
from lapse_elmo.ps.sampling import Distribution
from lapse_elmo.ps.transport import Address
from lapse_elmo.rng import stream
from lapse_elmo.traffic import NodeUse
from tests.simulator.network import Pace, SimTransport, Simulation, Task
from tests.simulator.platform import Job, SimPlatform, SimWorld


@dataclass(frozen=True)
class Workload:
    """A training job. ``row_floats``: floats per whole row; ``weights``: those of them that are pulled and pushed."""

    num_nodes: int
    workers_per_node: int
    num_classes: int = 793_471
    num_samples: int = 8192
    num_tokens: int = 800  # per step and worker
    row_floats: int = 1026
    weights: int = 513
    step_s: float = 2.7
    steps: int = 4
    warm_up: int = 2
    technique: str = "adaptive"
    share_samples: bool = True
    frequent: tuple[int, int] = (0, 0)  # rows of the embedding and of the softmax

    @property
    def use(self) -> NodeUse:
        """What a node uses in a step."""
        drawers = 1 if self.share_samples else self.workers_per_node
        return NodeUse(self.num_classes, self.num_tokens, self.workers_per_node, self.num_samples, drawers)


@dataclass
class Counts:
    """Costs per step and node, over the steps after the warm-up."""

    transmissions: float = 0.0
    messages: float = 0.0
    rows_per_message: float = 0.0
    sent_bytes: float = 0.0
    manager_s: float = 0.0
    distinct_rows: float = 0.0
    remote_share: float = 0.0
    bookkeeping_bytes: float = 0.0  # of one node
    bytes_per_token: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)  # number of messages by kind
    rows_by_kind: dict[str, float] = field(default_factory=dict)


class CountingTransport(SimTransport):
    """Counts sent messages and bytes as if rows had their real width."""

    counts: Counter[str]
    workload: Workload

    def send(self, to: Address, block: np.ndarray) -> None:
        self.counts["transmissions"] += 1
        for message in wire.read(block):
            values = getattr(message, "values", None)
            rows = getattr(message, "rows", block[:0]).size
            pushed = isinstance(message, (Push, HolderPush))
            width = self.workload.weights if pushed else self.workload.row_floats
            size = message.block.size + (0 if values is None else 4 * rows * (width - 1))
            self.counts["bytes"] += size
            self.counts["rows"] += rows
            self.counts["messages"] += 1
            self.counts["kind " + type(message).__name__] += 1
            self.counts["rows " + type(message).__name__] += rows
        super().send(to, block)

    def send_values(self, rank: int, values: np.ndarray) -> None:
        self.counts["bytes"] += 4 * values.size * self.workload.weights
        self.counts["transmissions"] += 1
        super().send_values(rank, values)


class CountingPlatform(SimPlatform):
    """A platform whose transports count into ``counts``, if this rank's node is counted."""

    def __init__(self, world: SimWorld, workload: Workload, counts: Counter[str]) -> None:
        super().__init__(world, 1.0)
        self._workload, self._counts = workload, counts

    def transport(self, tag: int, *, low_latency: bool) -> SimTransport:
        transport = CountingTransport(self._job.simulation, self._world.rank, tag)
        transport.counts, transport.workload = self._counts, self._workload
        return transport


class _Worker:
    """Run the steps of one worker."""

    def __init__(
        self, workload: Workload, job: Job, rank: int, counts: Counter[str], warm_up: Counter[str]
    ) -> None:
        self.workload, self.job, self.rank, self.counts, self.warm_up = workload, job, rank, counts, warm_up
        self.world = SimWorld(job, rank)
        self.world.oversubscribed = False  # every rank of the job has a core
        self.platform = CountingPlatform(self.world, workload, counts)
        self.distribution = Distribution("log-uniform", workload.num_classes)

    def run(self) -> None:
        workload = self.workload
        layout = Layout.of(*(
            (name, workload.num_classes, 1, None, number)
            for name, number in zip(("embedding", "softmax"), workload.frequent, strict=True)
        ))
        world: Any = self.world
        server = EmbeddedServer(world, layout, technique=workload.technique, platform=self.platform)
        if server._manager is not None:
            _time_steps(server, self.counts)
        batches = [self.batch(step) for step in range(2)]
        for step in range(workload.steps):
            if step == workload.warm_up:
                before = [(stats.pulled_rows, stats.remote_pulled_rows) for stats in server.stats.segments.values()]
                if self.rank == 0:
                    self.warm_up.update(self.counts)
            if step == 0:
                self.announce(server, batches[0], 0)
            self.announce(server, batches[1], step + 1)
            pulled = {name: np.empty((rows.size, 1), np.float32) for name, rows in batches[0].items()}
            for name, rows in batches[0].items():
                server.pull(layout[name].keys(rows), pulled[name])
            self.job.simulation.sleep(workload.step_s / 8)
            self.world.barrier()  # stands for the sum of dense gradients
            for name, rows in batches[0].items():
                server.push(layout[name].keys(rows), pulled[name])
            server.advance_clock()
            batches = [batches[1], self.batch(step + 2)]
        self.finish(server, before)

    def finish(self, server: EmbeddedServer, before: list[tuple[int, int]]) -> None:
        """Store the counts of the rank's server since the warm-up."""
        self.world.barrier()
        for stats, (pulled, remote) in zip(server.stats.segments.values(), before, strict=True):
            self.counts["pulled"] += stats.pulled_rows - pulled
            self.counts["remote"] += stats.remote_pulled_rows - remote
        if server._manager is not None:
            arrays = server._memory.arrays.items()
            size = sum(array.nbytes for name, array in arrays if not name.endswith((MAIN_ROWS, REPLICA_ROWS)))
            for state in server._manager.states:
                dense = (state.intents, state.wanted, state.replica_owner)
                size += sum(array.nbytes for array in dense) + state.holders.num_bytes
            self.counts["bookkeeping"] += size
        server.close()

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the distinct rows of each table that a step uses."""
        tokens = self.distribution.draw(stream(1, "tokens", self.rank, step), self.workload.num_tokens)
        key = self.world.node if self.workload.share_samples else self.rank
        samples = self.distribution.draw_distinct(stream(1, "samples", key, step), self.workload.num_samples)
        return {"embedding": np.unique(tokens), "softmax": np.unique(np.concatenate([tokens, samples]))}

    def announce(self, server: EmbeddedServer, batch: dict[str, np.ndarray], clock: int) -> None:
        """Announce a batch for ``clock``."""
        for name, rows in batch.items():
            server.intent(server.layout[name].keys(rows), clock, clock + 1)


def _time_steps(server: EmbeddedServer, counts: Counter[str]) -> None:
    """Count the processor time of the manager's steps."""
    manager = server._manager
    assert manager is not None
    step = manager.step

    def timed() -> bool:
        start = time.process_time()
        try:
            return step()
        finally:
            counts["manager ns"] += int(1e9 * (time.process_time() - start))

    manager.step = timed  # type: ignore[method-assign]


def count(workload: Workload) -> Counts:
    """Run ``workload``; return its costs."""
    pace = Pace(latency_s=5e-5, slow_share=0.0, preemption=0.0, poll_s=1e-3)
    simulation = Simulation(Random(0), pace, longest_s=1e6, repeat_polls=False)  # managers' polls are counted, too
    job = Job(simulation, workload.num_nodes, workload.workers_per_node)
    counts: Counter[str] = Counter()
    warm_up: Counter[str] = Counter()  # counts at the end of the warm-up
    for rank in range(job.size):
        simulation.add(Task(f"worker {rank}", _Worker(workload, job, rank, counts, warm_up).run))
    simulation.run()
    counts.subtract(warm_up)
    share = 1 / (workload.num_nodes * (workload.steps - workload.warm_up))
    tokens = workload.num_tokens * workload.workers_per_node
    worker = _Worker(workload, job, 0, counts, warm_up)
    return Counts(
        transmissions=counts["transmissions"] * share,
        messages=counts["messages"] * share,
        rows_per_message=counts["rows"] / max(counts["messages"], 1),
        sent_bytes=counts["bytes"] * share,
        manager_s=counts["manager ns"] * 1e-9 * share,
        distinct_rows=float(worker.batch(0)["softmax"].size),
        remote_share=counts["remote"] / max(counts["pulled"], 1),
        bookkeeping_bytes=counts["bookkeeping"] / workload.num_nodes,
        bytes_per_token=counts["bytes"] * share / tokens,
        by_kind={key[5:]: round(n * share, 1) for key, n in counts.items() if key.startswith("kind ")},
        rows_by_kind={key[5:]: round(n * share, 1) for key, n in counts.items() if key.startswith("rows ")},
    )
