"""Local steps on the dense parameters of several nodes, and their averages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective, local_steps_program

report = collective.report_on_nodes(Path(local_steps_program.__file__), [(2, 2), (3, 2), (5, 3)])


@pytest.mark.parametrize("name", local_steps_program.names())
def test_local_steps(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
