"""Every engine keeps the contract of the parameter server, in real jobs of 1, 2 and 4 ranks on 1, 2 and 4 nodes.

Orders of messages are left to the simulator (tests/ps/test_simulated.py). These jobs test what it cannot: shared memory
and locks between processes, threads inside MPI, and the transports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lapse_elmo.native import SWITCH
from tests import collective, open_mpi
from tests.mpi import CMA_OFF
from tests.ps import contract_program
from tests.ps.contract_program import NATIVE, VALID
from tests.ps.native_engines import EXCEPTIONS, installed

OPEN_MPI = "adaptive-2-2-openmpi"
# Each case: engine, ranks, nodes, and further settings of the job. On one node all techniques behave alike.
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    # one process: no MPI, and no contention for locks
    "adaptive-1-1": ("adaptive", 1, 1, {}),
    # two and four processes that share memory
    "adaptive-2-1": ("adaptive", 2, 1, {}),
    "adaptive-4-1": ("adaptive", 4, 1, {}),
    # rows under kernel locks, without rows.c; every rank is worker and manager
    "adaptive-2-2-no-kernels": ("adaptive", 2, 2, {"env": {SWITCH: "0"}}),
    # workers and a manager in different ranks, and a rendezvous for messages above some tens of KB
    "adaptive-4-2-no-cma": ("adaptive", 4, 2, {"env": CMA_OFF}),
    # rows that move between more than two nodes, so that requests are forwarded
    "relocation-4-4": ("relocation", 4, 4, {}),
    # replicas shared by several workers of a node
    "replication-4-2": ("replication", 4, 2, {}),
    # all rows of other nodes by messages
    "static-2-2": ("static", 2, 2, {}),
    # another MPI library, with a rendezvous from 4 KiB on
    OPEN_MPI: ("adaptive", 2, 2, open_mpi.job(open_mpi.CMA_OFF)),
}
# Arguments are checked by the worker alone: calls that must be refused are tried where rows are local, and remote.
REFUSING = {"adaptive-1-1", "adaptive-2-2-no-kernels"}
CHECKS: list[Any] = [
    (case, name) for case, (engine, *_) in CASES.items() if case != OPEN_MPI or not open_mpi.why_not()
    for name in contract_program.names(engine, case in REFUSING)
]
if open_mpi.why_not():  # one skip stands for all of its cases
    CHECKS.append(pytest.param(OPEN_MPI, "all", marks=pytest.mark.skip(open_mpi.why_not())))


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, str]]:
    """Return the reports of the jobs run so far, by case: one job serves all its checks."""
    return {}


@pytest.fixture
def report(
    request: pytest.FixtureRequest, reports: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    case = request.param
    if case not in reports:
        engine, ranks, nodes, job = CASES[case]
        program, folder = Path(contract_program.__file__), tmp_path_factory.mktemp("contract")
        words = [engine, str(nodes), *([] if case in REFUSING else [VALID])]
        reports[case] = collective.report_of(program, words, ranks, folder, timeout=120, **job)
    return reports[case]


@pytest.mark.parametrize(("report", "name"), CHECKS, indirect=["report"])
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


# One skip stands for all cases of a package that is not installed.
PRESENT, ABSENT = ([package for package in NATIVE if installed(package) == wanted] for wanted in (True, False))
NATIVE_CASES = {f"{package}-{ranks}": (package, ranks) for package in PRESENT for ranks in (1, 2, 4)}
NATIVE_CHECKS = [
    pytest.param(
        case, name, marks=[pytest.mark.skip(EXCEPTIONS[package, name])] if (package, name) in EXCEPTIONS else [],
    )
    for case, (package, _) in NATIVE_CASES.items()
    for name in [*contract_program.names(package), *(name for other, name in EXCEPTIONS if other == package)]
]
NATIVE_CHECKS += [
    pytest.param(package, "all", marks=pytest.mark.skip(f"the package {package} is not installed"))
    for package in ABSENT
]


@pytest.fixture
def native_report(
    request: pytest.FixtureRequest, reports: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    case = request.param
    package, ranks = NATIVE_CASES[case]
    if case not in reports:
        program, folder = Path(contract_program.__file__), tmp_path_factory.mktemp("contract")
        reports[case] = collective.report_of(program, [package, str(ranks)], ranks, folder, timeout=180)
    return reports[case]


@pytest.mark.parametrize(("native_report", "name"), NATIVE_CHECKS, indirect=["native_report"])
def test_contract_of_native_packages(native_report: dict[str, str], name: str) -> None:
    collective.expect(native_report, name)
