"""Compressed text as a stream: gzip, Zstandard, xz and bzip2, known by their first bytes."""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from lapse_elmo.errors import CorpusError
from lapse_elmo.inputs import UNCHECKED_BYTES, open_gzip, open_regular

_MAGIC = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "xz": (b"\xfd7zXZ\0",),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
}
_LONGEST = 10
#: Compressed bytes that are read at a time.
_READ_BYTES = 1 << 18
#: Far more than text shrinks by, also by formats that remember megabytes of it; a file made to fill disks, by more.
_MOST_EXPANSION = 2000


class DamagedError(Exception):
    """The data is damaged, cut short or followed by something else."""


def format_of(path: str) -> str:
    """``gzip``, ``zstd``, ``xz``, ``bzip2``, or an empty text. :raises OSError: if the file cannot be read."""
    with open_regular(path) as file:
        start = file.read(_LONGEST)
    return next((name for name, magic in _MAGIC.items() if start.startswith(magic)), "")


def expanded(file: BinaryIO, kind: str) -> BinaryIO:
    """The text of ``file``, which is of the format ``kind``. Frames one after another are one text.

    :raises CorpusError: if the format needs a package that is missing.
    :raises DamagedError: when read, if the data is damaged (of gzip: EOFError, zlib.error or gzip.BadGzipFile).
    """
    if kind == "gzip":
        return open_gzip(file)
    new = {"zstd": _new_zstd, "xz": lzma.LZMADecompressor, "bzip2": bz2.BZ2Decompressor}[kind]
    return cast(BinaryIO, io.BufferedReader(_Frames(file, new), _READ_BYTES))


def _new_zstd() -> Any:
    try:
        from backports import zstd
    except ImportError:
        raise CorpusError("text in zstd needs a package that is missing: pip install backports.zstd") from None
    return zstd.ZstdDecompressor()


class _Frames(io.RawIOBase):
    """The text of one frame after another. Unlike the readers of the standard library it refuses what is no frame."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new = file, new
        self._frame = new()
        self._rest = b""  # bytes after the end of the last frame
        self._packed = self._expanded = 0  # bytes so far

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        try:
            while True:
                if self._frame.eof and not self._next_frame():
                    return 0
                data = b""
                if self._frame.needs_input:
                    data, self._rest = self._rest or self._file.read(_READ_BYTES), b""
                    self._packed += len(data)
                    if not data:
                        raise DamagedError("it ends within the compressed data")
                text = self._frame.decompress(data, len(view))
                if text:
                    self._expanded += len(text)
                    if self._expanded > max(UNCHECKED_BYTES, _MOST_EXPANSION * self._packed):
                        raise DamagedError(f"{self._packed:,} bytes expand to more than {self._expanded:,}: no text")
                    view[: len(text)] = text
                    return len(text)
        except (DamagedError, CorpusError):
            raise
        except Exception as error:  # every library has its own
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system
            raise DamagedError(str(error)) from None

    def _next_frame(self) -> bool:
        """Begin the frame that follows; False at the end of the file. Zeros between frames are padding (of xz)."""
        rest = self._frame.unused_data.lstrip(b"\0")
        while not rest:
            rest = self._file.read(_READ_BYTES)
            if not rest:
                return False
            rest = rest.lstrip(b"\0")
        self._frame, self._rest = self._new(), rest
        return True
