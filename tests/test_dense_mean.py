"""Means of dense gradients over the ranks: over MPI, and by torch.distributed as between GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import collective, dense_mean_program

PROGRAM = Path(dense_mean_program.__file__)


@pytest.fixture(scope="module", params=[1, 2, 3])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return collective.report_of(PROGRAM, ["cpu"], request.param, tmp_path_factory.mktemp("mean"), timeout=120)


@pytest.mark.parametrize("name", dense_mean_program.names("cpu"))
def test_mean(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="there is no GPU")
def test_nccl(tmp_path: Path) -> None:
    report = collective.report_of(PROGRAM, ["cuda"], torch.cuda.device_count(), tmp_path, timeout=300)
    collective.expect(report, "over_nccl")
