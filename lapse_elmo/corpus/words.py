"""Words of UTF-8 text counted, or turned into ids, at the speed of memory by words.c, or by its twin in Python.

:func:`new_counts` and :func:`new_ids` return the C version where it can be had. Both versions find the words of
:meth:`str.split` and return the same numbers.
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
class WordList:
    """Distinct words and their counts, in no particular order; small to pickle.

    :ivar data: the words in UTF-8, each followed by a line end.
    :ivar counts: int64 (words,).
    """

    data: bytes
    counts: np.ndarray

    def words(self) -> list[bytes]:
        """The words in UTF-8."""
        return self.data.split(b"\n")[:-1]


class Counts(ABC):
    """How often each word occurs."""

    @abstractmethod
    def count(self, block: Block) -> int:
        """Count the words of ``block``; returns their number. :raises CorpusError: if it is not UTF-8."""

    @abstractmethod
    def add(self, words: WordList) -> None:
        """Add the counts of ``words``."""

    @abstractmethod
    def totals(self) -> tuple[int, int]:
        """The number of distinct words, and the number of all."""

    @abstractmethod
    def frequent(self, least: int = 1) -> WordList:
        """The words that occur at least ``least`` times."""


class Ids(ABC):
    """The ids of the words of a vocabulary."""

    @abstractmethod
    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the words of ``block`` and the lengths of its sentences (lines with words), both int32.

        They are overwritten by the next call. :raises CorpusError: if the block is not UTF-8.
        """

    @abstractmethod
    def group(
        self, ids: np.ndarray, lengths: np.ndarray, first: int, num_groups: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order sentences by group: sentence i of this call goes to group ``(first + i) % num_groups``.

        :returns: ids and lengths in the order of groups (both overwritten by the next call), and int64 (num_groups, 3)
            counts of each group's sentences, tokens and unknown tokens.
        """


def new_counts() -> Counts:
    """An empty table of counts."""
    library = _library()
    return NativeCounts(library) if library else PlainCounts()


def new_ids(vocabulary: Vocabulary) -> Ids:
    """The ids of ``vocabulary``."""
    library = _library()
    return NativeIds(library, vocabulary) if library else PlainIds(vocabulary)


def problem() -> str:
    """Why words are counted by Python, several times slower, as one line; empty where C does it."""
    return "" if _library() else f"words are looked up in Python, which is slower than C: {native.problem(SOURCE)}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = native.load(SOURCE)
    return declared(library) if library else None


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library``, compiled from words.c, with the types of its functions declared."""
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
    """A table of words.c, freed with this object."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._table = library.words_new()
        if not self._table:
            raise MemoryError

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self._library.words_free(self._table)

    def _add(self, data: bytes, values: np.ndarray) -> None:
        """Add int64 ``values`` to those of the words in ``data``, each followed by a line end."""
        sizes = np.diff(np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE), prepend=-1) - 1
        assert len(sizes) == len(values) and values.dtype == np.int64, "a word for every value"
        assert sizes.min(initial=1) > 0 and sizes.max(initial=0) < 1 << 32, "words have 1 byte to 4 GiB"
        sizes, values = np.ascontiguousarray(sizes, np.int64), np.ascontiguousarray(values)
        self._check(self._library.words_add(self._table, data, sizes.ctypes.data, values.ctypes.data, len(values)))

    @staticmethod
    def _check(status: int, block: Block | None = None) -> int:
        if status == _NO_MEMORY:
            raise MemoryError
        if status == _NOT_UTF8 and block is not None:
            block.decode()  # which says where
        assert status >= 0, "words.c and Python disagree about UTF-8"
        return status


class NativeCounts(_Table, Counts):
    """Counts in a table of words.c: 32 bytes a slot, at most half of which are filled."""

    def count(self, block: Block) -> int:
        return self._check(self._library.words_count(self._table, block.data, len(block.data)), block)

    def add(self, words: WordList) -> None:
        self._add(words.data, words.counts)

    def totals(self) -> tuple[int, int]:
        _, _, distinct, total = self._totals(1)
        return distinct, total

    def frequent(self, least: int = 1) -> WordList:
        num_words, num_bytes, _, _ = self._totals(least)
        data, counts = np.empty(num_bytes + num_words, np.uint8), np.empty(num_words, np.int64)
        self._library.words_export(self._table, least, data.ctypes.data, counts.ctypes.data)
        return WordList(data.tobytes(), counts)

    def _totals(self, least: int) -> tuple[int, int, int, int]:
        totals = np.empty(4, np.int64)
        self._library.words_totals(self._table, least, totals.ctypes.data)
        first, second, third, fourth = totals.tolist()
        return first, second, third, fourth


class NativeIds(_Table, Ids):
    """Ids in a table of words.c."""

    def __init__(self, library: ctypes.CDLL, vocabulary: Vocabulary) -> None:
        super().__init__(library)
        words = vocabulary.words
        self._add("\n".join([*words, ""]).encode(), FIRST_WORD + np.arange(len(words)))
        self._rooms = np.empty((4, 0), np.int32)  # ids and lengths as encoded, and as grouped

    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        size = len(block.data)
        room = (size + 1) // 2
        if self._rooms.shape[1] < room:
            self._rooms = np.empty((4, room), np.int32)
        ids, lengths = self._rooms[0], self._rooms[1]
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
        for array in (ids, lengths):
            assert array.dtype == np.int32 and array.flags.c_contiguous and len(array) <= self._rooms.shape[1]
        assert lengths.sum() == len(ids), "lengths do not add up to the ids"
        assert first >= 0 and num_groups > 0
        counts, starts = np.empty((num_groups, 3), np.int64), np.empty((num_groups, 2), np.int64)
        self._library.words_group(
            ids.ctypes.data, lengths.ctypes.data, len(lengths), first, num_groups,
            self._rooms[2].ctypes.data, self._rooms[3].ctypes.data, counts.ctypes.data, starts.ctypes.data,
        )  # fmt: skip
        return self._rooms[2, : len(ids)], self._rooms[3, : len(lengths)], counts


class PlainCounts(Counts):
    """The twin of :class:`NativeCounts`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def count(self, block: Block) -> int:
        words = block.decode().split()
        self._counts.update(words)
        return len(words)

    def add(self, words: WordList) -> None:
        for word, count in zip(words.words(), words.counts.tolist(), strict=True):
            self._counts[word.decode()] += count

    def totals(self) -> tuple[int, int]:
        return len(self._counts), self._counts.total()

    def frequent(self, least: int = 1) -> WordList:
        words = {word: count for word, count in self._counts.items() if count >= least}
        return WordList("".join(f"{word}\n" for word in words).encode(), np.array(list(words.values()), np.int64))


class PlainIds(Ids):
    """The twin of :class:`NativeIds`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def encode(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
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
        groups = (first + np.arange(len(lengths))) % num_groups
        order = np.argsort(groups, kind="stable")
        starts = np.cumsum(lengths) - lengths
        group_of = np.repeat(groups, lengths)
        every = (groups, group_of, group_of[ids == UNKNOWN])
        counts = np.stack([np.bincount(which, minlength=num_groups) for which in every], axis=1)
        return ids[ranges(starts[order], lengths[order])], lengths[order], counts


def most_frequent(words: WordList, excluded: Collection[bytes], max_size: int | None) -> tuple[list[bytes], int]:
    """The first ``max_size`` words by count, and among equal counts by code points, but those ``excluded``.

    :returns: the words in UTF-8, and the sum of their counts.
    """
    listed = words.words()
    alphabetic = sorted(range(len(listed)), key=listed.__getitem__)  # bytes of UTF-8 sort as code points do
    by_count = np.array(alphabetic, np.int64)[np.argsort(-words.counts[alphabetic], kind="stable")]
    chosen = [number for number in by_count.tolist() if listed[number] not in excluded][:max_size]
    return [listed[number] for number in chosen], int(words.counts[chosen].sum())
