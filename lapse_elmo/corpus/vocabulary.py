"""The vocabulary: a UTF-8 file with one word a line, most frequent first, and the ids that follow from it.

Ids are 0 padding, 1 ``<S>``, 2 ``</S>``, 3 ``<UNK>``, then the words in file order; the softmax class of an id is
id - 1. The three special tokens are recognised on any line, or may be missing. :meth:`Vocabulary.from_words` puts them
first, where bilm-tf and AllenNLP want them.

In running text ``<UNK>`` is an unknown word like any other. So are ``<S>`` and ``</S>``: sentence boundaries come
from the lines of a text (the model adds their ids), and one inside a sentence would teach it wrong ends.

A vocabulary of 793,471 lines loads in 0.9 s of processor time on a busy machine (``benchmarks/preprocess.py``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lapse_elmo.corpus.files import write_whole
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import MOST_VOCABULARY_BYTES, read_small

PADDING = 0
BEGIN = 1
END = 2
UNKNOWN = 3
#: The special tokens as they are written in a vocabulary file, by id from :data:`BEGIN`.
SPECIAL = ("<S>", "</S>", "<UNK>")
PADDING_TOKEN = "<PAD>"

_SPECIAL_SET = frozenset(SPECIAL)

FIRST_WORD = 4
_BLANK = " \t\r\v\f"  # only ASCII: a line of a no-break space is a (useless) word and not an empty line


class _Ids(dict[str, int]):
    """Ids by word; every other word is unknown. ``map(ids.__getitem__, words)`` then runs without Python code."""

    def __missing__(self, word: str) -> int:
        return UNKNOWN


class Vocabulary:
    """Words and their ids.

    :ivar size: V, the number of classes: the words and the three special tokens. Ids run from 0 (padding) to V.
    :ivar sha256: of the file's bytes, in hexadecimal; it says whether two files of ids speak of the same words.
    """

    def __init__(self, data: bytes, source: str = "vocabulary") -> None:
        """Parse the bytes of a vocabulary file; ``source`` names it in errors.

        :raises CorpusError: for a duplicate, an empty line that is not the last, bytes that are not UTF-8 (each with
            its line number), and a file without words.
        """
        lines = _lines(data, source)
        words = [line for line in lines if line not in _SPECIAL_SET]
        ids = _Ids(zip(words, range(FIRST_WORD, FIRST_WORD + len(words)), strict=True))
        if len(ids) != len(words) or len(lines) - len(words) > len({*lines} & {*SPECIAL}):
            raise _duplicate(lines, source)
        if "" in ids:
            raise CorpusError(
                f"{source}, line {lines.index('') + 1}: empty line; expected one word a line, so delete it"
            )
        if not words:
            raise CorpusError(f"{source} has no words; make one with bin/preprocess vocab")
        self._data = data
        self._words = words
        self._ids = ids
        self.size = len(SPECIAL) + len(words)
        self.sha256 = hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read a vocabulary file. :raises CorpusError: if it is missing, cannot be read or is malformed."""
        try:
            data = read_small(path, MOST_VOCABULARY_BYTES)
        except OSError as error:
            raise CorpusError(
                f"cannot read vocabulary {os.fspath(path)}: {error.strerror}; make one with bin/preprocess vocab"
            ) from None
        return cls(data, f"vocabulary {os.fspath(path)}")

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Vocabulary:
        """A vocabulary of the special tokens and ``words``, most frequent first."""
        return cls("".join(f"{word}\n" for word in (*SPECIAL, *words)).encode("utf-8"))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the same bytes that were loaded, whole or not at all.

        :raises OutputError: if ``path`` exists and ``overwrite`` is false, or cannot be written.
        """
        write_whole(path, self._data, overwrite)

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of ``words``, unknown ones (and special tokens) as :data:`UNKNOWN`."""
        return list(map(self._ids.__getitem__, words))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of ``ids``. :raises CorpusError: for an id outside 0..V."""
        return [self.word(number) for number in ids]

    @property
    def words(self) -> Sequence[str]:
        """The words of the file in order, without the special tokens; that of id i is ``words[i - 4]``."""
        return self._words

    def special_lines(self) -> list[int | None]:
        """The lines of the file, from 0 on, that hold ``<S>``, ``</S>`` and ``<UNK>``; None for one that is missing."""
        if self._data.startswith("".join(f"{token}\n" for token in SPECIAL).encode()):
            return [0, 1, 2]
        lines = _lines(self._data, "vocabulary")
        return [lines.index(token) if token in lines else None for token in SPECIAL]

    def word(self, number: int) -> str:
        """The word of one id. :raises CorpusError: for an id outside 0..V."""
        if not 0 <= number <= self.size:
            raise CorpusError(f"id {number} is not in the vocabulary, whose ids are 0 to {self.size}")
        if number >= FIRST_WORD:
            return self._words[number - FIRST_WORD]
        return SPECIAL[number - BEGIN] if number else PADDING_TOKEN

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class VocabularyFile:
    """What a training run needs to know of a vocabulary file: not its words, which no rank but one has to read."""

    path: str
    size: int
    sha256: str

    @classmethod
    def check(cls, path: str | os.PathLike[str]) -> VocabularyFile:
        """Read a vocabulary file. :raises CorpusError: as :meth:`Vocabulary.load`."""
        vocabulary = Vocabulary.load(path)
        return cls(os.fspath(path), vocabulary.size, vocabulary.sha256)

    def load(self) -> Vocabulary:
        """Read the words. :raises CorpusError: as :meth:`Vocabulary.load`, or if the file is another one by now."""
        vocabulary = Vocabulary.load(self.path)
        if vocabulary.sha256 != self.sha256:
            raise CorpusError(f"vocabulary {self.path} has changed since it was first read; start again")
        return vocabulary


def _lines(data: bytes, source: str) -> list[str]:
    """The lines without ASCII blanks around them; what follows the last line break is left out if empty."""
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
        raise CorpusError(f"{source} is empty; expected one word a line (bin/preprocess vocab makes one)")
    return lines


def _duplicate(lines: Sequence[str], source: str) -> CorpusError:
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            return CorpusError(f"{source}, line {number}: empty line; expected one word a line, so delete it")
        if line in first:
            return CorpusError(
                f"{source}, line {number}: {line!r} is on line {first[line]} already; every word may appear once"
            )
        first[line] = number
    raise AssertionError("called without a duplicate")
