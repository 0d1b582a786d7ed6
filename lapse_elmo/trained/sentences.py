"""Sentences as users give them, and as batches that the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lapse_elmo.batches import Batch, make_batch
from lapse_elmo.corpus.vocabulary import Vocabulary

#: What :func:`windows` holds at a time: so many batches, but no more words than that (or one sentence).
WINDOW_BATCHES, WINDOW_WORDS = 16, 16_384
BATCH_WORDS = 8_192


def words_of(sentences: Iterable[str | Sequence[str]]) -> Iterator[list[str]]:
    """Return the words of each sentence: a string is split at white space, a sequence of words is taken as it is.

    Raises:
        TypeError: If ``sentences`` is itself a string, or a sentence is neither.
    """
    if isinstance(sentences, str | bytes):
        raise TypeError("sentences should be a list of sentences, not one string: give [sentence]")
    for number, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            yield sentence.split()
            continue
        words = list(sentence) if isinstance(sentence, Sequence) and not isinstance(sentence, bytes) else None
        if words is None or not all(isinstance(word, str) for word in words):
            raise TypeError(f"sentence {number} should be a string or a list of words, not {sentence!r:.80}")
        yield words


def windows(sentences: Iterable[list[str]], batch_size: int) -> Iterator[list[list[str]]]:
    """Consecutive sentences in lists of bounded size, so that memory does not grow with the text."""
    window: list[list[str]] = []
    num_words = 0
    for words in sentences:
        if window and (len(window) == WINDOW_BATCHES * batch_size or num_words + len(words) > WINDOW_WORDS):
            yield window
            window, num_words = [], 0
        window.append(words)
        num_words += len(words)
    if window:
        yield window


def batches_of(
    window: Sequence[list[str]], batch_size: int, vocabulary: Vocabulary, boundaries: bool
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Return the sentences of a window in batches of like length: (their numbers (B,) in the window, the batch).

    A batch has ``batch_size`` sentences, or fewer if they are long. Sentences without any position (empty ones, of a
    model without boundaries) come too, with T = 0.
    """
    sizes = np.array([len(words) for words in window])
    order = np.argsort(sizes, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and end - start < batch_size and sizes[order[start : end + 1]].sum() <= BATCH_WORDS:
            end += 1
        numbers = order[start:end]
        offsets = np.concatenate([[0], np.cumsum(sizes[numbers], dtype=np.int64)])
        tokens = np.array(vocabulary.encode(word for n in numbers for word in window[n]), np.int64)
        yield numbers, make_batch(tokens, offsets, numbers, int(sizes[numbers].max()), boundaries)
        start = end
