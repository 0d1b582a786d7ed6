"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import mpi

# A slow machine is no failure, and a failure must be repeatable. On our two cores a time limit per example only flakes.
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


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
