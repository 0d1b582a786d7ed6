"""Expected traffic of the embedded server between nodes, with the technique ``adaptive``.

What happens to a row does not depend on other rows, only on which nodes use it in which steps. Let q be the probability
that a given node uses it in a step, M the number of nodes, and z = (1 - q)^(M - 1) the probability that no other node
does. Per step and node, the expected number of times that the row's values are sent

- to a node that does not have them yet, as main copy (`Relocate`) or replica (`Replicate`), is
  q ((1 - q) - (1 - q)^M / M): the node uses the row, did not use it in the step before, and does not own it, where an
  unused row is owned by any of the nodes;
- from a replica to the owner, with what the replica's node has added (`Deltas`), is q (1 - 1/M) (1 - z^1.5): a node
  other than the owner uses the row, and some other node uses it within a step and a half, so that it is shared;
- from the owner to a replica that others have made outdated (`Refresh`), is q (1 - 1/M) (1 - z).

The exponent 1.5 was fitted to counts of the server's own code on the simulated network; tests/test_traffic.py compares
the sums with such counts at several numbers of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.model.softmax import expected_num_tries

_SHARED_STEPS = 1.5
_MOVE_BYTES, _SYNC_BYTES = 56, 24  # besides the values, per row: row numbers, stamps, wants, drops
_TRANSMISSIONS = 5  # of a node per step and other node


@dataclass(frozen=True)
class NodeUse:
    """What the workers of one node use in a step.

    Attributes:
        num_classes: V.
        positions: Input positions of each worker.
        workers: Workers of the node.
        num_samples: Negative samples of each drawer; at least V for the full softmax.
        drawers: Draws of samples per node: 1 if its workers share them.
        distribution: "log-uniform" or "uniform", the law of the samples.
        replacement: Whether samples are drawn with replacement.
    """

    num_classes: int
    positions: int
    workers: int
    num_samples: int
    drawers: int = 1
    distribution: str = "log-uniform"
    replacement: bool = False

    def input_words(self) -> np.ndarray:
        """Return the probability (V,) that a step of the node uses each row of the embedding.

        Words are assumed to follow the log-uniform law.
        """
        law = log_uniform_probability(np.arange(self.num_classes), self.num_classes)
        return -np.expm1(self.workers * self.positions * np.log1p(-law))

    def classes(self) -> np.ndarray:
        """Return the probability (V,) that a step of the node uses each row of the softmax."""
        if self.num_samples >= self.num_classes:
            return np.ones(self.num_classes)
        if self.distribution == "uniform":
            law, tries = np.full(self.num_classes, 1 / self.num_classes), float(self.num_samples)
            if not self.replacement:
                tries = math.log1p(-self.num_samples / self.num_classes) / math.log1p(-1 / self.num_classes)
        else:
            law = log_uniform_probability(np.arange(self.num_classes), self.num_classes)
            tries = float(self.num_samples)
            if not self.replacement:
                tries = expected_num_tries(self.num_classes, self.num_samples)
        missed = np.exp(self.drawers * tries * np.log1p(-law))
        return 1 - missed * (1 - self.input_words())


@dataclass(frozen=True)
class RowTraffic:
    """Rows that a node sends per step, and their bytes, with what belongs to them.

    Attributes:
        moved: To nodes that use them next, as main copies or replicas.
        changed: Updates of replicas, to the owners.
        refreshed: Current values, to outdated replicas.
        moved_bytes: Bytes of ``moved``.
        changed_bytes: Bytes of ``changed``.
        refreshed_bytes: Bytes of ``refreshed``.
        transmissions: Transmissions that the node sends.
    """

    moved: float
    changed: float
    refreshed: float
    moved_bytes: float
    changed_bytes: float
    refreshed_bytes: float
    transmissions: float

    @property
    def rows(self) -> float:
        """All rows."""
        return self.moved + self.changed + self.refreshed

    @property
    def num_bytes(self) -> float:
        """All bytes."""
        return self.moved_bytes + self.changed_bytes + self.refreshed_bytes


def row_traffic(
    use: NodeUse, num_nodes: int, row_bytes: Sequence[int], frequent: Sequence[int] = (0, 0)
) -> RowTraffic:
    """Return the expected traffic of a node per step.

    Args:
        use: What each node uses.
        num_nodes: M.
        row_bytes: Bytes of a whole row, with its accumulators, of the embedding and of the softmax.
        frequent: Frequent rows of both, which the server does not send.
    """
    moved, changed, refreshed = [], [], []
    for used in (use.input_words()[frequent[0] :], use.classes()[frequent[1] :]):
        unused_by_others = (1 - used) ** (num_nodes - 1)
        not_owned = used * (1 - 1 / num_nodes)
        moved.append(float((used * ((1 - used) - (1 - used) ** num_nodes / num_nodes)).sum()))
        changed.append(float((not_owned * (1 - unused_by_others**_SHARED_STEPS)).sum()))
        refreshed.append(float((not_owned * (1 - unused_by_others)).sum()))
    return RowTraffic(
        sum(moved), sum(changed), sum(refreshed),
        sum(rows * (size + _MOVE_BYTES) for rows, size in zip(moved, row_bytes, strict=True)),
        sum(rows * (size + _SYNC_BYTES) for rows, size in zip(changed, row_bytes, strict=True)),
        sum(rows * (size + _SYNC_BYTES) for rows, size in zip(refreshed, row_bytes, strict=True)),
        float(_TRANSMISSIONS * (num_nodes - 1)),
    )
