"""Samples drawn through a server of several nodes follow the laws stated in lapse_elmo/ps/sampling.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapse_elmo.mpi.world import solo
from tests import collective
from tests.ps import sampling_program


@pytest.fixture(scope="module", params=[(4, 2)], ids=str)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ranks, nodes = request.param
    folder = tmp_path_factory.mktemp("sampling")
    return collective.report_of(Path(sampling_program.__file__), [str(nodes)], ranks, folder, timeout=90)


@pytest.mark.parametrize("name", sampling_program.Laws(solo()).checks())
def test_law(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
