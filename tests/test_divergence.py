"""When a run counts as diverged, and that no healthy one does."""

from __future__ import annotations

import math

import pytest

from lapse_elmo.divergence import EARLY_EXTRA_MARGIN_NATS, MARGIN_NATS, MAX_BAD_STEPS, NORM_GROWTH, Watch

UNIGRAM = math.log(484.6)
BOUND = UNIGRAM + MARGIN_NATS


def watch(*steps: tuple[float, float]) -> Watch:
    made = Watch(BOUND)
    for loss, norm in steps:
        made.add(loss, norm)
    return made


def test_a_loss_far_above_the_unigram_for_long() -> None:
    bad = (BOUND + 0.1, 5.0)
    assert not watch(*[bad] * (MAX_BAD_STEPS - 1)).seen()
    seen = watch(*[bad] * MAX_BAD_STEPS).seen()
    assert "training loss of the last 30 steps was above 8.18 nats" in seen
    once_better = [*[bad] * (MAX_BAD_STEPS - 1), (UNIGRAM, 5.0), *[bad] * (MAX_BAD_STEPS - 1)]
    assert not watch(*once_better).seen()


def test_a_bad_step_is_suspicious() -> None:
    assert not watch((UNIGRAM, 5.0)).suspicious
    assert watch((UNIGRAM, 5.0), (BOUND + 1, 5.0)).suspicious


def test_exploding_norms() -> None:
    good = [(UNIGRAM, 4.0)] * MAX_BAD_STEPS
    assert not watch(*good, *[(UNIGRAM, 0.1 * NORM_GROWTH)] * 100).seen()
    seen = watch(*good, *[(UNIGRAM, 100 * NORM_GROWTH)] * (MAX_BAD_STEPS + 1)).seen()
    assert "gradient norm has stayed above 10,000 times its lowest" in seen


def test_norms_of_the_first_steps_do_not_count_as_the_lowest() -> None:
    """The gradient of an untrained model may be tiny."""
    assert not watch(*[(UNIGRAM, 1e-6)] * 5, *[(UNIGRAM, 4.0)] * 200).seen()


def test_held_out() -> None:
    """An untrained model may be bad; one that is worse than any untrained model is not excused by few steps."""
    young, old = watch((UNIGRAM, 5.0)), watch(*[(UNIGRAM, 5.0)] * MAX_BAD_STEPS)
    assert not old.seen_heldout(BOUND) and not young.seen_heldout(BOUND + EARLY_EXTRA_MARGIN_NATS)
    assert "held-out perplexity is 6.03e+03, where word frequencies alone give 484.6" in old.seen_heldout(8.704)
    assert "6e+21" in young.seen_heldout(math.log(6e21))


@pytest.mark.parametrize("loss", [math.inf, 1e9])
def test_no_overflow(loss: float) -> None:
    assert "held-out" in watch().seen_heldout(loss)


def test_checkpoints_keep_the_names_of_the_first_versions() -> None:
    before = Watch(bound=8.0, steps=9, exploding_steps=3)
    assert before.plain()["wild_steps"] == 3 and Watch.of(before.plain()) == before
