"""Evaluation's softmax over all words on several nodes equals that of one process over the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, node_softmax_program

PROGRAM = Path(node_softmax_program.__file__)


@pytest.fixture(scope="module", params=[(5, 2), (3, 3)], ids=["nodes of 2 and 3 ranks", "nodes of one rank"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ranks, nodes = request.param
    return collective.report_of(PROGRAM, [str(nodes)], ranks, tmp_path_factory.mktemp("softmax"), timeout=120)


@pytest.mark.parametrize("name", node_softmax_program.NAMES)
def test_softmax(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
