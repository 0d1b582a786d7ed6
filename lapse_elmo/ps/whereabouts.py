"""Where rows are: stamps, in which the newer knowledge is the larger number.

A stamp is ``epoch << 16 | node``: the node became the row's owner at the row's relocation number ``epoch``. A node
keeps one stamp a row. Whoever gives a row away keeps the stamp of the receiver, so following stamps leads to ever
higher epochs and ends at the owner; and a node that is asked by a stamp newer than its own is about to get the row.
A row's home is the node that is told of each relocation; it is also its first owner.
"""

from __future__ import annotations

import numpy as np

_NODE_BITS = 16
MAX_NODES = 1 << _NODE_BITS


def home_of(rows: np.ndarray, num_nodes: int) -> np.ndarray:
    """The home (n,) of ``rows`` (n,): neighbours, which are about equally frequent, are spread evenly."""
    return rows % num_nodes


def stamp(epochs: np.ndarray, node: int | np.ndarray) -> np.ndarray:
    """Stamps (n,) int64."""
    return epochs << _NODE_BITS | node


def node_of(stamps: np.ndarray) -> np.ndarray:
    return stamps & (MAX_NODES - 1)


def epoch_of(stamps: np.ndarray) -> np.ndarray:
    return stamps >> _NODE_BITS


def learn(known: np.ndarray, rows: np.ndarray, stamps: np.ndarray) -> None:
    """Let ``known`` (num_rows,) at the distinct ``rows`` become ``stamps`` (n,) where these are newer."""
    known[rows] = np.maximum(known[rows], stamps)


def groups(nodes: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """(node, positions) for each node that occurs in ``nodes`` (n,)."""
    if not nodes.size:
        return []
    first = int(nodes[0])
    if (nodes == first).all():
        return [(first, slice(None))]
    return [(node, np.flatnonzero(nodes == node)) for node in np.unique(nodes).tolist()]
