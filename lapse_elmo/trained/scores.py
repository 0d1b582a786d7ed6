"""Log probabilities of words in sentences, and corpus totals such as perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lapse_elmo.corpus.vocabulary import UNKNOWN

LN_2 = 0.6931471805599453  # nats per bit


@dataclass(frozen=True)
class Candidate:
    """A word that fits at a position.

    Attributes:
        word: The word.
        probability: Its probability by both directions combined.
        forward: Its probability by the forward direction alone; nan if that does not predict the position.
        backward: The same for the backward direction.

    >>> best, second = load(MODEL).fill("w01 ___ w00", 1, count=2)
    >>> best.probability >= second.probability, 0 < best.forward < 1, 0 < best.backward < 1
    (True, True, True)
    """

    word: str
    probability: float
    forward: float
    backward: float


@dataclass(frozen=True)
class SentenceScore:
    """Log probabilities (natural logarithm) of a sentence of T words.

    If the model was trained without boundaries, nothing predicts the first word forward, the last word backward and
    the boundaries: these values are nan.

    Attributes:
        words: The T words.
        unknown: (T,) bool, true for words that are not in the vocabulary; their scores are those of ``<UNK>``.
        forward: (T,) float64, log p(word | words before it).
        backward: (T,) float64, log p(word | words after it).
        end: log p(``</S>`` | all words), by the forward direction.
        begin: log p(``<S>`` | all words), by the backward direction.

    >>> score = load(MODEL).score(["w01 unheard-of w00"])[0]
    >>> score.words, score.unknown.tolist(), score.forward.shape
    (('w01', 'unheard-of', 'w00'), [False, True, False], (3,))
    >>> bool((score.forward_bits > 0).all() and (score.backward_bits > 0).all()), score.end < 0, score.begin < 0
    (True, True, True)
    """

    words: tuple[str, ...]
    unknown: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    end: float
    begin: float

    @property
    def forward_bits(self) -> np.ndarray:
        """Surprisal (T,) in bits by the forward direction."""
        return -self.forward / LN_2

    @property
    def backward_bits(self) -> np.ndarray:
        """Surprisal (T,) in bits by the backward direction."""
        return -self.backward / LN_2


def sentence_score(
    words: list[str], ids: np.ndarray, forward: np.ndarray, backward: np.ndarray, *, boundaries: bool
) -> SentenceScore:
    """Return the score of a sentence from its row of a batch: ids (T',) and log probabilities (T',) or nan."""
    first, size = int(boundaries), len(words)
    inside = slice(first, first + size)
    end, begin = (float(forward[size + 1]), float(backward[0])) if boundaries else (np.nan, np.nan)
    return SentenceScore(
        tuple(words), ids[inside] == UNKNOWN, forward[inside].copy(), backward[inside].copy(), end, begin
    )


@dataclass
class Totals:
    """Sums over sentences, from which perplexity and bits per character follow.

    Targets are the words and, for a model with boundaries, one ``</S>`` (forward) or ``<S>`` (backward) per sentence.
    Characters are those of the words plus one space or line break after each word, so their number does not depend on
    the vocabulary.

    The model predicts only ``<UNK>`` for an unknown word. So that a small vocabulary gains nothing by that,
    :attr:`bits_per_character` includes the bits of spelling the word: log2(A + 1) for each of its characters and for
    its end, where A is the number of distinct characters in the words of all sentences. This is a code from which the
    text can be restored, so models of different vocabularies compare on the same sentences. Compare only models that
    were all trained with boundaries, or all without: without them the first word costs nothing.

    Attributes:
        num_sentences: Sentences.
        num_words: Words.
        num_unknown: Words that are not in the vocabulary.
        num_characters: Characters of the text.
        num_targets: Targets per direction.
        forward_nll: In nats, by the forward direction, without spelling.
        backward_nll: The same for the backward direction.
        num_spelled: Characters and ends of the unknown words.
        alphabet: The distinct characters of all words.

    >>> totals = Totals()
    >>> for score in load(MODEL).score(["w01 unheard-of", "w05 w00"]):
    ...     totals.add(score)
    >>> totals.num_words, totals.unknown_share, totals.num_characters, totals.num_spelled, len(totals.alphabet)
    (4, 0.25, 23, 11, 14)
    >>> totals.bits_per_character > totals.spelling_bits_per_character > 0
    True
    """

    num_sentences: int = 0
    num_words: int = 0
    num_unknown: int = 0
    num_characters: int = 0
    num_targets: int = 0
    forward_nll: float = 0.0
    backward_nll: float = 0.0
    num_spelled: int = 0
    alphabet: set[str] = field(default_factory=set)

    def add(self, score: SentenceScore) -> None:
        """Add one sentence."""
        forward, backward = np.append(score.forward, score.end), np.append(score.backward, score.begin)
        self.num_sentences += 1
        self.num_words += len(score.words)
        self.num_unknown += int(score.unknown.sum())
        self.num_characters += sum(map(len, score.words)) + max(len(score.words), 1)
        self.num_spelled += sum(len(score.words[i]) + 1 for i in np.flatnonzero(score.unknown))
        self.alphabet.update(*score.words)
        self.num_targets += int(np.isfinite(forward).sum())
        self.forward_nll -= float(np.nansum(forward))
        self.backward_nll -= float(np.nansum(backward))

    @property
    def forward_perplexity(self) -> float:
        """Perplexity of the forward direction; nan without targets."""
        return self._perplexity(self.forward_nll, 1)

    @property
    def backward_perplexity(self) -> float:
        """Perplexity of the backward direction; nan without targets."""
        return self._perplexity(self.backward_nll, 1)

    @property
    def perplexity(self) -> float:
        """Perplexity of both directions: exp of the mean nll per target; nan without targets."""
        return self._perplexity(self.forward_nll + self.backward_nll, 2)

    @property
    def unknown_share(self) -> float:
        """Share of unknown words, from 0 to 1; nan without words."""
        return self.num_unknown / self.num_words if self.num_words else math.nan

    @property
    def bits_per_character(self) -> float:
        """Bits per character, mean of both directions, including those that spell unknown words; nan without text."""
        if not self.num_characters:
            return math.nan
        predicted = (self.forward_nll + self.backward_nll) / 2 / LN_2
        return predicted / self.num_characters + self.spelling_bits_per_character

    @property
    def spelling_bits_per_character(self) -> float:
        """The part of :attr:`bits_per_character` that spells unknown words; nan without text."""
        bits = self.num_spelled * math.log2(len(self.alphabet) + 1)
        return bits / self.num_characters if self.num_characters else math.nan

    def _perplexity(self, nll: float, directions: int) -> float:
        if not self.num_targets:
            return math.nan
        loss = nll / (directions * self.num_targets)
        return math.exp(loss) if loss < 700 else math.inf


def top_indices(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the ``count`` largest values, largest first, ties in ascending order of the index."""
    count = max(count, 0)
    if count < len(values):
        candidates = np.argpartition(-values, count)[: count + 1]
        candidates = np.flatnonzero(values >= values[candidates].min())
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
