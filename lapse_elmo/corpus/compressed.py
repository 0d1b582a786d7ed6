"""Decompress gzip, Zstandard, xz and bzip2 text as a stream; the format is detected by the file's first bytes."""

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
    # The program pzstd begins with a skippable frame.
    "zstd": (b"\x28\xb5\x2f\xfd", *(b"%c\x2a\x4d\x18" % first for first in range(0x50, 0x60))),
    "xz": (b"\xfd7zXZ\0",),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
}
_MAX_MAGIC_BYTES = 10
#: Compressed bytes per read.
_READ_BYTES = 1 << 18
#: Text compresses far less than this, even with a window of megabytes. A decompression bomb, made to fill memory or
#: disks, compresses more.
_MAX_EXPANSION = 2000


class DamagedError(Exception):
    """The data is damaged, cut short or followed by something else."""


def compression_of(path: str) -> str:
    """Return ``gzip``, ``zstd``, ``xz``, ``bzip2``, or ``""`` for a file that is not compressed.

    Raises:
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(_MAX_MAGIC_BYTES)
    return next((name for name, magic in _MAGIC.items() if start.startswith(magic)), "")


def decompress(file: BinaryIO, kind: str) -> BinaryIO:
    """Return a stream of the decompressed bytes of ``file``. Concatenated frames are decompressed to one text.

    Args:
        file: The compressed file, open at its start. The caller closes it.
        kind: Its format, as returned by :func:`compression_of`.

    Raises:
        CorpusError: The format needs a package that is not installed.
        DamagedError: On reading from the stream: the data is damaged. A gzip stream raises EOFError, zlib.error or
            gzip.BadGzipFile instead.
    """
    if kind == "gzip":
        return open_gzip(file)
    new = {"zstd": _new_zstd_decompressor, "xz": lzma.LZMADecompressor, "bzip2": bz2.BZ2Decompressor}[kind]
    return cast(BinaryIO, io.BufferedReader(_FrameReader(file, new), _READ_BYTES))


def _new_zstd_decompressor() -> Any:
    try:
        from backports import zstd
    except ImportError:
        raise CorpusError(
            "reading zstd text needs a package that is not installed; run: pip install backports.zstd"
        ) from None
    # The library's limit is 27, of 128 MiB; ``zstd --long=31`` makes windows of 2 GiB, which take as much memory.
    return zstd.ZstdDecompressor(options={int(zstd.DecompressionParameter.window_log_max): 31})


class _FrameReader(io.RawIOBase):
    """Decompress one frame after another.

    Unlike the standard library's readers it raises for trailing data that is not a frame, instead of ignoring it.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self._file, self._new_decompressor = file, new
        self._frame = new()
        self._unread = b""  # bytes read from the file but not yet given to a frame
        self._compressed_bytes = self._text_bytes = 0  # bytes so far

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
                    data, self._unread = self._unread or self._file.read(_READ_BYTES), b""
                    self._compressed_bytes += len(data)
                    if not data:
                        raise DamagedError("the file ends in the middle of the compressed data")
                text = self._frame.decompress(data, len(view))
                if text:
                    self._text_bytes += len(text)
                    if self._text_bytes > max(UNCHECKED_BYTES, _MAX_EXPANSION * self._compressed_bytes):
                        raise DamagedError(
                            f"{self._compressed_bytes:,} bytes decompress to more than {self._text_bytes:,}, which "
                            "is not text"
                        )
                    view[: len(text)] = text
                    return len(text)
        except (DamagedError, CorpusError):
            raise
        except Exception as error:  # each library raises its own exception type
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the file system
            raise DamagedError(str(error)) from None

    def _next_frame(self) -> bool:
        """Start the next frame. Returns False at the end of the file.

        Zero bytes between frames are skipped: xz allows them as padding.
        """
        rest = self._frame.unused_data.lstrip(b"\0")
        while not rest:
            rest = self._file.read(_READ_BYTES)
            if not rest:
                return False
            rest = rest.lstrip(b"\0")
        self._frame, self._unread = self._new_decompressor(), rest
        return True
