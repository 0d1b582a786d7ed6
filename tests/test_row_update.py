"""Steps on rows with the gradients of several ranks and parts, on one and several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, row_update_program

PROGRAM = Path(row_update_program.__file__)
RANKS_AND_NODES = [(1, 1), (3, 1), (2, 2), (3, 2), (5, 2)]


@pytest.fixture(scope="module", params=RANKS_AND_NODES, ids=[f"{r} ranks, {n} nodes" for r, n in RANKS_AND_NODES])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ranks, nodes = request.param
    return collective.report_of(PROGRAM, [str(nodes)], ranks, tmp_path_factory.mktemp("rows"), timeout=120)


@pytest.mark.parametrize("name", row_update_program.names())
def test_rows_of_a_node(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
