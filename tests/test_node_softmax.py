"""Evaluation's softmax over all words on several nodes equals that of one process over the whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lapse_elmo import perplexity
from tests import collective, node_softmax_program

PROGRAM = Path(node_softmax_program.__file__)
report = collective.report_on_nodes(PROGRAM, [(5, 2), (3, 3)])


@pytest.mark.parametrize("name", node_softmax_program.NAMES)
def test_softmax(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


@pytest.mark.parametrize(("most", "sizes"), [(1, [2] * 7), (3, [6, 6, 2]), (7, [14]), (100, [14])])
def test_long_batches_are_sent_in_pieces_of_a_bounded_size(most: int, sizes: list[int]) -> None:
    context, targets = torch.randn(14, 5), np.arange(14)
    pieces = list(perplexity._pieces(context, targets, most * 2 * 5 * 4 + 3))
    assert [len(vectors) for vectors, _ in pieces] == [len(some) for _, some in pieces] == sizes
    found, order = perplexity._joined([*pieces], torch.device("cpu"))
    assert torch.equal(found, context)
    assert order.tolist() == targets.tolist()
