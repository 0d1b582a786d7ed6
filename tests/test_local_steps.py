"""Local steps on the dense parameters of several nodes, and their averages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lapse_elmo.gradient_sample import STRIDE, sample_of
from lapse_elmo.local_steps import every_node_takes_part
from tests import collective, local_steps_program

report = collective.report_on_nodes(Path(local_steps_program.__file__), [(2, 2), (3, 2), (4, 2), (5, 3)])


@pytest.mark.parametrize("name", local_steps_program.names())
def test_local_steps(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


@pytest.mark.parametrize("sizes", [(5, 200, 1, 61, 60, 300), (61, 61), (1,) * 130])
def test_a_sample_does_not_depend_on_the_borders_of_tensors(sizes: tuple[int, ...]) -> None:
    gradients = [torch.randn(size) for size in sizes]
    assert torch.equal(sample_of(gradients), torch.cat(gradients)[::STRIDE])


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2] * 3, [0, 0, 0, 1], [0, 1, 1, 0, 1, 1]])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_nodes_take_part_if_each_has_a_part_in_each_turn(nodes: list[int], parts: int) -> None:
    workers = [node for node in nodes for _ in range(parts)]
    for turns in range(1, len(workers) + 2):
        expected = all(set(workers[turn::turns]) == set(nodes) for turn in range(turns))
        assert every_node_takes_part(np.array(nodes), parts, turns) == expected
