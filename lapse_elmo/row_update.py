"""Optimizer steps on the rows of a table with the gradients of all parts of a node.

Each part of a step has gradients for the rows that it pulled, and the parts' gradients for frequent words point in
similar directions. If every part took a step of its own, from the same pulled weights, Adagrad would move such a row up
to sqrt(R) times as far with R parts as with one, so training with many ranks would diverge. Therefore the gradients for
a row are added up within the node, and the row makes one step per node. Those for frequent rows, which most nodes use
in most steps, are added up over all nodes, each of which makes the same step on its own copy (``Segment.frequent``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lapse_elmo.model.dense import sum_of_squares
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.world import World
from lapse_elmo.node_sums import NodeSums, sum_bytes
from lapse_elmo.tables import RowTable


@dataclass(frozen=True)
class RowGradients:
    """Gradients of the sum of losses, for distinct rows.

    Attributes:
        keys: (n,) int64, their keys in the server.
        values: (n, size) float32 on any device.
        factor: What ``values`` are to be multiplied by.
    """

    keys: np.ndarray
    values: Tensor
    factor: float


class RowUpdate:
    """Steps on one table (collective in the node: its ranks make the same calls in the same order).

    A step consists of :meth:`put`, a barrier of the node, :meth:`add_up`, :meth:`finish`, any decision about the step,
    :meth:`push`, and a barrier of the node. Within a node, gradients are added up in the order of ranks, and each row
    is pushed by one rank, so on one node equal gradients give equal bits. If the table has frequent rows,
    :meth:`add_up` and :meth:`finish` are collective over all ranks.

    Attributes:
        sent_bytes: Bytes that all ranks send to other nodes per step, if they sum in a ring.

    Args:
        world: The world.
        table: The table.
        most_rows: The largest number of distinct rows for which a rank can have gradients.
        shared: Whether to add up over the node; else over the parts of this rank only.
        bf16: Whether nodes send each other gradients for frequent rows rounded to bfloat16.

    Raises:
        ConfigError: On every rank, if the shared memory cannot be created.
    """

    def __init__(
        self, world: World, table: RowTable, most_rows: int, *, shared: bool, bf16: bool = False
    ) -> None:
        self._table = table
        self._sums = RowGradients(np.empty(0, np.int64), torch.empty(0, table.size), 1.0)
        self._frequent = _FrequentRows(world, table, bf16)
        numbers = table.segment.frequent * table.size
        self.sent_bytes = world.num_nodes * sum_bytes(numbers, world.num_nodes, bf16=bf16)
        # All ranks create the shared memory together, also one that is alone on its node.
        several = world.size > world.num_nodes
        self._shared: _SharedGradients | None = None
        if shared and several:
            self._shared = _SharedGradients(world, table, most_rows, self._frequent.pusher)

    def put(self, parts: Sequence[RowGradients]) -> None:
        """Hand over the gradients of this rank's parts.

        Raises:
            ConfigError: If there is not enough shared memory.
        """
        self._sums = parts[0] if len(parts) == 1 else _sum_of(parts)
        if self._shared is not None:
            self._shared.write(self._sums)

    def add_up(self) -> None:
        """Add up this rank's share of the node's rows, which all ranks have put; begin to add up over the nodes."""
        if self._shared is not None:
            self._sums = self._shared.sums()
        self._sums = self._frequent.start(self._sums)

    def finish(self) -> float:
        """Wait for the sums.

        Returns:
            This rank's share in the squared norm of the sums.
        """
        return self._frequent.finish() + self._sums.factor**2 * sum_of_squares(self._sums.values)

    def push(self, scale: float) -> None:
        """Push ``scale`` times the sums."""
        for sums in (self._frequent.sums, self._sums):
            if sums.keys.size:
                self._table.push(sums.keys, sums.values, scale * sums.factor)


class _FrequentRows:
    """Sums over the nodes of the gradients for the frequent rows, which are dealt out to the ranks of each node."""

    def __init__(self, world: World, table: RowTable, bf16: bool) -> None:
        self._world, self._first_key, self._number = world, table.segment.first_key, table.segment.frequent
        if world.num_nodes == 1:
            self._number = 0
        # Ranks beyond the smallest node's size have no partner on each node, and no share.
        self._shares = int(world.gather_numbers(np.array([world.local_size])).min()) if self._number else 1
        number = self._number if world.local_rank < self._shares else 0
        self._keys = table.segment.keys(np.arange(world.local_rank, number, self._shares))
        self._values = torch.zeros(self._keys.size, table.size)
        across = world.across_nodes(self._shares) if self._number else None
        self._node_sums = None if across is None else NodeSums(across, bf16)
        self._wait: Callable[[], None] = lambda: None
        self.sums = RowGradients(self._keys[:0], self._values[:0], 1.0)

    def pusher(self, keys: np.ndarray) -> np.ndarray:
        """Return which rank of the node is to push each of the ``keys`` (n,)."""
        rows = keys - self._first_key
        return np.where(rows < self._number, rows % self._shares, rows % self._world.local_size)

    def start(self, sums: RowGradients) -> RowGradients:
        """Begin to add up the frequent rows among a rank's share of its node's sums; return the other rows."""
        if self._node_sums is None:
            return sums
        rows = sums.keys - self._first_key
        frequent = rows < self._number
        chosen, others = (torch.from_numpy(np.flatnonzero(which)) for which in (frequent, ~frequent))
        values = sums.values.detach().to("cpu")
        self._values.zero_()
        places = torch.from_numpy(rows[frequent] // self._shares)
        self._values.index_copy_(0, places, values[chosen].mul_(sums.factor))
        self._wait = self._node_sums.start(self._values.view(-1).numpy())
        return RowGradients(sums.keys[~frequent], values[others], sums.factor)

    def finish(self) -> float:
        """Wait for ``sums``; return this node's share in their squared norm."""
        if self._node_sums is None:
            return 0.0
        self._wait()
        found = self._values.any(1)  # rows without a gradient on any node are all zeros
        self.sums = RowGradients(self._keys[found.numpy()], self._values[found], 1.0)
        return sum_of_squares(self.sums.values) / self._world.num_nodes  # every node has the same sums


class _SharedGradients:
    """The gradients of a node's ranks in shared memory; ``pusher`` determines which rank adds up and pushes a key."""

    def __init__(
        self, world: World, table: RowTable, most_rows: int, pusher: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self._rank, ranks = world.local_rank, world.local_size
        self._most, self._pusher = most_rows, pusher
        self._reserved = 0
        name = table.segment.name
        self._keys_name, self._values_name = f"keys of {name} gradients", f"{name} gradients"
        self._memory = NodeMemory(world, {
            "bounds": ((ranks, ranks + 1), np.int64),
            "factors": ((ranks,), np.float64),
            self._keys_name: ((ranks * most_rows,), np.int64),
            self._values_name: ((ranks * most_rows, table.size), np.float32),
        })  # fmt: skip
        arrays = self._memory.arrays
        self._bounds, self._factors = arrays["bounds"], arrays["factors"]
        self._keys, self._values = arrays[self._keys_name], torch.from_numpy(arrays[self._values_name])

        def reserve() -> None:
            self._memory.reserve("bounds", self._rank, self._rank + 1)
            self._memory.reserve("factors", self._rank, self._rank + 1)

        world.together(reserve)

    def write(self, own: RowGradients) -> None:
        """Write this rank's gradients, sorted by the rank that will push them."""
        first, number = self._rank * self._most, own.keys.size
        self._reserve(number)
        pusher = self._pusher(own.keys)
        order = np.argsort(pusher, kind="stable")
        self._bounds[self._rank] = np.searchsorted(pusher[order], np.arange(len(self._factors) + 1)) + first
        self._factors[self._rank] = own.factor
        np.take(own.keys, order, out=self._keys[first : first + number])
        values = own.values.detach().to("cpu")
        torch.index_select(values, 0, torch.from_numpy(order), out=self._values[first : first + number])

    def sums(self) -> RowGradients:
        """Return the sums of all ranks' gradients for the rows that this rank pushes."""
        ranges = self._bounds[:, self._rank : self._rank + 2]
        positions = np.concatenate([np.arange(first, end) for first, end in ranges])
        factors = np.repeat(self._factors, ranges[:, 1] - ranges[:, 0])
        return _add_up(self._keys[positions], positions, factors, self._values)

    def _reserve(self, number: int) -> None:
        """Reserve memory for ``number`` rows of this rank; an eighth more than that, so that it seldom grows."""
        if number > self._reserved:
            end = min(self._most, number + number // 8)
            first = self._rank * self._most
            for name in (self._keys_name, self._values_name):
                self._memory.reserve(name, first + self._reserved, first + end)
            self._reserved = end


def _sum_of(parts: Sequence[RowGradients]) -> RowGradients:
    values = torch.cat([part.values.detach().to("cpu") for part in parts])
    factors = np.repeat([part.factor for part in parts], [part.keys.size for part in parts])
    keys = np.concatenate([part.keys for part in parts])
    return _add_up(keys, np.arange(keys.size), factors, values)


@torch.no_grad()
def _add_up(keys: np.ndarray, positions: np.ndarray, factors: np.ndarray, values: Tensor) -> RowGradients:
    """Add up the gradients of each key, in the order given.

    Args:
        keys: (n,) int64, which may repeat.
        positions: (n,) int64, where the gradient of each key is in ``values``.
        factors: (n,) by which it is multiplied.
        values: (N, size) float32.

    Returns:
        The sums, with ascending keys.
    """
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    sums = embedding_bag(
        torch.from_numpy(positions[order]), values, torch.from_numpy(starts), mode="sum",
        per_sample_weights=torch.from_numpy(factors[order]).float(),
    )
    return RowGradients(keys[starts], sums, 1.0)
