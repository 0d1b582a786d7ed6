"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import mpi
from tests.ps import simulation

_RUN_FOLDER = "LAPSE_ELMO_TEST_RUN"

# A slow machine is no failure, and a failure must be repeatable. On our two cores a time limit per example only flakes.
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


def run_folder() -> Path:
    """Return a folder that all processes of this test run share."""
    return Path(os.environ[_RUN_FOLDER])


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of the test run, before pytest-xdist starts its workers."""
    if not hasattr(config, "workerinput"):
        os.environ[_RUN_FOLDER] = tempfile.mkdtemp(prefix="lapse-elmo-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what is left of the test run."""
    if not hasattr(config, "workerinput"):
        simulation.stop(run_folder())
        shutil.rmtree(run_folder(), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the module that waits for minutes first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_stalls.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give the files that wait to one of several processes, see :mod:`tests.distribution`."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.distribution import Distribution

    return Distribution(config, log)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Use one torch thread: tests run in parallel, and OpenMP's waiting threads would slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mpirun() -> Callable[..., mpi.Job]:
    """Return ``mpirun(num_ranks, arguments, timeout=60, env=None, cwd=ROOT)``, see :func:`tests.mpi.mpirun`."""
    return mpi.mpirun
