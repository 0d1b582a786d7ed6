"""Situations that once hung, stalled or leaked on several nodes, in real jobs, with and without CMA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import collective
from tests.mpi import CMA_OFF
from tests.ps import liveness_program

# MPICH may read the memory of other processes (CMA) only where the kernel allows it. Otherwise each message of some
# tens of KB is a rendezvous, which completes only when its sender enters MPI again.
CASES: dict[str, dict[str, str]] = {"cma": {}, "no cma": CMA_OFF}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, str]]:
    return {}


@pytest.mark.parametrize("name", liveness_program.NAMES)
@pytest.mark.parametrize("case", CASES)
def test_liveness(
    case: str, name: str, reports: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if case not in reports:
        program, folder = Path(liveness_program.__file__), tmp_path_factory.mktemp("liveness")
        nodes, ranks = str(liveness_program.NODES), liveness_program.RANKS
        reports[case] = collective.report_of(program, [nodes], ranks, folder, timeout=120, env=CASES[case])
    collective.expect(reports[case], name)
