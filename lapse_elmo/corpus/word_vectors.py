"""Word vectors in word2vec's files, text or binary, read one word after another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import open_regular

_LONGEST_WORD = 1 << 16  # bytes; a longer one is taken for another format


def read_word_vectors(path: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each word and its vector (size,) float32; a file whose name ends in ``.bin`` is binary.

    In text a word may hold blanks: the last ``size`` numbers of a line are the vector.

    :raises CorpusError: if it cannot be read, has vectors of another size, is cut short, or holds what is no number.
    """
    try:
        with open_regular(path) as file:
            head = file.readline(200).split()
            try:
                count, found = map(int, head)
            except ValueError:
                raise CorpusError(
                    f"{path} does not start with a line of two numbers, words and size: it is not a word2vec file"
                ) from None
            if found != size:
                raise CorpusError(f"{path} has vectors of {found} numbers, --projection-size is {size}")
            read = _binary if path.suffix == ".bin" else _text
            yield from read(file, path, count, size)
    except OSError as error:
        raise CorpusError(f"cannot read the word vectors in {path}: {error.strerror}") from None


def _text(file: BinaryIO, path: Path, count: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    number = 1
    for number, line in enumerate(file, start=2):
        parts = line.rstrip().rsplit(b" ", size)
        try:
            vector = np.array(parts[1:], np.float32)
        except ValueError:
            raise CorpusError(f"{path}, line {number}: not a word and {size} numbers") from None
        yield _checked(parts[0], vector, size, f"{path}, line {number}")
    if number - 1 != count:
        raise CorpusError(f"{path} has {number - 1:,} words, its first line says {count:,}: it is damaged or cut short")


def _binary(file: BinaryIO, path: Path, count: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(count):
        word = bytearray()
        while (byte := file.read(1)) not in (b" ", b""):
            word += byte
            if len(word) > _LONGEST_WORD:
                raise CorpusError(f"{path}: word {number} is too long: it is not a binary word2vec file")
        data = file.read(4 * size)
        if len(data) < 4 * size:
            raise CorpusError(f"{path} ends after {number:,} of {count:,} words: it is cut short")
        yield _checked(bytes(word.lstrip(b"\n")), np.frombuffer(data, "<f4"), size, f"{path}, word {number}")


def _checked(word: bytes, vector: np.ndarray, size: int, where: str) -> tuple[str, np.ndarray]:
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise CorpusError(f"{where}: not a word and {size} finite numbers")
    try:
        return word.decode("utf-8"), vector
    except UnicodeDecodeError:
        raise CorpusError(f"{where}: the word is not valid UTF-8") from None
