"""Who owns which row: versioned owner stamps, of which the larger one is newer.

A stamp is ``epoch << 16 | node``: the row's relocation number ``epoch`` made ``node`` its owner. Each node stores one
stamp per row. A node that relocates a row stores the stamp of the new owner, so following stamps leads to higher and
higher epochs and ends at the owner. A node that receives a request with a stamp newer than its own is about to receive
the row. A row's home is its first owner; it is informed of each relocation.
"""

from __future__ import annotations

import numpy as np

_NODE_BITS = 16
MAX_NODES = (1 << _NODE_BITS) - 1
NO_NODE = MAX_NODES  # "none" in arrays that store a node in 16 bits


def home_of(rows: np.ndarray, num_nodes: int) -> np.ndarray:
    """Return the home nodes (n,) of ``rows`` (n,).

    Rows are usually sorted by frequency, so taking them in turn gives each node its share of the frequent ones.
    """
    return rows % num_nodes


def is_copied(rows: np.ndarray, num_frequent: int, num_nodes: int, node: int) -> np.ndarray:
    """Return which of ``rows`` (n,) are frequent rows whose home is not ``node``, which has a copy of them."""
    return (rows < num_frequent) & (home_of(rows, num_nodes) != node)


def stamp(epochs: np.ndarray, node: int | np.ndarray) -> np.ndarray:
    """Return the stamps (n,) int64 of ``epochs`` (n,) and the owner ``node``, one for all rows or (n,)."""
    return epochs << _NODE_BITS | node


def node_of(stamps: np.ndarray) -> np.ndarray:
    """Return the owners (n,) that ``stamps`` (n,) name."""
    return stamps & ((1 << _NODE_BITS) - 1)


def epoch_of(stamps: np.ndarray) -> np.ndarray:
    """Return the relocation numbers (n,) of ``stamps`` (n,)."""
    return stamps >> _NODE_BITS


def update_stamps(known: np.ndarray, rows: np.ndarray, stamps: np.ndarray) -> None:
    """Set ``known`` (num_rows,) at the distinct ``rows`` (n,) to ``stamps`` (n,) where these are newer."""
    # The maximum: messages about one row come from several nodes, in any order, and must never undo each other.
    known[rows] = np.maximum(known[rows], stamps)


def group_by_node(nodes: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """Group the indices of ``nodes`` (n,) by value, in O(n log n) for any number of nodes.

    Returns:
        (node, indices) of each node that occurs, ascending; the indices are a slice if all nodes are equal.
    """
    if not nodes.size:
        return []
    first = int(nodes[0])
    if (nodes == first).all():
        return [(first, slice(None))]
    order = np.argsort(nodes, kind="stable")
    ordered = nodes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = [*starts[1:].tolist(), nodes.size]
    return [(int(ordered[a]), order[a:b]) for a, b in zip(starts.tolist(), ends, strict=True)]
