"""Evaluation's softmax over all words on several nodes equals that of one process over the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, node_softmax_program

PROGRAM = Path(node_softmax_program.__file__)
report = collective.report_on_nodes(PROGRAM, [(5, 2), (3, 3)])


@pytest.mark.parametrize("name", node_softmax_program.NAMES)
def test_softmax(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
