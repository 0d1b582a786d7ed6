"""Read and write vocabularies: UTF-8 files with one word per line, most frequent first, which define the words' ids.

Ids are 0 padding, 1 ``<S>``, 2 ``</S>``, 3 ``<UNK>``, then the words in file order; the softmax class of an id is
id - 1. The three special tokens may be on any line, or missing. :meth:`Vocabulary.from_words` puts them first, where
bilm-tf and AllenNLP expect them.

The special tokens are unknown words when they occur in text. Sentence boundaries come from the lines of a text (the
model adds their ids); a boundary token inside a sentence would teach the model wrong ends.

A vocabulary of 793,471 lines loads in 0.9 s of processor time on a busy machine (``benchmarks/preprocess.py``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lapse_elmo.corpus.files import atomic_write
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import MOST_VOCABULARY_BYTES, read_small

PADDING = 0
BEGIN = 1
END = 2
UNKNOWN = 3
#: The special tokens as written in a vocabulary file; their ids count from :data:`BEGIN`.
SPECIAL = ("<S>", "</S>", "<UNK>")
PADDING_TOKEN = "<PAD>"

_SPECIAL_SET = frozenset(SPECIAL)

FIRST_WORD = 4
_BLANK = " \t\r\v\f"  # only ASCII: a line of one no-break space is a (useless) word, not an empty line


class _Ids(dict[str, int]):
    """Ids by word, :data:`UNKNOWN` for other words. ``map(ids.__getitem__, words)`` runs without Python code."""

    def __missing__(self, word: str) -> int:
        return UNKNOWN


class Vocabulary:
    """Words and their ids.

    Attributes:
        size: V, the number of classes: the words and the three special tokens. Ids are 0 (padding) to V.
        sha256: Checksum of the file's bytes, in hexadecimal. Files of ids refer to their vocabulary by it.
    """

    def __init__(self, data: bytes, source: str = "vocabulary") -> None:
        """Parse the bytes of a vocabulary file.

        Args:
            data: The file's content.
            source: Its name in error messages.

        Raises:
            CorpusError: A word is duplicate, a line other than the last is empty, the bytes are not UTF-8 (the message
                names the line), there are no words, or every line has a blank within.
        """
        lines = _lines(data, source)
        words = [line for line in lines if line not in _SPECIAL_SET]
        ids = _Ids(zip(words, range(FIRST_WORD, FIRST_WORD + len(words)), strict=True))
        if len(ids) != len(words) or len(lines) - len(words) > len({*lines} & {*SPECIAL}):
            raise _duplicate(lines, source)
        if "" in ids:
            raise CorpusError(
                f"{source}, line {lines.index('') + 1}: empty line, expected one word per line; delete it"
            )
        if not words:
            raise CorpusError(f"{source} has no words; make one with bin/preprocess vocab")
        if all(any(blank in word for blank in _BLANK) for word in words):  # as in a list of words with their counts
            raise CorpusError(
                f"{source} has a blank within every line, such as {words[0]!r:.40}: no word of a text would be known; "
                "expected one word per line"
            )
        self._data = data
        self._words = words
        self._ids = ids
        self.size = len(SPECIAL) + len(words)
        self.sha256 = hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read a vocabulary file.

        Raises:
            CorpusError: It is missing, cannot be read or is malformed.
        """
        return cls(_read(path), f"vocabulary {os.fspath(path)}")

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Vocabulary:
        """Make a vocabulary of the special tokens followed by ``words``, which are ordered most frequent first."""
        return cls("".join(f"{word}\n" for word in (*SPECIAL, *words)).encode("utf-8"))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the vocabulary atomically; the bytes are those that were loaded.

        Raises:
            OutputError: ``path`` exists and ``overwrite`` is false, or it cannot be written.
        """
        atomic_write(path, self._data, overwrite)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Return the ids of ``words``; :data:`UNKNOWN` for unknown words and special tokens."""
        return list(map(self._ids.__getitem__, words))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the words of ``ids``.

        Raises:
            CorpusError: An id is outside 0 to V.
        """
        return [self.word(number) for number in ids]

    @property
    def words(self) -> Sequence[str]:
        """The words of the file in order, without the special tokens; ``words[i - 4]`` has id i."""
        return self._words

    def special_lines(self) -> list[int | None]:
        """Return the line numbers, from 0, of ``<S>``, ``</S>`` and ``<UNK>``; None for a token that is missing."""
        if self._data.startswith("".join(f"{token}\n" for token in SPECIAL).encode()):
            return [0, 1, 2]
        lines = _lines(self._data, "vocabulary")
        return [lines.index(token) if token in lines else None for token in SPECIAL]

    def word(self, number: int) -> str:
        """Return the word of one id.

        Raises:
            CorpusError: The id is outside 0 to V.
        """
        if not 0 <= number <= self.size:
            raise CorpusError(f"id {number} is not in the vocabulary, expected 0 to {self.size}")
        if number >= FIRST_WORD:
            return self._words[number - FIRST_WORD]
        return SPECIAL[number - BEGIN] if number else PADDING_TOKEN

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class VocabularyFile:
    """Path, size and checksum of a vocabulary file: all that training needs, so that only one rank reads the words."""

    path: str
    size: int
    sha256: str

    @classmethod
    def check(cls, path: str | os.PathLike[str]) -> VocabularyFile:
        """Read and check a vocabulary file.

        Raises:
            CorpusError: As for :meth:`Vocabulary.load`.
        """
        vocabulary = Vocabulary.load(path)
        return cls(os.fspath(path), vocabulary.size, vocabulary.sha256)

    def content(self) -> bytes:
        """Read the file.

        Raises:
            CorpusError: It cannot be read, or has changed since it was checked.
        """
        data = _read(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CorpusError(f"vocabulary {self.path} has changed since it was first read; start again")
        return data

    def load(self) -> Vocabulary:
        """Read the words; see :meth:`content`."""
        return Vocabulary(self.content(), f"vocabulary {self.path}")


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_small(path, MOST_VOCABULARY_BYTES)
    except OSError as error:
        raise CorpusError(
            f"cannot read vocabulary {os.fspath(path)}: {error.strerror}; make one with bin/preprocess vocab"
        ) from None


def _lines(data: bytes, source: str) -> list[str]:
    """Return the lines, stripped of ASCII white space, without empty lines at the end."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{source}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8; convert the file with iconv"
        ) from None
    lines = text.split("\n")
    if any(blank in text for blank in _BLANK):
        lines = [line.strip(_BLANK) for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise CorpusError(f"{source} is empty, expected one word per line; make one with bin/preprocess vocab")
    return lines


def _duplicate(lines: Sequence[str], source: str) -> CorpusError:
    """Find the first empty or duplicate line and return the error to raise."""
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            return CorpusError(f"{source}, line {number}: empty line, expected one word per line; delete it")
        if line in first:
            return CorpusError(
                f"{source}, line {number}: {line!r} is already on line {first[line]}; a word may appear only once"
            )
        first[line] = number
    raise AssertionError("called without a duplicate")
