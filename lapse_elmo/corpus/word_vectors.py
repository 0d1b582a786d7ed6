"""Read word vectors from word2vec files, text or binary, one word at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import open_regular

_MAX_WORD_BYTES = 1 << 16  # a longer word means that the file has another format


def read_word_vectors(path: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each word and its vector (size,) float32.

    In text files a word may contain spaces: the last ``size`` fields of a line are the vector.

    Args:
        path: The file; binary if its name ends in ``.bin``, text otherwise.
        size: The expected length of the vectors.

    Raises:
        CorpusError: The file cannot be read, has vectors of another size, is truncated, or has a value that is not a
            finite number.
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
        yield _checked(bytes(word.lstrip(b"\n")), np.frombuffer(data, "<f4"), size, f"{path}, word {number}")


def _checked(word: bytes, vector: np.ndarray, size: int, where: str) -> tuple[str, np.ndarray]:
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise CorpusError(f"{where}: expected a word and {size} finite numbers")
    try:
        return word.decode("utf-8"), vector
    except UnicodeDecodeError:
        raise CorpusError(f"{where}: the word is not valid UTF-8") from None
