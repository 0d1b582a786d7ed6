"""A rank that dies while all ranks have requests pending ends the job within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ps import failing_program


@pytest.mark.parametrize(
    ("kind", "rank"),  # ranks 0 and 2 run the managers of the two nodes
    [(kind, rank) for kind in ("exception", "exit", "kill") for rank in (1, 2)] + [("manager", 0), ("manager", 2)]
    + [("full-memory", 2)],
)
def test_a_failing_rank_ends_the_job(kind: str, rank: int, tmp_path: Path) -> None:
    failing_program.run_and_check(kind, rank, 2, tmp_path)
