"""Many simulated schedules of the embedded engine, in a file of its own since it has to come last."""

from __future__ import annotations

import pytest

from lapse_elmo import native
from lapse_elmo.ps.rows import SOURCE


@pytest.mark.skipif(native.load(SOURCE) is None, reason="the simulator accesses rows through rows.c")
def test_schedules(simulated: tuple[int, str]) -> None:
    """All techniques and sampling schemes; ``SCHEDULES`` in the environment sets how many (make simulate: for long)."""
    status, output = simulated
    assert status == 0, output
