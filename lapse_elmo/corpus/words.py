"""Count the words of UTF-8 text, or turn them into ids: in C (words.c), or in Python where no C compiler is available.

:func:`new_word_counter` and :func:`new_word_encoder` return the C version if it can be built. Both versions split text
as :meth:`str.split` does and return the same numbers.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from lapse_elmo import native
from lapse_elmo.corpus.shard_file import ranges
from lapse_elmo.corpus.text import Block
from lapse_elmo.corpus.vocabulary import FIRST_WORD, UNKNOWN, Vocabulary

SOURCE = Path(__file__).parent / "words.c"
_NOT_UTF8, _NO_MEMORY = -1, -2  # as in words.c
_NEWLINE = 10


@dataclass(frozen=True)
class WordCounts:
    """Distinct words and their counts, in no particular order; compact, because ranks exchange them.

    Attributes:
        data: The words in UTF-8, each followed by a newline.
        counts: (words,) int64.
    """

    data: bytes
    counts: np.ndarray

    def words(self) -> list[bytes]:
        """Return the words, in UTF-8."""
        return self.data.split(b"\n")[:-1]


class WordCounter(ABC):
    """Counts how often each word occurs."""

    @abstractmethod
    def count(self, block: Block) -> int:
        """Count the words of ``block``.

        Returns:
            The number of words in the block.

        Raises:
            CorpusError: The block is not UTF-8.
        """

    @abstractmethod
    def add(self, words: WordCounts) -> None:
        """Add the counts of ``words``."""

    @abstractmethod
    def totals(self) -> tuple[int, int]:
        """Return the number of distinct words and the number of all words."""

    @abstractmethod
    def frequent(self, min_count: int = 1) -> WordCounts:
        """Return the words that occur at least ``min_count`` times."""


class WordEncoder(ABC):
    """Turns words into the ids of a vocabulary."""

    @abstractmethod
    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the words of ``block`` and the lengths of its sentences (lines with words), both int32.

        The arrays are overwritten by the next call.

        Raises:
            CorpusError: The block is not UTF-8.
        """

    @abstractmethod
    def group(
        self, ids: np.ndarray, lengths: np.ndarray, first: int, num_groups: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sort sentences by group; sentence i of this call goes to group ``(first + i) % num_groups``.

        Args:
            ids: Concatenated ids, as returned by :meth:`encode`.
            lengths: The lengths of the sentences.
            first: Index of the first sentence in its chunk.
            num_groups: The number of groups.

        Returns:
            Ids and lengths in the order of the groups (both overwritten by the next call), and the counts of each
            group's sentences, tokens and unknown tokens, (num_groups, 3) int64.
        """


def new_word_counter() -> WordCounter:
    """Return an empty counter."""
    library = _library()
    return NativeWordCounter(library) if library else PythonWordCounter()


def new_word_encoder(vocabulary: Vocabulary) -> WordEncoder:
    """Return an encoder for ``vocabulary``."""
    library = _library()
    return NativeWordEncoder(library, vocabulary) if library else PythonWordEncoder(vocabulary)


def fallback_reason() -> str:
    """Return one line that says why the slower Python version is in use, or ``""`` if the C version is."""
    return "" if _library() else f"words are looked up in Python, which is slower than C: {native.problem(SOURCE)}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = native.load(SOURCE)
    return declare_functions(library) if library else None


def declare_functions(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the functions of ``library``, compiled from words.c, and return it."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, []),
        ("free", None, [pointer]),
        ("add", number, [pointer] * 4 + [number]),
        ("count", number, [pointer, ctypes.c_char_p, number]),
        ("encode", number, [pointer, ctypes.c_char_p, number] + [pointer] * 3),
        ("totals", None, [pointer, number, pointer]),
        ("export", None, [pointer, number, pointer, pointer]),
        ("group", None, [pointer] * 2 + [number] * 3 + [pointer] * 4),
    ):
        function = getattr(library, f"words_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class _Table:
    """Owns a hash table of words.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._table = library.words_new()
        if not self._table:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self._library.words_free(self._table)

    def _add(self, data: bytes, values: np.ndarray) -> None:
        """Add to the values of words.

        Args:
            data: The words in UTF-8, each followed by a newline.
            values: (words,) int64.
        """
        sizes = np.diff(np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE), prepend=-1) - 1
        assert len(sizes) == len(values) and values.dtype == np.int64, "as many words as values"
        assert sizes.min(initial=1) > 0 and sizes.max(initial=0) < 1 << 32, "words have 1 byte to 4 GiB"
        sizes, values = np.ascontiguousarray(sizes, np.int64), np.ascontiguousarray(values)
        self._check(self._library.words_add(self._table, data, sizes.ctypes.data, values.ctypes.data, len(values)))

    @staticmethod
    def _check(status: int, block: Block | None = None) -> int:
        if status == _NO_MEMORY:
            raise MemoryError
        if status == _NOT_UTF8 and block is not None:
            block.decode()  # raises an error that names the line
        assert status >= 0, "words.c and Python disagree about UTF-8"
        return status


class NativeWordCounter(_Table, WordCounter):
    """Counts in a hash table of words.c, of 32 bytes per slot, at most half of them filled."""

    def count(self, block: Block) -> int:
        """Count the words of ``block``; see :meth:`WordCounter.count`."""
        return self._check(self._library.words_count(self._table, block.data, len(block.data)), block)

    def add(self, words: WordCounts) -> None:
        """Add the counts of ``words``."""
        self._add(words.data, words.counts)

    def totals(self) -> tuple[int, int]:
        """Return the number of distinct words and the number of all words."""
        _, _, distinct, total = self._totals(1)
        return distinct, total

    def frequent(self, min_count: int = 1) -> WordCounts:
        """Return the words that occur at least ``min_count`` times."""
        num_words, num_bytes, _, _ = self._totals(min_count)
        data, counts = np.empty(num_bytes + num_words, np.uint8), np.empty(num_words, np.int64)
        self._library.words_export(self._table, min_count, data.ctypes.data, counts.ctypes.data)
        return WordCounts(data.tobytes(), counts)

    def _totals(self, min_count: int) -> tuple[int, int, int, int]:
        totals = np.empty(4, np.int64)
        self._library.words_totals(self._table, min_count, totals.ctypes.data)
        first, second, third, fourth = totals.tolist()
        return first, second, third, fourth


class NativeWordEncoder(_Table, WordEncoder):
    """Ids in a hash table of words.c."""

    def __init__(self, library: ctypes.CDLL, vocabulary: Vocabulary) -> None:
        super().__init__(library)
        words = vocabulary.words
        self._add("\n".join([*words, ""]).encode(), FIRST_WORD + np.arange(len(words)))
        self._buffers = np.empty((4, 0), np.int32)  # ids and lengths as encoded, then ids and lengths as grouped

    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths; see :meth:`WordEncoder.encode`."""
        size = len(block.data)
        capacity = (size + 1) // 2
        if self._buffers.shape[1] < capacity:
            self._buffers = np.empty((4, capacity), np.int32)
        ids, lengths = self._buffers[0], self._buffers[1]
        num_lines = np.zeros(1, np.int64)
        num_words = self._check(
            self._library.words_encode(
                self._table, block.data, size, ids.ctypes.data, lengths.ctypes.data, num_lines.ctypes.data
            ),
            block,
        )
        return ids[:num_words], lengths[: int(num_lines[0])]

    def group(
        self, ids: np.ndarray, lengths: np.ndarray, first: int, num_groups: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sort sentences by group; see :meth:`WordEncoder.group`."""
        for array in (ids, lengths):
            assert array.dtype == np.int32 and array.flags.c_contiguous and len(array) <= self._buffers.shape[1]
        assert lengths.sum() == len(ids), "lengths do not add up to the ids"
        assert first >= 0 and num_groups > 0
        counts, starts = np.empty((num_groups, 3), np.int64), np.empty((num_groups, 2), np.int64)
        self._library.words_group(
            ids.ctypes.data, lengths.ctypes.data, len(lengths), first, num_groups,
            self._buffers[2].ctypes.data, self._buffers[3].ctypes.data, counts.ctypes.data, starts.ctypes.data,
        )  # fmt: skip
        return self._buffers[2, : len(ids)], self._buffers[3, : len(lengths)], counts


class PythonWordCounter(WordCounter):
    """Counts in Python: the fallback for, and test reference of, :class:`NativeWordCounter`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def count(self, block: Block) -> int:
        """Count the words of ``block``; see :meth:`WordCounter.count`."""
        words = block.decode().split()
        self._counts.update(words)
        return len(words)

    def add(self, words: WordCounts) -> None:
        """Add the counts of ``words``."""
        for word, count in zip(words.words(), words.counts.tolist(), strict=True):
            self._counts[word.decode()] += count

    def totals(self) -> tuple[int, int]:
        """Return the number of distinct words and the number of all words."""
        return len(self._counts), self._counts.total()

    def frequent(self, min_count: int = 1) -> WordCounts:
        """Return the words that occur at least ``min_count`` times."""
        words = {word: count for word, count in self._counts.items() if count >= min_count}
        return WordCounts("".join(f"{word}\n" for word in words).encode(), np.array(list(words.values()), np.int64))


class PythonWordEncoder(WordEncoder):
    """Encodes in Python: the fallback for, and test reference of, :class:`NativeWordEncoder`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths; see :meth:`WordEncoder.encode`."""
        words: list[str] = []
        lengths: list[int] = []
        for line in block.decode().split("\n"):
            row = line.split()
            if row:
                words += row
                lengths.append(len(row))
        return np.array(self._vocabulary.encode(words), np.int32), np.array(lengths, np.int32)

    def group(
        self, ids: np.ndarray, lengths: np.ndarray, first: int, num_groups: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sort sentences by group; see :meth:`WordEncoder.group`."""
        groups = (first + np.arange(len(lengths))) % num_groups
        order = np.argsort(groups, kind="stable")
        starts = np.cumsum(lengths) - lengths
        group_of = np.repeat(groups, lengths)
        every = (groups, group_of, group_of[ids == UNKNOWN])
        counts = np.stack([np.bincount(which, minlength=num_groups) for which in every], axis=1)
        return ids[ranges(starts[order], lengths[order])], lengths[order], counts


def most_frequent(words: WordCounts, excluded: Collection[bytes], max_size: int | None) -> tuple[list[bytes], int]:
    """Return the most frequent words, ordered by count and, among equal counts, by code point.

    Args:
        words: The words to choose from.
        excluded: Words to leave out, in UTF-8.
        max_size: The number of words to return at most; None for all.

    Returns:
        The words in UTF-8, and the sum of their counts.
    """
    listed = words.words()
    alphabetic = sorted(range(len(listed)), key=listed.__getitem__)  # UTF-8 bytes sort like code points
    by_count = np.array(alphabetic, np.int64)[np.argsort(-words.counts[alphabetic], kind="stable")]
    chosen = [number for number in by_count.tolist() if listed[number] not in excluded][:max_size]
    return [listed[number] for number in chosen], int(words.counts[chosen].sum())
