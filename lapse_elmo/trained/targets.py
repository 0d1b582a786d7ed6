"""Collect the vectors of all occurrences of given words, for studies of lexical change, in a NumPy archive."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np

from lapse_elmo.corpus.files import flush_file
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import MOST_VOCABULARY_BYTES, read_small

_PENDING_BYTES = 32 << 20


def read_targets(path: Path) -> list[str]:
    """Return the distinct words of a UTF-8 file with one word per line; empty lines are skipped.

    Raises:
        CorpusError: If the file cannot be read or has no words, or a line has more than one.
    """
    try:
        lines = read_small(path, MOST_VOCABULARY_BYTES).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise CorpusError(f"cannot read the words in {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: byte 0x{error.object[error.start]:02x} is not valid UTF-8") from None
    words: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        found = line.split()
        if len(found) > 1:
            raise CorpusError(f"{path}, line {number}: {len(found)} words, expected one per line")
        words |= dict.fromkeys(found)
    if not words:
        raise CorpusError(f"{path} has no words: expected one per line")
    return list(words)


class TargetVectors:
    """Context manager that collects the vectors of each word and writes them to an ``.npz`` file on exit.

    The vectors are buffered in temporary files in the directory of ``path``, so memory does not grow with the text.

    Args:
        path: The archive to write. Its array of a word is (n, *shape) float32 for n occurrences.
        words: The words.
        shape: Shape of a vector.
    """

    def __init__(self, path: Path, words: list[str], shape: tuple[int, ...]) -> None:
        self._path, self._shape = path, shape
        self._counts = dict.fromkeys(words, 0)
        self._file_numbers = {word: number for number, word in enumerate(words)}
        self._pending: dict[str, list[np.ndarray]] = {}
        self._pending_bytes = 0
        self._folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))

    def add(self, words: list[str], vectors: np.ndarray) -> None:
        """Add one line of text.

        Args:
            words: All words of the line.
            vectors: (n, 2D) or (L + 1, n, 2D), the vectors of the n words that are to be collected.
        """
        if vectors.ndim == 3:
            vectors = vectors.swapaxes(0, 1)
        targets = (word for word in words if word in self._counts)
        for word, vector in zip(targets, vectors, strict=True):
            self._pending.setdefault(word, []).append(vector)
            self._counts[word] += 1
        self._pending_bytes += vectors.nbytes
        if self._pending_bytes > _PENDING_BYTES:
            self._flush()

    def __enter__(self) -> TargetVectors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            if kind is None:
                self._flush()
                self._write()

    def _flush(self) -> None:
        for word, rows in self._pending.items():
            with open(self._folder / str(self._file_numbers[word]), "ab") as file:
                file.write(np.stack(rows).tobytes())
        self._pending, self._pending_bytes = {}, 0

    def _write(self) -> None:
        with open(self._path, "wb") as output:
            with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for word, count in self._counts.items():
                    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *self._shape)}
                    with archive.open(zipfile.ZipInfo(f"{word}.npy"), "w", force_zip64=True) as entry:
                        np.lib.format.write_array_header_1_0(entry, header)
                        stored = self._folder / str(self._file_numbers[word])
                        if stored.exists():
                            with open(stored, "rb") as file:
                                shutil.copyfileobj(file, entry, 1 << 20)
            flush_file(output)  # before the caller renames it
