"""Every engine keeps the parameter server's contract, on 1, 2 and 4 ranks and several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective
from tests.ps import contract_program

# (ranks, nodes)
WORLDS = {"adaptive": ((1, 1), (2, 1), (4, 2)), "relocation": ((2, 2),), "replication": ((2, 2),), "static": ((2, 2),)}
CASES = [
    pytest.param((engine, *world), id=f"{engine}-{world[0]}-{world[1]}")
    for engine, worlds in WORLDS.items() for world in worlds
]


@pytest.fixture(scope="module", params=CASES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    engine, size, nodes = request.param
    program = Path(contract_program.__file__)
    return collective.report_of(program, [engine, str(nodes)], size, tmp_path_factory.mktemp("contract"), timeout=120)


@pytest.mark.parametrize("name", contract_program.names())
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
