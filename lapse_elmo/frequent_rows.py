"""Which rows are frequent: copied to every node, with gradients that are summed over all nodes at each step.

For a row that several nodes use in most steps, the parameter server would send its value and its updates between its
owner and all others at each step. Summing the gradients, as those of dense parameters, sends fewer bytes, needs no
bookkeeping, and moves the row by one step instead of one per node.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lapse_elmo.config.training import Config
from lapse_elmo.traffic import NodeUse

# A replica with accumulators costs twice the bytes of a summed gradient in each direction, and a manager's time.
_LEAST_USE = 0.25
_POSITIONS = 27  # of a mean sentence of the 1 Billion Word Benchmark


class NumbersOfRanks(Protocol):
    """The numbers of ranks and nodes."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""


def num_frequent(config: Config, num_classes: int, shape: NumbersOfRanks) -> tuple[int, int]:
    """Return the numbers of frequent rows of the embedding and of the softmax; 0 on one node.

    Args:
        config: The options.
        num_classes: V; rows are sorted by frequency.
        shape: The ranks.
    """
    server = config.server
    if shape.num_nodes == 1 or not server.shares_rows:
        return 0, 0
    if server.frequent_rows >= 0:
        return (min(server.frequent_rows, num_classes),) * 2
    return frequent_in(node_use(config, num_classes, _POSITIONS, shape.size // shape.num_nodes))


def node_use(config: Config, num_classes: int, sentence_positions: float, num_ranks: int) -> NodeUse:
    """Return what a node of ``num_ranks`` ranks uses in a step of full batches of sentences of this length."""
    training, softmax = config.training, config.softmax
    # The parts of a rank draw as so many ranks do: the same samples, or samples of their own.
    drawers = training.accumulate * num_ranks if softmax.share_samples == "none" else 1
    return NodeUse(
        num_classes, round(training.batch_size * training.accumulate * sentence_positions), num_ranks,
        softmax.num_samples, drawers, softmax.distribution, softmax.replacement,
    )


def frequent_in(use: NodeUse) -> tuple[int, int]:
    """Return the numbers of rows of the embedding and of the softmax that a node uses in a quarter of its steps."""
    words, classes = (int(np.count_nonzero(used >= _LEAST_USE)) for used in (use.input_words(), use.classes()))
    return words, classes
