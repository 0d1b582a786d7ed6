"""Every engine keeps the parameter server's contract, in worlds of 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective
from tests.ps import contract_program

SIZES = (1, 2, 4)


CASES = [pytest.param((engine, size), id=f"{engine}-{size}") for engine in contract_program.ENGINES for size in SIZES]


@pytest.fixture(scope="module", params=CASES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    engine, size = request.param
    program = Path(contract_program.__file__)
    return collective.report_of(program, [engine], size, tmp_path_factory.mktemp("contract"), timeout=120)


@pytest.mark.parametrize("name", contract_program.names())
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)
