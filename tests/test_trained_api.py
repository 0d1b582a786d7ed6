"""The Python interface to trained models, as far as it needs no model."""

from __future__ import annotations

import numpy as np
import pytest

from lapse_elmo import trained
from lapse_elmo.trained import SentenceScore, Totals, module


def test_every_public_class_and_method_has_an_example() -> None:
    named = [getattr(trained, name) for name in trained.__all__ if name != "LAYERS"]
    assert len(named) == 6
    for owner in (trained.TrainedModel, module.ElmoModule):
        found = {name: item for name, item in vars(owner).items() if not name.startswith("_") and item.__doc__}
        assert len(found) > 3
        named += [owner, *found.values()]
    lacking = [item for item in named if ">>>" not in item.__doc__]
    assert lacking == []


def test_bits_per_character_of_different_vocabularies() -> None:
    """By hand: 7 distinct characters and an end of word are log2(8) = 3 bits each; the text has 3 + 6 characters."""
    def totals(unknown: list[bool], probabilities: list[float], end: float) -> Totals:
        logs, found = np.log(probabilities), Totals()
        found.add(SentenceScore(("ab", "cdefg"), np.array(unknown), logs, logs, float(np.log(end)), float(np.log(end))))
        return found

    known = totals([False, False], [1 / 4, 1 / 16], 1 / 2)
    assert known.spelling_bits_per_character == 0 and known.bits_per_character == pytest.approx((2 + 4 + 1) / 9)
    half = totals([False, True], [1 / 4, 1 / 2], 1 / 2)
    assert half.spelling_bits_per_character == pytest.approx((5 + 1) * 3 / 9)
    assert half.bits_per_character == pytest.approx((2 + 1 + 1 + 18) / 9)
    nothing = totals([True, True], [1, 1], 1)  # a model that knows no word, and is sure of that
    assert nothing.perplexity == 1 and nothing.bits_per_character == pytest.approx((3 + 6) * 3 / 9)
    assert np.isnan(Totals().bits_per_character) and np.isnan(Totals().spelling_bits_per_character)
