"""Dense parameters in the memory of a node: steps of several ranks on one and several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, dense_node_program

PROGRAM = Path(dense_node_program.__file__)
RANKS_AND_NODES = [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (5, 3)]
report = collective.report_on_nodes(PROGRAM, RANKS_AND_NODES)


@pytest.mark.parametrize("name", dense_node_program.names())
def test_dense_parameters_of_a_node(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
