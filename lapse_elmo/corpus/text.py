"""Text, one sentence a line, plain or compressed: finding files, cutting them into parts, reading whole lines.

A line ends at ``\\n`` (a ``\\r`` before it is white space); words are what :meth:`str.split` finds, so every Unicode
white space separates them, as in bilm-tf. A line without words is no sentence. A byte order mark in front is skipped.
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from lapse_elmo.ahead import read_ahead
from lapse_elmo.corpus.compressed import DamagedError, expanded, format_of
from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import open_regular

#: Bytes of (uncompressed) text that are held at a time, apart from the rest of the last line.
BLOCK_BYTES = 1 << 20
#: Plain files are cut into parts of this many bytes, so that a single large file keeps many ranks busy. It depends on
#: nothing else: what is written must be the same bytes for every number of ranks.
PART_BYTES = 64 << 20
#: A longer line is taken for a file that is not text with a sentence a line.
MAX_LINE_BYTES = 16 << 20

_BOM = b"\xef\xbb\xbf"
_NEWLINE = 10


@dataclass(frozen=True)
class Part:
    """The lines of ``path`` that start at bytes [start, end); ``end`` None is the whole of a compressed file."""

    path: str
    start: int
    end: int | None
    size: int  # bytes on disk, to share the work by
    kind: str = ""  # the format of a compressed file


@dataclass(frozen=True)
class Block:
    """Whole lines of ``part``; nobody has checked yet that they are UTF-8.

    :ivar num_bytes: how much of the file on disk was read for them.
    :ivar num_lines: of the part before this block.
    """

    data: bytes
    num_bytes: int
    part: Part
    num_lines: int

    def decode(self) -> str:
        """The text. :raises CorpusError: naming file and line, for bytes that are not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = _lines_before(self.part) + self.num_lines + self.data.count(b"\n", 0, error.start) + 1
            raise CorpusError(
                f"{self.part.path}, line {line}: byte 0x{self.data[error.start]:02x} is not valid UTF-8; convert the "
                "file with iconv"
            ) from None


def find_texts(arguments: Sequence[str]) -> list[str]:
    """The text files that ``arguments`` name, in their order, each once.

    An argument is a file, a glob pattern (its matches sorted by name) or a directory, which stands for the files right
    inside it whose names do not start with a dot, sorted by name; sub-directories are not entered.

    :raises CorpusError: for an argument that names nothing, and for a file that is empty or cannot be read.
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
        raise CorpusError(f"no file matches the pattern {argument!r}; check it with ls")
    return matches


def _files_in(directory: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise CorpusError(f"cannot read directory {directory}: {error.strerror}") from None
    files = [path for path in (os.path.join(directory, name) for name in names) if not os.path.isdir(path)]
    if not files:
        raise CorpusError(f"directory {directory} has no files right inside it; name the files or give a pattern")
    return files


def _check_readable(path: str) -> None:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise CorpusError(f"text {path} is not a regular file, which is read more than once; copy it to one")
        with open(path, "rb") as file:
            if not file.read(1):
                raise CorpusError(f"text {path} is empty; expected one sentence a line")
    except OSError as error:
        raise CorpusError(f"cannot read text {path}: {error.strerror}") from None


def cut_into_parts(paths: Iterable[str]) -> list[Part]:
    """All parts of ``paths`` in order. Compressed files (known by their first bytes) are one part each."""
    parts = []
    for path in paths:
        try:
            size = os.path.getsize(path)
            kind = format_of(path)
            if kind:
                parts.append(Part(path, 0, None, size, kind))
                continue
        except OSError as error:
            raise CorpusError(f"cannot read text {path}: {error.strerror}") from None
        for start in range(0, size, PART_BYTES):
            end = min(start + PART_BYTES, size)
            parts.append(Part(path, start, end, end - start))
    return parts


def share(parts: Sequence[Part], size: int) -> list[list[int]]:
    """The numbers of the parts of each of ``size`` ranks: the largest first, each to the rank with the least so far."""
    load = [0] * size
    mine: list[list[int]] = [[] for _ in range(size)]
    for number in sorted(range(len(parts)), key=lambda n: (-parts[n].size, n)):
        rank = min(range(size), key=lambda r: (load[r], r))
        load[rank] += parts[number].size * (1 if parts[number].end is not None else 3)  # about 3 times the text
        mine[rank].append(number)
    return [sorted(numbers) for numbers in mine]


def read_blocks(part: Part) -> Iterator[Block]:
    """The lines of ``part``, some :data:`BLOCK_BYTES` at a time; never half a line.

    A compressed file is expanded by a thread of its own, one block ahead.

    :raises CorpusError: for damaged compressed data, a line longer than :data:`MAX_LINE_BYTES`, and whatever the system
        reports.
    """
    return read_ahead(_read(part), depth=1) if part.end is None else _read(part)


def _read(part: Part) -> Iterator[Block]:
    try:
        with open_regular(part.path) as file:
            if part.end is None:
                with expanded(file, part.kind) as stream:
                    yield from _blocks(stream, file, part)
            else:
                if part.start:
                    file.seek(part.start - 1)
                    if not file.readline(MAX_LINE_BYTES).endswith(b"\n") and file.tell() < part.size:
                        raise _too_long(part)
                yield from _blocks(file, file, part)
    except (DamagedError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(
            f"{part.kind} text {part.path} is damaged or cut short ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise CorpusError(f"cannot read text {part.path}: {error.strerror or error}") from None


def _blocks(stream: BinaryIO, disk: BinaryIO, part: Part) -> Iterator[Block]:
    """``stream`` gives the text, ``disk`` tells how far the file has been read (the same for plain text)."""
    num_lines = 0
    before = disk.tell()
    position = before  # in the text
    while part.end is None or position < part.end:
        room = BLOCK_BYTES if part.end is None else min(BLOCK_BYTES, part.end - position)
        data = stream.read(room)
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            if len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                raise _too_long(part)
            data += rest
        if not data:
            return
        position += len(data)
        if part.start == 0 and num_lines == 0 and data.startswith(_BOM):
            data = data[len(_BOM):]
        now = disk.tell()
        yield Block(data, now - before, part, num_lines)
        num_lines += int(np.count_nonzero(np.frombuffer(data, np.uint8) == _NEWLINE))
        before = now


def _lines_before(part: Part) -> int:
    """The number of lines that start before ``part`` does; for an error message, so it may take its time."""
    if part.start == 0:
        return 0
    count = 0
    with open(part.path, "rb") as file:
        while file.tell() < part.start - 1:
            count += file.read(min(BLOCK_BYTES, part.start - 1 - file.tell())).count(b"\n")
    return count + 1  # and the line that runs up to or into this part


def _too_long(part: Part) -> CorpusError:
    return CorpusError(
        f"{part.path} has a line of more than {MAX_LINE_BYTES >> 20} MiB; expected text with one sentence a line"
    )
