"""Who owns which row: owner stamps, of which the larger one is the newer knowledge.

A stamp is ``epoch << 16 | node``: the row's relocation number ``epoch`` made ``node`` its owner. A node stores one
stamp per row. Whoever gives a row away stores the stamp of the receiver, so that following stamps leads to ever higher
epochs and ends at the owner; a node that is asked with a stamp newer than its own is about to receive the row. A row's
home is its first owner, and the node that is told of each relocation.
"""

from __future__ import annotations

import numpy as np

_NODE_BITS = 16
MAX_NODES = (1 << _NODE_BITS) - 1
NO_NODE = MAX_NODES  # stands for no node where a node is named by 16 bits


def home_of(rows: np.ndarray, num_nodes: int) -> np.ndarray:
    """Return the home (n,) of ``rows`` (n,). Neighbours, which are about equally frequent, are spread evenly."""
    return rows % num_nodes


def stamp(epochs: np.ndarray, node: int | np.ndarray) -> np.ndarray:
    """Return stamps (n,) int64."""
    return epochs << _NODE_BITS | node


def node_of(stamps: np.ndarray) -> np.ndarray:
    """Return the owners (n,) that ``stamps`` (n,) name."""
    return stamps & ((1 << _NODE_BITS) - 1)


def epoch_of(stamps: np.ndarray) -> np.ndarray:
    """Return the relocation numbers (n,) of ``stamps`` (n,)."""
    return stamps >> _NODE_BITS


def update_stamps(known: np.ndarray, rows: np.ndarray, stamps: np.ndarray) -> None:
    """Set ``known`` (num_rows,) at the distinct ``rows`` to ``stamps`` (n,) where these are newer."""
    known[rows] = np.maximum(known[rows], stamps)


def group_by_node(nodes: np.ndarray) -> list[tuple[int, np.ndarray | slice]]:
    """Return (node, indices) for each node that occurs in ``nodes`` (n,), ascending, in O(n log n) for any number."""
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
