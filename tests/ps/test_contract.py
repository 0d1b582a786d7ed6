"""Every engine keeps the parameter server's contract, in worlds of 1, 2 and 4 ranks on 1, 2 and 4 nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapse_elmo.native import SWITCH
from tests import collective
from tests.ps import contract_program
from tests.ps.contract_program import ENGINES, NATIVE
from tests.ps.native_engines import EXCEPTIONS, installed

TWIN = {SWITCH: "0"}  # rows without native code
# On one node all techniques are alike. Chosen so that all of it stays within some minutes.
CASES = {
    f"{engine}-{ranks}-{nodes}{'-twin' if env else ''}": (engine, ranks, nodes, env)
    for engine, ranks, nodes, env in [
        *[("adaptive", ranks, 1, {}) for ranks in (1, 2, 4)],
        ("adaptive", 2, 1, TWIN),
        *[(engine, 2, 2, {}) for engine in ENGINES],
        ("adaptive", 2, 2, TWIN),
        *[("adaptive", 4, 2, {}), ("relocation", 4, 2, TWIN)],
        *[("adaptive", 4, 4, TWIN), ("relocation", 4, 4, {}), ("replication", 4, 4, {})],
    ]
}
CHECKS = [(case, name) for case, (engine, *_) in CASES.items() for name in contract_program.names(engine)]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, str]]:
    """The reports of the jobs that have run, by case: a job is run once for all its checks."""
    return {}


@pytest.fixture
def report(
    request: pytest.FixtureRequest, reports: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    case = request.param
    if case not in reports:
        engine, ranks, nodes, env = CASES[case]
        program, folder = Path(contract_program.__file__), tmp_path_factory.mktemp("contract")
        reports[case] = collective.report_of(program, [engine, str(nodes)], ranks, folder, timeout=120, env=env)
    return reports[case]


@pytest.mark.parametrize(("report", "name"), CHECKS, indirect=["report"])
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


# Of a package that is not installed, one case stands for all of them, as one skip.
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
