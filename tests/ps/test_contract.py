"""Every engine keeps the parameter server's contract, in worlds of 1, 2 and 4 ranks on 1, 2 and 4 nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapse_elmo.native import SWITCH
from tests import collective
from tests.ps import contract_program
from tests.ps.contract_program import ENGINES

TWIN = {SWITCH: "0"}  # rows without native code
# On one node all techniques are alike. Each meets each number of nodes, and two of them without native code.
CASES = {
    f"{engine}-{ranks}-{nodes}{'-twin' if env else ''}": (engine, ranks, nodes, env)
    for engine, ranks, nodes, env in [
        *[("adaptive", ranks, 1, env) for ranks in (1, 2, 4) for env in ({}, TWIN)],
        *[(engine, ranks, nodes, {}) for engine in ENGINES for ranks, nodes in ((2, 2), (4, 2), (4, 4))],
        *[(engine, 4, 2, TWIN) for engine in ("adaptive", "relocation")],
    ]
}
CHECKS = [(case, name) for case, (engine, *_) in CASES.items() for name in contract_program.names(engine)]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    engine, ranks, nodes, env = CASES[request.param]
    program, folder = Path(contract_program.__file__), tmp_path_factory.mktemp("contract")
    return collective.report_of(program, [engine, str(nodes)], ranks, folder, timeout=120, env=env)


@pytest.mark.parametrize(("report", "name"), CHECKS, indirect=["report"])
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
