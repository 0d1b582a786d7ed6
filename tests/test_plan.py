"""Warnings before a run starts."""

from __future__ import annotations

import pytest

from lapse_elmo.config.training import parse_train
from lapse_elmo.plan import MOST_PARTS, many_parts


@pytest.mark.parametrize(
    ("ranks", "options", "warned"),
    [
        (MOST_PARTS, [], False),
        (MOST_PARTS + 1, [], True),
        (MOST_PARTS // 2, ["--accumulate", "2"], False),
        (MOST_PARTS // 2, ["--accumulate", "3"], True),
        (64, ["--optimizer", "sgd"], False),
    ],
)
def test_many_ranks_are_warned_of(ranks: int, options: list[str], warned: bool) -> None:
    assert bool(many_parts(parse_train(options), ranks)) == warned
