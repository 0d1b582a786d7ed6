"""Turn the sentences that users pass into batches for the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lapse_elmo.batches import Batch, make_batch
from lapse_elmo.corpus.vocabulary import PADDING, Vocabulary

#: Largest size of a window in :func:`windows`: batches, and words (a longer sentence is a window by itself).
WINDOW_BATCHES, WINDOW_WORDS = 16, 16_384
BATCH_WORDS = 8_192  # largest number of words in a batch of several sentences


def words_of(sentences: Iterable[str | Sequence[str]]) -> Iterator[list[str]]:
    """Yield the words of each sentence; strings are split at white space, sequences of words are passed through.

    Raises:
        TypeError: If ``sentences`` is a single string, or a sentence is neither a string nor a sequence of strings.
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
    """Yield consecutive sentences in lists of bounded size, so that memory does not grow with the text."""
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
    """Yield the sentences of a window in batches of similar length.

    A batch has ``batch_size`` sentences, or fewer if they are long. Sentences without positions (empty sentences, if
    the model has no boundaries) are included, with T = 0.

    Yields:
        The indices (B,) of the sentences in the window, and the batch.
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


def mean_of_words(vectors: np.ndarray) -> np.ndarray:
    """Return the mean (..., 2D) of vectors (..., T, 2D); zeros for T = 0."""
    return vectors.mean(-2) if vectors.shape[-2] else np.zeros((*vectors.shape[:-2], vectors.shape[-1]), np.float32)


def by_position(batch: Batch, nll: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tables (B, T) by position: ids (0 at padding), and log probabilities of both directions.

    Args:
        batch: The batch.
        nll: (N,) of its targets.

    Returns:
        The ids; the log probabilities forward and backward, nan where a position is not predicted.
    """
    packing = batch.packing
    shape = packing.num_sentences, packing.num_positions
    places = packing.tokens.numpy()
    ids, forward, backward = np.full(shape, PADDING), np.full(shape, np.nan), np.full(shape, np.nan)
    log_forward, log_backward = np.split(-nll, 2)
    ids.flat[places] = batch.ids
    forward.flat[places[packing.second_step :]] = log_forward
    backward.flat[places[packing.previous.numpy()]] = log_backward
    return ids, forward, backward
