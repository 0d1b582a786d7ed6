r"""Find text files, split them into chunks, and read whole lines of them; one sentence per line, plain or compressed.

A line ends at ``\n`` (a ``\r`` before it is white space). Words are split as by :meth:`str.split`, so that any Unicode
white space separates them, as in bilm-tf. Lines without words are skipped, and so is a byte order mark at the start.
"""

from __future__ import annotations

import glob
import gzip
import heapq
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from lapse_elmo.ahead import read_ahead
from lapse_elmo.corpus.compressed import DamagedError, compression_of, decompress
from lapse_elmo.errors import ConfigError, CorpusError
from lapse_elmo.inputs import open_regular

#: Bytes of uncompressed text in memory at a time, apart from the rest of the last line.
BLOCK_BYTES = 1 << 20
#: Plain files are split into chunks of this many bytes, so that a single large file keeps many ranks busy. The size
#: must not depend on the number of ranks, because the shards must be the same, byte for byte, for any number.
CHUNK_BYTES = 64 << 20
#: Neighbouring chunks are joined to about this many parts, so that what is done for each part costs little.
NUM_PARTS = 2048
#: A longer line means that the file is not text with one sentence per line.
MAX_LINE_BYTES = 16 << 20

#: Before a chunk, lines are counted for a message. All ranks may have to: they would read a terabyte each.
_MOST_COUNTED_BYTES = 1 << 30

_BOM = b"\xef\xbb\xbf"
_NEWLINE = 10


@dataclass(frozen=True)
class TextChunk:
    """The lines of ``path`` that start at bytes [start, end); ``end`` is None for a whole compressed file."""

    path: str
    start: int
    end: int | None
    size: int  # bytes on disk, for balancing the work
    kind: str = ""  # compression format, empty for plain text

    @property
    def work(self) -> int:
        """The size of the text: as on disk, or with a typical compression ratio."""
        return self.size * (1 if self.end is not None else 3)


@dataclass(frozen=True)
class Block:
    """Whole lines of ``chunk``, not yet checked to be UTF-8.

    Attributes:
        data: The lines, decompressed.
        num_bytes: How many bytes of the file on disk were read for them.
        chunk: The chunk that they belong to.
        num_lines: Lines of the chunk before this block.
    """

    data: bytes
    num_bytes: int
    chunk: TextChunk
    num_lines: int

    def decode(self) -> str:
        """Return the text.

        Raises:
            CorpusError: The bytes are not UTF-8; the message names file and line.
        """
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.num_lines + self.data.count(b"\n", 0, error.start) + 1
            if self.chunk.start > _MOST_COUNTED_BYTES:
                where = f"line {line} of those that begin at byte {self.chunk.start:,} or later"
            else:
                where = f"line {_lines_before(self.chunk) + line}"
            raise CorpusError(
                f"{self.chunk.path}, {where}: byte 0x{self.data[error.start]:02x} is not valid UTF-8; convert the "
                "file with iconv"
            ) from None


def find_texts(arguments: Sequence[str]) -> list[str]:
    """Return the text files that ``arguments`` name, in their order and without duplicates.

    An argument is a file, a glob pattern (its matches, sorted by name) or a directory. A directory stands for the files
    directly inside it, sorted by name, except hidden ones; sub-directories are not entered.

    Raises:
        CorpusError: An argument names nothing, or a file is empty or cannot be read.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        for name in _matches(argument):
            for path in _files_in(name) if os.path.isdir(name) else [name]:
                found.setdefault(os.path.realpath(path), path)
    for path in found.values():
        _check_readable(path)
    return list(found.values())


def _matches(argument: str) -> list[str]:
    if os.path.lexists(argument):
        return [argument]
    if not glob.has_magic(argument):
        raise CorpusError(f"text {argument} does not exist; give a file, a directory or a glob pattern")
    matches = sorted(glob.glob(argument, recursive=True))
    if not matches:
        raise CorpusError(f"no file matches the pattern {argument!r}; check the pattern with ls")
    return matches


def _files_in(directory: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise CorpusError(f"cannot read directory {directory}: {error.strerror}") from None
    files = [path for path in (os.path.join(directory, name) for name in names) if not os.path.isdir(path)]
    if not files:
        raise CorpusError(f"directory {directory} has no files directly inside it; name the files or give a pattern")
    return files


def _check_readable(path: str) -> None:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise CorpusError(f"text {path} is not a regular file; text is read more than once, so copy it to a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise CorpusError(f"text {path} is empty; expected one sentence per line")
    except OSError as error:
        raise CorpusError(f"cannot read text {path}: {error.strerror}") from None


def text_states(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the size and the time of modification of each text, for :func:`require_unchanged`.

    Raises:
        CorpusError: A text is gone.
    """
    try:
        return {path: (status.st_size, status.st_mtime_ns) for path in paths for status in [os.stat(path)]}
    except OSError as error:
        raise CorpusError(f"cannot read text {error.filename}: {error.strerror}") from None


def require_unchanged(before: dict[str, tuple[int, int]]) -> None:
    """Check that texts are what they were when :func:`text_states` returned ``before``.

    Raises:
        CorpusError: A text has changed, as one that is still being written does: only a part of it was read.
    """
    now = text_states(before)
    for path, state in before.items():
        if now[path] != state:
            raise CorpusError(f"text {path} has changed while it was read; start again once it is complete")


def refuse_text(path: str, texts: Iterable[str], role: str) -> None:
    """Check that ``path``, a file with another role, is not one of the ``texts``.

    Raises:
        ConfigError: It is, under any name.
    """
    real = os.path.realpath(path)
    for text in texts:
        if os.path.realpath(text) == real:
            raise ConfigError(f"{text} is {role} and one of the texts; name the texts without it, or move it")


def split_into_chunks(paths: Iterable[str]) -> list[TextChunk]:
    """Split the files ``paths`` into chunks, in order.

    A compressed file is one chunk, since decompression cannot start in the middle.

    Raises:
        CorpusError: A file cannot be read.
    """
    chunks = []
    for path in paths:
        try:
            size = os.path.getsize(path)
            kind = compression_of(path)
            if kind:
                chunks.append(TextChunk(path, 0, None, size, kind))
                continue
        except OSError as error:
            raise CorpusError(f"cannot read text {path}: {error.strerror}") from None
        for start in range(0, size, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, size)
            chunks.append(TextChunk(path, start, end, end - start))
    return chunks


def join_chunks(chunks: Sequence[TextChunk]) -> list[tuple[TextChunk, ...]]:
    """Join neighbours to at most ``NUM_PARTS`` parts and one; many files, or much text, have more chunks."""
    enough = sum(chunk.work for chunk in chunks) // NUM_PARTS
    parts: list[tuple[TextChunk, ...]] = []
    part: list[TextChunk] = []
    work = 0
    for chunk in chunks:
        part.append(chunk)
        work += chunk.work
        if work >= enough:
            parts.append(tuple(part))
            part, work = [], 0
    return [*parts, tuple(part)] if part else parts


def assign(work: Sequence[int], size: int) -> list[list[int]]:
    """Distribute pieces of ``work`` over ranks, greedily: the largest first, each to the rank with the least so far.

    Returns:
        For each of the ``size`` ranks the indices of its pieces, ascending.
    """
    # Work and rank, as a heap: with thousands of ranks and of pieces, a search for the least would take long.
    load = [(0, rank) for rank in range(size)]
    mine: list[list[int]] = [[] for _ in range(size)]
    for number in sorted(range(len(work)), key=lambda n: (-work[n], n)):
        so_far, rank = load[0]
        heapq.heapreplace(load, (so_far + work[number], rank))
        mine[rank].append(number)
    return [sorted(numbers) for numbers in mine]


def read_blocks(chunk: TextChunk) -> Iterator[Block]:
    """Yield the lines of ``chunk`` in blocks of about :data:`BLOCK_BYTES`, each of whole lines.

    A compressed file is decompressed one block ahead by a separate thread.

    Raises:
        CorpusError: The file cannot be read, its compressed data is damaged, or a line is longer than
            :data:`MAX_LINE_BYTES`.
    """
    return read_ahead(_read(chunk), depth=1) if chunk.end is None else _read(chunk)


def _read(chunk: TextChunk) -> Iterator[Block]:
    try:
        with open_regular(chunk.path) as file:
            if chunk.end is None:
                with decompress(file, chunk.kind) as stream:
                    yield from _blocks(stream, file, chunk)
            else:
                if chunk.start:
                    # The line that runs across the start belongs to the chunk before: skip the rest of it. Reading
                    # from the byte before the start keeps a line that begins exactly there.
                    file.seek(chunk.start - 1)
                    if not file.readline(MAX_LINE_BYTES).endswith(b"\n") and file.tell() < chunk.size:
                        raise _too_long(chunk)
                yield from _blocks(file, file, chunk)
    except (DamagedError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(
            f"{chunk.kind} text {chunk.path} is damaged or truncated ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise CorpusError(f"cannot read text {chunk.path}: {error.strerror or error}") from None


def _blocks(stream: BinaryIO, disk: BinaryIO, chunk: TextChunk) -> Iterator[Block]:
    """Yield blocks of ``stream``, the decompressed text.

    Args:
        stream: The text, at the first line of the chunk.
        disk: The file on disk, for its position; the same object as ``stream`` for plain text.
        chunk: The chunk being read.
    """
    num_lines = 0
    before = disk.tell()
    position = before  # in the text
    while chunk.end is None or position < chunk.end:
        room = BLOCK_BYTES if chunk.end is None else min(BLOCK_BYTES, chunk.end - position)
        data = stream.read(room)
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                raise _too_long(chunk)
            data += rest
        if not data:
            return
        position += len(data)
        if chunk.start == 0 and num_lines == 0 and data.startswith(_BOM):
            data = data[len(_BOM):]
        now = disk.tell()
        yield Block(data, now - before, chunk, num_lines)
        num_lines += int(np.count_nonzero(np.frombuffer(data, np.uint8) == _NEWLINE))
        before = now


def _lines_before(chunk: TextChunk) -> int:
    """Count the lines that start before ``chunk``. Slow, since it reads the file; only for error messages."""
    if chunk.start == 0:
        return 0
    count = 0
    with open(chunk.path, "rb") as file:
        while file.tell() < chunk.start - 1:
            count += file.read(min(BLOCK_BYTES, chunk.start - 1 - file.tell())).count(b"\n")
    return count + 1  # plus the line that runs up to or into this chunk


def _too_long(chunk: TextChunk) -> CorpusError:
    return CorpusError(
        f"{chunk.path} has a line of more than {MAX_LINE_BYTES >> 20} MiB; expected text with one sentence per line"
    )
