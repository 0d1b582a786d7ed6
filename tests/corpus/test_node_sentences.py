"""The ranks of a node read the sentences that they need together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective
from tests.corpus import node_sentences_program

report = collective.report_on_nodes(Path(node_sentences_program.__file__), [(5, 2)])


@pytest.mark.parametrize("name", node_sentences_program.NAMES)
def test_node_sentences(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
