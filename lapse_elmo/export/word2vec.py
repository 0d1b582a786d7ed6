"""The word vectors alone, as word2vec writes them: for gensim, spaCy (``init vectors``), Flair and others.

A line ``words size``, then, most frequent words first, each word and its D numbers: in text, or in the binary format if
the file's name ends in ``.bin`` (word, blank, D float32 in little-endian, line break). ``<UNK>`` comes first, for
readers that want a vector for unknown words; ``<S>`` and ``</S>`` are left out. Words with a white space in them, which
the format cannot hold, are left out and counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lapse_elmo.corpus.files import atomic_output, refuse_existing
from lapse_elmo.corpus.vocabulary import SPECIAL, UNKNOWN
from lapse_elmo.errors import OutputError
from lapse_elmo.trained.stored import StoredModel

_FIRST = UNKNOWN - 1  # class of <UNK>; words follow


def refuse(path: Path, overwrite: bool) -> None:
    """Raise OutputError if ``path`` may not be written."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: word2vec vectors are one file, so give the name of a file as --output")
    refuse_existing(path, overwrite)


def write(stored: StoredModel, path: Path, overwrite: bool) -> list[str]:
    """Write the file, whole or not at all, and return lines to print.

    Raises:
        OutputError: If it cannot be written.
    """
    binary = path.suffix == ".bin"
    words = [SPECIAL[_FIRST], *stored.vocabulary.words]
    left_out = {number for number, word in enumerate(words) if any(map(str.isspace, word))}
    with atomic_output(path, overwrite) as hidden, open(hidden, "wb") as file:
        file.write(f"{len(words) - len(left_out)} {stored.options.projection_size}\n".encode())
        for first, rows in stored.embedding.chunks():
            vectors = _binary(rows) if binary else _text(rows)
            for place, vector in enumerate(vectors, first - _FIRST):
                if place >= 0 and place not in left_out:
                    file.write(words[place].encode() + b" " + vector)
        file.flush()
        os.fsync(file.fileno())
    kind = "binary" if binary else "text"
    lines = [f"{path}: {len(words) - len(left_out):,} word vectors of {stored.path}, word2vec {kind}"]
    if left_out:
        lines.append(f"{len(left_out):,} words with a white space in them were left out: the format cannot hold them")
    return lines


def _binary(rows: np.ndarray) -> Iterator[bytes]:
    return (row.tobytes() + b"\n" for row in np.ascontiguousarray(rows, "<f4"))


def _text(rows: np.ndarray) -> Iterator[bytes]:
    """Nine digits: a float32 is read back to the bit."""
    template = " ".join(["%.9g"] * rows.shape[1]) + "\n"
    return ((template % tuple(row)).encode() for row in rows.tolist())
