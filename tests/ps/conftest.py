"""Start the long simulation with the other tests, and look at its result last."""

from __future__ import annotations

import os

import pytest

from tests.conftest import run_folder
from tests.ps import simulation


def _wants_simulation(item: pytest.Item) -> bool:
    return "simulated" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests that need the simulation's result to the end."""
    items.sort(key=_wants_simulation)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the simulation if a selected test needs its result; the first of several pytest-xdist workers does it."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if first and any(map(_wants_simulation, session.items)) and not session.config.option.collectonly:
        simulation.start(run_folder())


@pytest.fixture
def simulated() -> tuple[int, str]:
    """Return the exit status and the output of ``simulation.SCHEDULES`` simulated schedules."""
    return simulation.wait(run_folder())

