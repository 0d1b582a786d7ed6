"""Log probabilities of words in their sentences, and what they sum up to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LN_2 = 0.6931471805599453  # nats per bit


@dataclass(frozen=True)
class Candidate:
    """A word that could stand at a place: its probability from both directions together, and from each alone."""

    word: str
    probability: float
    forward: float
    backward: float


@dataclass(frozen=True)
class SentenceScore:
    """What a model makes of a sentence of T words; log probabilities are natural (nats).

    Attributes:
        words: The T words as they were given.
        unknown: (T,) bool: words that the vocabulary lacks; what is scored there is ``<UNK>``.
        forward: (T,) float64: log p(word | words before it).
        backward: (T,) float64: log p(word | words after it).
        end: Log p(``</S>`` | all words), forward.
        begin: Log p(``<S>`` | all words), backward.

    For a model that was trained without boundaries the first ``forward``, the last ``backward``, ``end`` and ``begin``
    are nan: nothing predicts them.
    """

    words: tuple[str, ...]
    unknown: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    end: float
    begin: float

    @property
    def forward_bits(self) -> np.ndarray:
        """(T,) surprisal in bits, forward."""
        return -self.forward / LN_2

    @property
    def backward_bits(self) -> np.ndarray:
        """(T,) surprisal in bits, backward."""
        return -self.backward / LN_2


@dataclass
class Totals:
    """Sums over sentences, as perplexity and bits per character need them.

    Targets are the words and, of a model with boundaries, one end (forward) or begin (backward) a sentence.
    Characters are those of the words and one blank or line break after each word, so that the number does not depend on
    the vocabulary; a word that is unknown to the model counts with all its characters, though only ``<UNK>`` was
    predicted, so compare bits per character together with the share of unknown words.
    """

    num_sentences: int = 0
    num_words: int = 0
    num_unknown: int = 0
    num_characters: int = 0
    num_targets: int = 0
    forward_nll: float = 0.0
    backward_nll: float = 0.0

    def add(self, score: SentenceScore) -> None:
        """Add one sentence."""
        forward, backward = np.append(score.forward, score.end), np.append(score.backward, score.begin)
        self.num_sentences += 1
        self.num_words += len(score.words)
        self.num_unknown += int(score.unknown.sum())
        self.num_characters += sum(map(len, score.words)) + max(len(score.words), 1)
        self.num_targets += int(np.isfinite(forward).sum())
        self.forward_nll -= float(np.nansum(forward))
        self.backward_nll -= float(np.nansum(backward))

    @property
    def forward_perplexity(self) -> float:
        return self._perplexity(self.forward_nll, 1)

    @property
    def backward_perplexity(self) -> float:
        return self._perplexity(self.backward_nll, 1)

    @property
    def perplexity(self) -> float:
        """Of both directions: exp of the mean nll a target."""
        return self._perplexity(self.forward_nll + self.backward_nll, 2)

    @property
    def unknown_share(self) -> float:
        """Unknown words / words, from 0 to 1; nan without words."""
        return self.num_unknown / self.num_words if self.num_words else math.nan

    @property
    def bits_per_character(self) -> float:
        """Mean of both directions' bits, by character; nan without text."""
        bits = (self.forward_nll + self.backward_nll) / 2 / LN_2
        return bits / self.num_characters if self.num_characters else math.nan

    def _perplexity(self, nll: float, directions: int) -> float:
        if not self.num_targets:
            return math.nan
        loss = nll / (directions * self.num_targets)
        return math.exp(loss) if loss < 700 else math.inf
