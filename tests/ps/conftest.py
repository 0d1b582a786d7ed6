"""Run the long simulation at the lowest priority next to all other tests, and look at its result last.

Most of the other tests start processes and wait for them. The simulation takes what they leave of the processors, which
makes the whole suite minutes shorter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.mpi import ROOT

SCHEDULES = int(os.environ.get("SCHEDULES", "20000"))
SIMULATION = pytest.StashKey["subprocess.Popen[str]"]()


def _wants_simulation(item: pytest.Item) -> bool:
    return "simulation" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests that need the simulation's result to the end."""
    items.sort(key=_wants_simulation)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the simulation if a selected test needs its result."""
    if any(map(_wants_simulation, session.items)) and not session.config.option.collectonly:
        command = [sys.executable, "-m", "tests.simulator", "--schedules", str(SCHEDULES), "--first", "1000000"]
        session.config.stash[SIMULATION] = subprocess.Popen(
            ["nice", "-n", "19", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the simulation, also if the tests were interrupted."""
    process = config.stash.get(SIMULATION, None)
    if process is not None and process.poll() is None:
        os.killpg(process.pid, 9)


@pytest.fixture
def simulation(request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    """Return the running simulation of ``SCHEDULES`` schedules; it prints little, so its pipes need no draining."""
    return request.config.stash[SIMULATION]
