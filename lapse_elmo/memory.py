"""Estimate the memory that a run needs, and refuse a run that does not fit before anything is allocated.

The estimate errs on the high side for what grows with the options; the memory of libraries is measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lapse_elmo import cgroups
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.errors import ConfigError
from lapse_elmo.frequent_rows import NumbersOfRanks, num_frequent
from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.mpi.node_memory import free_bytes as free_shared_bytes
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.manager import REPLICATING
from lapse_elmo.tables import DENSE_ROW, rule_of
from lapse_elmo.traffic import NodeUse

_LONG_BATCH = 3  # tokens of the longest batches, in multiples of the mean: sentences are sorted by length
_ROW_INDEX_BYTES = 45  # bookkeeping of every node for each row of a table, wherever the row is
_CHUNK_BYTES = 1 << 24  # a node reserves memory for rows in chunks of this size (lapse_elmo/ps/node_state.py)
_CHUNK_TARGETS = 256  # targets whose logits are in memory at the same time
_STATE_ARRAYS = {"adam": 2, "adagrad": 1, "sgd": 0}  # numbers of the dense optimizer per parameter
# Numbers that a position keeps per cell for the backward pass: gates and cells, in float32; AllenNLP's LSTM keeps more.
_CELL_NUMBERS = {"fused": 5, "allennlp": 8}
_COMPILED_BYTES = 40 << 20  # code that oneDNN compiles for the shapes of products, and what the allocator keeps
# By version: the files of a memory cgroup with its limit and its usage.
_CGROUP_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_NO_LIMIT = 1 << 60


class Shape(NumbersOfRanks, Protocol):
    """How ranks are placed on machines: a :class:`~lapse_elmo.mpi.world.World`, or one that is planned."""

    @property
    def rank(self) -> int:
        """The rank whose memory is estimated."""

    @property
    def local_size(self) -> int:
        """The number of ranks in its node."""

    @property
    def host_size(self) -> int:
        """The number of ranks on its machine."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, and of the memory that the ranks of its machine share.

    Attributes:
        rows: All rows of the job, with their accumulators.
        shared: The machine's share of the rows, replicas of other nodes' rows, the bookkeeping of its nodes, its ranks'
            sentences if they are kept in memory, and, if a node's ranks share them, dense parameters with optimizer
            state, and copies of all gradients.
        dense: Dense gradients of this rank, and the parameters with optimizer state if it has copies of its own.
        activations: Activations of a long batch, with the rows it pulls, and what libraries compile for it.
        copy: The copy that a checkpoint is written from, until it is written. Rank 0 also copies the dense parameters.
        libraries: What the process had allocated before.
    """

    rows: int
    shared: int
    dense: int
    activations: int
    copy: int
    libraries: int

    @property
    def rank(self) -> int:
        """Private memory of one rank."""
        return self.dense + self.activations + self.copy + self.libraries


def estimate(
    config: Config, num_classes: int, shards: ShardSet, world: Shape, on_gpu: Sequence[bool] = ()
) -> Estimate:
    """Estimate the memory of a run, for this rank and its machine; that of GPUs is not counted.

    Args:
        config: The options.
        num_classes: V.
        shards: The training sentences.
        world: How ranks are placed on machines.
        on_gpu: Whether each rank computes on a GPU; by default none does.
    """
    model, size = config.model, config.model.projection_size
    rule = rule_of(config.optimizer)
    row_bytes = 4 * sum(width + rule.state_width(width) for width in (size, size + 1))
    copies = 1 + _STATE_ARRAYS[config.dense_optimizer] + (config.dense_average > 0)  # of dense numbers
    num_dense = dense_size(size, model.cell_size, model.num_layers)
    in_server = config.training.dense == "ps"
    own_gpu = bool(on_gpu) and on_gpu[world.rank]
    in_node = world.size > 1 and not in_server and not any(on_gpu)
    rows = num_classes * row_bytes + in_server * 4 * copies * math.ceil(num_dense / DENSE_ROW) * DENSE_ROW
    nodes_here = world.host_size // world.local_size if world.local_size else 1
    mean = shards.num_tokens / max(shards.num_sentences, 1) + 2
    positions = int(config.training.batch_size * min(_LONG_BATCH * mean, config.data.max_length + 2))
    room = _room_bytes(config, num_classes, positions, world)
    shared = nodes_here * (rows // world.num_nodes + 2 * num_classes * _ROW_INDEX_BYTES + room)
    shared += nodes_here * in_node * 4 * copies * num_dense
    lstm = positions * 2 * model.num_layers * (_CELL_NUMBERS[model.lstm] * model.cell_size + 4 * size)
    parts, samples = config.training.accumulate, min(config.softmax.num_samples, num_classes)
    pulled = min(num_classes, samples + positions) + min(num_classes, positions)
    shared += world.host_size * shards.kept_bytes(world.size)
    # The ranks of a node share copies of their gradients, which are sums over their parts.
    shares_rows = in_node or (config.server.shares_rows and world.size > world.num_nodes)
    summed = int(pulled * _growth_by_parts(config, num_classes, positions))
    shared += world.host_size * 4 * (in_node * num_dense + shares_rows * 9 * summed * (size + 1) // 8)
    # The parts' gradients of rows are kept until all are summed, and joined for that. The sum of those of the LSTM is
    # kept while the next part's are computed.
    row_copies = 4 if parts == 1 else 3 + 2 * parts
    pulled_rows = row_copies * pulled * (size + 1)
    activations = 4 * (lstm + 2 * _CHUNK_TARGETS * samples + pulled_rows + 8 * positions * size) + _COMPILED_BYTES
    dense = 4 * num_dense * ((1 if in_node else max(2 + copies, 4)) + (parts > 1))
    if own_gpu:  # the host has copies of the rows, in pinned memory of up to twice their size, and of the gradients
        activations, dense = 4 * (pulled_rows + 2 * pulled * (size + 1)), 4 * num_dense * 2
    return Estimate(
        rows, shared, dense, activations,
        rows // world.size + (4 * copies * num_dense if world.rank == 0 else 0), _resident_bytes(),
    )


def _growth_by_parts(config: Config, num_classes: int, positions: int) -> float:
    """Return how many times as many distinct rows as one part all parts of a rank use, by the log-uniform law.

    Args:
        config: The options.
        num_classes: V.
        positions: Positions of a long batch.
    """
    if config.training.accumulate == 1:
        return 1.0
    softmax, rows = config.softmax, []
    for parts in (1, config.training.accumulate):
        drawers = parts if softmax.share_samples == "none" else 1
        use = NodeUse(
            num_classes, parts * positions, 1, softmax.num_samples, drawers, softmax.distribution, softmax.replacement
        )
        rows.append(float(use.input_words().sum() + use.classes().sum()))
    return rows[1] / rows[0]


def _room_bytes(config: Config, num_classes: int, positions: int, world: Shape) -> int:
    """Return what a node reserves beyond its share of the rows: for rows that move to it, and copies of others.

    A replica takes two rows: its values, and updates not yet sent. Memory is reserved in chunks, ahead of need, so
    small tables take several times their size.

    Args:
        config: The options.
        num_classes: V.
        positions: Positions of a long batch; each has one input word and up to two targets.
        world: The world.
    """
    if config.server.ps != "embedded" or world.num_nodes == 1:
        return 0
    frequent = num_frequent(config, num_classes, world)
    replicated = _borrowed_rows(config, num_classes, positions, world, frequent)
    size, rule, room = config.model.projection_size, rule_of(config.optimizer), 0
    for width, copied, borrowed in zip((size, size + 1), frequent, replicated, strict=True):
        row_bytes = 4 * (width + rule.state_width(width))
        table = num_classes * row_bytes
        room += copied * row_bytes - copied * row_bytes // world.num_nodes
        room += min(table - table // world.num_nodes, _CHUNK_BYTES)
        chunks = math.ceil(2 * borrowed * row_bytes / _CHUNK_BYTES + 0.5)  # half of one is kept free
        room += min(2 * table, chunks * _CHUNK_BYTES)
    return room


def _borrowed_rows(
    config: Config, num_classes: int, positions: int, world: Shape, frequent: tuple[int, int]
) -> tuple[int, int]:
    """Return how many rows of other nodes a node replicates at once, of the embedding and of the softmax.

    All rows that its workers have announced are counted, but not the ``frequent`` ones, which are never replicated.
    The intents of ``lookahead`` + 1 steps overlap; words are assumed to follow the log-uniform law.
    """
    if config.server.technique_for(config.training.sync) not in REPLICATING:
        return 0, 0
    steps, workers = config.training.lookahead + 1, config.training.accumulate * world.local_size
    drawers = workers if config.softmax.share_samples == "none" else 1
    probabilities = log_uniform_probability(np.arange(num_classes), num_classes)

    def distinct(draws: int) -> float:
        return float(-np.expm1(-draws * probabilities).sum())

    words = distinct(steps * workers * positions)
    classes = distinct(steps * workers * 2 * positions) + steps * drawers * config.softmax.num_samples
    elsewhere = 1 - 1 / world.num_nodes
    words, classes = (min(used, num_classes - most) for used, most in zip((words, classes), frequent, strict=True))
    return int(elsewhere * words), int(elsewhere * classes)


def dense_size(projection_size: int, cell_size: int, num_layers: int) -> int:
    """Return the number of parameters of the LSTM, of both directions."""
    cell = 4 * cell_size * (2 * projection_size + 1) + cell_size * projection_size
    return 2 * num_layers * cell + num_layers + 2


def check_memory(
    config: Config, num_classes: int, shards: ShardSet, world: World, on_gpu: Sequence[bool] = ()
) -> tuple[str, ...]:
    """Check that the run fits into the memory of each machine, GPUs aside (collective).

    Args:
        config: The options.
        num_classes: V.
        shards: The training sentences.
        world: The ranks.
        on_gpu: Whether each rank computes on a GPU; by default none does.

    Returns:
        One line per machine, for the log: what the run needs and what is free.

    Raises:
        ConfigError: On every rank, if it does not fit; the message suggests settings that do.
    """
    own = estimate(config, num_classes, shards, world, on_gpu)
    free = free_memory_bytes()
    by_host: dict[str, list[tuple[Estimate, int, int]]] = {}
    for host, rank, room, shared_room in world.allgather((world.host, own, free, free_shared_bytes())):
        by_host.setdefault(host, []).append((rank, room, shared_room))
    lines, refused = [], []
    for host, found in by_host.items():
        ranks = [rank for rank, _, _ in found]
        _, room, shared_room = found[0]
        private = sum(rank.rank - rank.libraries for rank in ranks)
        needed = ranks[0].shared + private
        lines.append(
            f"memory on {host}: {_gb(needed)} GB needed of {_gb(room)} GB free: {_gb(ranks[0].shared)} "
            f"shared (of {_gb(shared_room)} GB in /dev/shm), {_gb(sum(rank.copy for rank in ranks))} for checkpoints, "
            f"{len(ranks)} rank{'s'[: len(ranks) - 1]} with {_gb(ranks[0].dense)} dense, "
            f"{_gb(ranks[0].activations)} activations{' each'[: 5 * (len(ranks) - 1)]}"
        )
        if needed > room or ranks[0].shared > shared_room:
            refused.append((host, ranks, room, shared_room, needed))
    for host, ranks, room, shared_room, needed in refused:
        short = "shared memory" if ranks[0].shared > shared_room else "memory"
        has, takes = (shared_room, ranks[0].shared) if short == "shared memory" else (room, needed)
        raise ConfigError(
            f"the run takes about {_gb(takes)} GB of {short} on {host}, where {_gb(has)} GB are free: "
            f"{_what_fits(ranks, room, shared_room, num_classes, config.training.batch_size)}"
        ).on_every_rank()
    return tuple(lines)


def _what_fits(ranks: list[Estimate], room: int, shared_room: int, num_classes: int, batch_size: int) -> str:
    """Return a change of settings with which the run would fit."""
    own, count, copies = ranks[0], len(ranks), sum(rank.copy for rank in ranks)
    fixed = own.shared + count * own.dense + copies
    if own.shared <= shared_room:
        batch = int(0.9 * batch_size * (room - fixed) / max(count * own.activations, 1))
        if batch >= 1:
            return f"--batch-size {batch} would fit"
        fit = int((room - own.shared) / (own.dense + copies / count + own.activations))
        if 1 <= fit < count:
            return f"{fit} ranks there would fit"
    per_class = own.rows / max(num_classes, 1)
    # Memory on this machine per byte of rows.
    shares = (own.shared + copies) / max(own.rows, 1)
    left = min(shared_room * own.rows / max(own.shared, 1), (room - count * (own.dense + own.activations)) / shares)
    classes = int(0.9 * left / max(per_class, 1)) // 1000 * 1000
    if classes > 0:
        return f"a vocabulary of {classes:,} words would fit, or more nodes, or a smaller --projection-size"
    return "fewer ranks, a smaller --batch-size or --cell-size, or more nodes are needed"


def free_memory_bytes() -> int:
    """Return the memory that this process and its siblings may still allocate, on the machine or in its cgroups."""
    free = _NO_LIMIT
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *_cgroup_rooms()])


def _cgroup_rooms() -> Iterator[int]:
    """Yield what is left in each of this process's memory cgroups (version 2 or 1) that has a limit."""
    for folder, version in cgroups.groups("memory"):
        limit, usage = _CGROUP_FILES[version]
        for bound, used in zip(cgroups.numbers(folder / limit), cgroups.numbers(folder / usage), strict=False):
            if bound is not None and used is not None and bound < _NO_LIMIT:
                yield max(bound - used + _reclaimable(folder), 0)


def _reclaimable(folder: Path) -> int:
    """Return the bytes of file cache, which count as used but can be reclaimed.

    The usage includes that of the groups within. In version 1, so does only what begins with ``total_``.
    """
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    return sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}" if num_bytes < 1e11 else f"{num_bytes / 1e9:,.0f}"
