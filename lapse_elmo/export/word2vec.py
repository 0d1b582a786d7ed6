"""Export the word embeddings in the format of word2vec, for gensim, spaCy (``init vectors``), Flair and others.

The first line has the number of words and D. Each further entry has a word and its D numbers, most frequent words
first: as text or, if the file's name ends in ``.bin``, in the binary format (word, space, D little-endian float32, line
break).
``<UNK>`` comes first, for programs that need a vector for unknown words; ``<S>`` and ``</S>`` are omitted. Words that
contain white space cannot be represented; they are omitted and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lapse_elmo.corpus.files import atomic_output, flush_file, refuse_existing
from lapse_elmo.corpus.vocabulary import SPECIAL, UNKNOWN
from lapse_elmo.errors import OutputError
from lapse_elmo.trained.stored import StoredModel

_FIRST = UNKNOWN - 1  # class of <UNK>; words follow


def refuse(path: Path, overwrite: bool) -> None:
    """Refuse an output file that must not be written.

    Raises:
        OutputError: If it is a directory, or exists without ``overwrite``.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory: word2vec vectors are one file, so give a file name as --output")
    refuse_existing(path, overwrite)


def write(stored: StoredModel, path: Path, overwrite: bool) -> list[str]:
    """Write the file atomically.

    Returns:
        Lines to print for the user.

    Raises:
        OutputError: If the file cannot be written.
    """
    binary = path.suffix == ".bin"
    words = [SPECIAL[_FIRST], *stored.vocabulary.words]
    omitted = {number for number, word in enumerate(words) if any(map(str.isspace, word))}
    with atomic_output(path, overwrite) as temporary, open(temporary, "wb") as file:
        file.write(f"{len(words) - len(omitted)} {stored.options.projection_size}\n".encode())
        for first, rows in stored.embedding.chunks():
            vectors = _binary(rows) if binary else _text(rows)
            for index, vector in enumerate(vectors, first - _FIRST):
                if index >= 0 and index not in omitted:
                    file.write(words[index].encode() + b" " + vector)
        flush_file(file)
    kind = "binary" if binary else "text"
    lines = [f"{path}: {len(words) - len(omitted):,} word vectors of {stored.path}, word2vec {kind}"]
    if omitted:
        lines.append(f"{len(omitted):,} words that contain white space were left out: the format cannot represent them")
    return lines


def _binary(rows: np.ndarray) -> Iterator[bytes]:
    return (row.tobytes() + b"\n" for row in np.ascontiguousarray(rows, "<f4"))


def _text(rows: np.ndarray) -> Iterator[bytes]:
    """Format rows with nine digits, which identify a float32 exactly."""
    template = " ".join(["%.9g"] * rows.shape[1]) + "\n"
    return ((template % tuple(row)).encode() for row in rows.tolist())
