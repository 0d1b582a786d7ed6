"""Does it learn what there is to learn? Text from a known Markov chain has a known best perplexity."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.corpora import Prepared, prepare, records, train_alone
from tests.training.markov_chain import MarkovChain, as_text

SIZES = ["--projection-size", "24", "--cell-size", "32", "--num-layers", "1", "--dropout", "0", "--batch-size", "100"]
RATES = ["--initial-accumulator", "0.1", "--epochs", "4"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    chain = make_chain()
    train, heldout = as_text(chain.sentences(8000)), as_text(chain.sentences(400))
    return prepare(tmp_path_factory.mktemp("markov"), train, heldout)


def make_chain() -> MarkovChain:
    return MarkovChain(num_words=30, num_successors=2, end=0.12, seed=7)


def best(corpus: Prepared) -> tuple[float, float]:
    """Return the perplexity of the held-out text under the chain itself, which is the best possible."""
    return make_chain().perplexities([[int(word[1:]) for word in line.split()] for line in corpus.heldout])


def test_the_chain_knows_its_own_text_from_both_ends(corpus: Prepared) -> None:
    """Both directions give a text the same probability, so they agree; and the chain is far below word frequencies."""
    forward, backward = best(corpus)
    assert forward == pytest.approx(backward)
    assert forward < 4


@pytest.mark.parametrize(("samples", "margin"), [("8192", 1.1), ("24", 1.15)], ids=["full softmax", "sampled"])
def test_training_comes_near_the_best_perplexity(
    corpus: Prepared, tmp_path: Path, samples: str, margin: float
) -> None:
    """33 classes: with 8192 samples the loss is the full softmax, with 24 it is sampled. Nothing unseen is predicted
    better than by the chain, but for the luck of 400 sentences.
    """
    run_dir = train_alone(corpus, tmp_path / "run", *SIZES, *RATES, "--num-samples", samples)
    last = records(run_dir, "epoch")[-1]
    for direction, limit in zip(("forward", "backward"), best(corpus), strict=True):
        assert 0.99 * limit < last[f"heldout/{direction}_perplexity"] < margin * limit, direction
