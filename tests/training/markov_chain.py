"""Text from a known first-order Markov chain, and its exact probabilities in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class MarkovChain:
    """Words 0 .. K - 1 with a few likely successors each; the end of a sentence is one of the chain's states.

    ``forward`` (K + 1, K + 1): row i < K holds the probabilities after word i, row K those at the start of a sentence;
    column K is the end. ``backward`` likewise: row j the probabilities before word j, row K those before the end;
    column K is the start.
    """

    def __init__(self, num_words: int, num_successors: int, end: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.num_words = num_words
        self.forward = np.zeros((num_words + 1, num_words + 1))
        weights = 0.5 ** np.arange(num_successors)
        weights /= weights.sum()
        for word in range(num_words):
            successors = self.rng.choice(num_words, num_successors, replace=False)
            self.forward[word, successors] = weights * (1 - end)
            self.forward[word, num_words] = end
        self.forward[num_words, :num_words] = 1 / num_words
        # Bayes: P(i before j) = expected visits of i * P(j after i) / expected visits of j.
        words = slice(0, num_words)
        start, inner = self.forward[num_words, words], self.forward[words, words]
        visits = np.append(np.linalg.solve((np.eye(num_words) - inner).T, start), 1.0)  # the start comes once
        joint = visits[:, None] * self.forward
        self.backward = (joint / joint.sum(0)).T

    def sentences(self, count: int) -> list[list[int]]:
        cumulative = self.forward.cumsum(1)
        found = []
        for _ in range(count):
            sentence: list[int] = []
            state = self.num_words
            while True:
                state = int(np.searchsorted(cumulative[state], self.rng.random() * cumulative[state, -1], "right"))
                if state == self.num_words:
                    break
                sentence.append(state)
            found.append(sentence)
        return found

    def perplexities(self, sentences: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Return the (forward, backward) perplexity of the sentences and their ends under the chain itself."""
        nll, targets = np.zeros(2), 0
        for sentence in sentences:
            path = [self.num_words, *sentence, self.num_words]
            nll[0] -= np.log(self.forward[path[:-1], path[1:]]).sum()
            nll[1] -= np.log(self.backward[path[1:], path[:-1]]).sum()
            targets += len(path) - 1
        return math.exp(nll[0] / targets), math.exp(nll[1] / targets)


def as_text(sentences: Sequence[Sequence[int]]) -> list[str]:
    """Return the sentences with a word for each state."""
    return [" ".join(f"w{word:02d}" for word in sentence) for sentence in sentences]
