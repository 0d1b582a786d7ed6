"""Steps on rows with the gradients of several ranks and parts, on one and several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, row_update_program

PROGRAM = Path(row_update_program.__file__)
RANKS_AND_NODES = [(1, 1), (3, 1), (2, 2), (3, 2), (5, 2)]
report = collective.report_on_nodes(PROGRAM, RANKS_AND_NODES)


@pytest.mark.parametrize("name", row_update_program.names())
def test_rows_of_a_node(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
