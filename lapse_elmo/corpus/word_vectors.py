"""Read word vectors from word2vec files, text or binary, one word at a time.

In a binary file a blank ends a word, so a word with a blank inside shifts its vector, and the bytes that are left over
become the start of the next word. The reader then is in step again, so the file's length does not reveal the mistake.
The numbers do: shifted by bytes they have arbitrary exponents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import open_regular

_MAX_WORD_BYTES = 1 << 16  # a longer word means that the file has another format
_USUAL = (1e-6, 1e3)  # the magnitude of nearly all numbers in word vectors, other than 0
_WITH_BLANKS = "words with blanks cannot be told from vectors in binary files: give the vectors as word2vec text"


def read_word_vectors(path: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each word and its vector (size,) float32.

    In text files a word may contain spaces: the last ``size`` fields of a line are the vector.

    Args:
        path: The file; binary if its name ends in ``.bin``, text otherwise.
        size: The expected length of the vectors.

    Raises:
        CorpusError: The file cannot be read, has vectors of another size, is truncated or too long, has a value that
            is not a finite number, or is binary and has a word with a blank.
    """
    try:
        with open_regular(path) as file:
            head = file.readline(200).split()
            try:
                count, found = map(int, head)
            except ValueError:
                raise CorpusError(
                    f"{path} is not a word2vec file: its first line should have two numbers, of words and of dimensions"
                ) from None
            if found != size:
                raise CorpusError(
                    f"{path} has vectors of {found} dimensions, expected {size}; give vectors of the model's size or "
                    f"--projection-size {found}"
                )
            read = _binary if path.suffix == ".bin" else _text
            yield from read(file, path, count, size)
    except OSError as error:
        raise CorpusError(f"cannot read word vectors {path}: {error.strerror}") from None


def _text(file: BinaryIO, path: Path, count: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    number = 1
    for number, line in enumerate(file, start=2):
        parts = line.rstrip().rsplit(b" ", size)
        try:
            vector = np.array(parts[1:], np.float32)
        except ValueError:
            raise CorpusError(f"{path}, line {number}: expected a word and {size} numbers") from None
        yield _checked(parts[0], vector, size, f"{path}, line {number}")
    if number - 1 != count:
        raise CorpusError(
            f"{path} is damaged or truncated: it has {number - 1:,} words, expected {count:,} as in its first line"
        )


def _binary(file: BinaryIO, path: Path, count: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(count):
        word = bytearray()
        while (byte := file.read(1)) not in (b" ", b""):
            word += byte
            if len(word) > _MAX_WORD_BYTES:
                raise CorpusError(
                    f"{path} is not a binary word2vec file: word {number} has more than {_MAX_WORD_BYTES} bytes"
                )
        data = file.read(4 * size)
        if len(data) < 4 * size:
            raise CorpusError(f"{path} is truncated: it ends after {number:,} of {count:,} words")
        word = word.lstrip(b"\n")
        if not _is_text(word) or _begins_within_word(data):
            raise CorpusError(f"{path}, word {number}: this or the word before has a blank, or the file is damaged; "
                              f"{_WITH_BLANKS}")
        yield _checked(bytes(word), np.frombuffer(data, "<f4"), size, f"{path}, word {number}")
    if file.read(2).strip(b"\n"):
        raise CorpusError(f"{path} has more bytes than the {count:,} words of its first line need; {_WITH_BLANKS}")


def _is_text(data: bytes | bytearray) -> bool:
    """Return whether ``data`` can be a word: UTF-8 without ASCII control characters."""
    try:
        return min(data.decode("utf-8"), default=" ") >= " "
    except UnicodeDecodeError:
        return False


def _begins_within_word(data: bytes) -> bool:
    """Return whether the bytes of a vector begin with the rest of a word that has a blank.

    They do if they start with text and a blank, and the numbers after it are far more usual than those from the first
    byte on. A comparison, because vectors may have tiny numbers, and short texts occur in many of them by chance.
    """
    blank = data.find(b" ")
    while blank >= 0 and _is_text(data[:blank]):
        if _count_unusual(data) > 4 * _count_unusual(data[blank + 1 :]):
            return True
        blank = data.find(b" ", blank + 1)
    return False


def _count_unusual(data: bytes) -> int:
    """Return how many whole float32 numbers in ``data`` have an unusual magnitude, or are not finite."""
    magnitudes = np.abs(np.frombuffer(data, "<f4", len(data) // 4))
    usual = (magnitudes == 0) | ((magnitudes > _USUAL[0]) & (magnitudes < _USUAL[1]))
    return int(np.count_nonzero(~usual))


def _checked(word: bytes, vector: np.ndarray, size: int, where: str) -> tuple[str, np.ndarray]:
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise CorpusError(f"{where}: expected a word and {size} finite numbers")
    try:
        return word.decode("utf-8"), vector
    except UnicodeDecodeError:
        raise CorpusError(f"{where}: the word is not valid UTF-8") from None
