"""Local steps on the dense parameters of several nodes, and their averages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lapse_elmo.gradient_sample import STRIDE, sample_of
from tests import collective, local_steps_program

report = collective.report_on_nodes(Path(local_steps_program.__file__), [(2, 2), (3, 2), (5, 3)])


@pytest.mark.parametrize("name", local_steps_program.names())
def test_local_steps(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


@pytest.mark.parametrize("sizes", [(5, 200, 1, 61, 60, 300), (61, 61), (1,) * 130])
def test_a_sample_does_not_depend_on_the_borders_of_tensors(sizes: tuple[int, ...]) -> None:
    gradients = [torch.randn(size) for size in sizes]
    assert torch.equal(sample_of(gradients), torch.cat(gradients)[::STRIDE])
