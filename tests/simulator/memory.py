"""The shared memory of the nodes of a simulated job.

Arrays of one kind are side by side for all nodes and segments, so that the invariants of all nodes and the change of
whatever a node's tasks poll are each a comparison of one array. A node sees them as separate arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lapse_elmo.errors import ConfigError
from lapse_elmo.ps.platform import Shapes

_POLLED = ("clocks", "synced", "ring counters")  # what tasks read while they poll


@dataclass
class Memory:
    """The arrays of one node. ``capacity`` limits the elements that may be reserved in total, unless negative."""

    arrays: dict[str, np.ndarray]
    polled: np.ndarray  # (n,) int64: all that the node's tasks read while they poll
    capacity: int = -1

    def reserve(self, name: str, first: int, end: int) -> None:
        if self.capacity >= 0:
            self.capacity -= end - first
            if self.capacity < 0:
                raise ConfigError(f"no room for {name}")


class JobMemory:
    """The arrays of all nodes, zero at first.

    Args:
        num_nodes: Number of nodes.
        shapes: Shape and dtype of each array of a node, by name.

    Attributes:
        entries: (num_nodes, num_keys, 2) uint32, flags and slots of the rows of all segments, in the order of keys.
        stamps: (num_nodes, num_keys) int64, the owner stamps.
    """

    def __init__(self, num_nodes: int, shapes: Shapes) -> None:
        self._num_nodes, self._shapes = num_nodes, shapes
        self._flat: dict[str, np.ndarray] = {}  # by name: (num_nodes, number of elements)
        entries = self._side_by_side(name for name in shapes if name.endswith(" entries"))
        self.entries = entries.reshape(num_nodes, -1, 2)
        self.stamps = self._side_by_side(
            name for name in shapes if name.endswith(" stamps") and not name.endswith(" cached stamps")
        )
        self._polled = self._side_by_side(name for name in _POLLED if name in shapes)
        for name in shapes:
            if name not in self._flat:
                self._side_by_side([name])

    def _side_by_side(self, names: Iterable[str]) -> np.ndarray:
        """Create the arrays ``names``, of one dtype; return them as one of (num_nodes, number of elements)."""
        names = list(names)
        ends = list(itertools.accumulate(math.prod(self._shapes[name][0]) for name in names))
        together = np.zeros((self._num_nodes, ends[-1]), self._shapes[names[0]][1])
        for name, start, end in zip(names, [0, *ends], ends, strict=False):
            self._flat[name] = together[:, start:end]
        return together

    def of_all(self, name: str) -> np.ndarray:
        """Return an array of all nodes, (num_nodes, ...)."""
        return self._flat[name].reshape(self._num_nodes, *self._shapes[name][0])

    def of(self, node: int, capacity: int) -> Memory:
        """Return the memory of one node."""
        arrays = {name: self._flat[name][node].reshape(shape) for name, (shape, _) in self._shapes.items()}
        return Memory(arrays, self._polled[node], capacity)
