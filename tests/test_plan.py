"""Warnings before a run starts."""

from __future__ import annotations

import pytest

from lapse_elmo.config.training import parse_train
from lapse_elmo.plan import (
    MOST_DENSE_PUSHERS,
    MOST_FULL_PUSHERS,
    MOST_LOCAL_STEPS,
    MOST_PUSHERS,
    local_step_lines,
    many_pushers,
)


@pytest.mark.parametrize(
    ("ranks", "nodes", "options", "warned"),
    [
        (32 * MOST_PUSHERS, MOST_PUSHERS, [], False),
        (MOST_PUSHERS + 1, MOST_PUSHERS + 1, [], True),
        (MOST_PUSHERS, 1, ["--ps", "lapse"], False),
        (MOST_PUSHERS + 1, 1, ["--ps", "lapse"], True),
        (64, 1, ["--first-batch", "0"], False),
        (64, MOST_FULL_PUSHERS, ["--first-batch", "0"], False),
        (64, MOST_FULL_PUSHERS + 1, ["--first-batch", "0"], True),
        (64, 2, ["--first-batch", "0", "--frequent-rows", "0"], True),
        (2, 1, ["--first-batch", "0", "--ps", "lapse"], True),
        (128, 128, ["--optimizer", "sgd"], False),
        (MOST_DENSE_PUSHERS, 1, ["--dense", "ps", "--first-batch", "0"], False),
        (MOST_DENSE_PUSHERS + 1, 1, ["--dense", "ps"], True),
        (128, 1, ["--dense", "ps", "--optimizer", "sgd"], False),
    ],
)
def test_many_pushers_are_warned_of(ranks: int, nodes: int, options: list[str], warned: bool) -> None:
    assert bool(many_pushers(parse_train(options), ranks, nodes)) == warned


@pytest.mark.parametrize(
    ("steps", "nodes", "said"),
    [(1, 8, ""), (4, 1, ""), (MOST_LOCAL_STEPS, 2, "measured"), (MOST_LOCAL_STEPS + 1, 2, "not measured")],
)
def test_what_local_steps_cost_is_said(steps: int, nodes: int, said: str) -> None:
    lines = local_step_lines(parse_train(["--local-steps", str(steps)]), nodes)
    assert len(lines) == bool(said)
    assert all(said in line and ("not measured" in line) == (steps > MOST_LOCAL_STEPS) for line in lines)
