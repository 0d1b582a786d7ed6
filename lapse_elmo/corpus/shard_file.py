"""Read and write one HDF5 shard (format version 1).

File layout::

    tokens    int32 (num_tokens,)         ids of all sentences, concatenated, without boundary ids
    offsets   int64 (num_sentences + 1,)  sentence i is tokens[offsets[i]:offsets[i + 1]]
    sources   bytes (num_sources,)        base names of the text files of the whole set, UTF-8
    attributes: format, version, and the fields of Header

All data is chunked and checksummed (fletcher32) but not compressed. Measured on 16 million tokens of English (one busy
core of a Zen 4 processor; write and read in million tokens/s, reading one random sentence in microseconds)::

                        bytes/token   write   read   sentence
    fletcher32 alone, 16,384    4.0     121    181         52    <- chosen
    fletcher32 alone, 65,536    4.0     157    184        177
    lzf + shuffle, 16,384       1.8      16     28        336
    gzip 1 + shuffle, 16,384    1.5      11     30        466
    gzip 4 + shuffle, 16,384    1.4       9     36        359

A billion words take 4 GB, which is little compared with the model that they train. Reading one random sentence decodes
its whole chunk, which is why chunks are small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from lapse_elmo.corpus.files import H5_ERRORS, DeferredErrorFile
from lapse_elmo.corpus.vocabulary import UNKNOWN
from lapse_elmo.errors import CorpusError, in_one_line
from lapse_elmo.inputs import require_regular

FORMAT = "lapse-elmo-shard"
VERSION = 1
SPLITS = ("train", "heldout")
CHUNK = 16_384  # values per HDF5 chunk

_BUFFER_VALUES = 16 * CHUNK  # values collected before a write
_MAX_GAP = 256  # sentences; up to this distance two sentences share a read, since they mostly share a chunk
_MAX_SENTENCE_TOKENS = 1 << 23  # a line of text has at most 16 MiB, hence 8 Mi words
_MAX_SHARDS = 100_000  # in a set; a header with more is damaged
_MAX_CLASSES = (1 << 31) - 1  # ids are int32
_MAX_SPAN = 16_384  # sentences that one read may span, to bound memory


@dataclass(frozen=True)
class Header:
    """The attributes of a shard file."""

    split: str  # "train" or "heldout"
    shard_index: int  # 0 .. num_shards - 1
    num_shards: int
    num_sentences: int  # of this shard, as are the next two
    num_tokens: int
    num_unknown: int
    vocabulary_sha256: str
    vocabulary_size: int  # V, the number of classes
    set_sha256: str  # identifies the set: equal for all its shards, different for every other set
    options: str  # JSON: the options that the set was made with


def shard_name(split: str, index: int, count: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.h5"


class ShardWriter:
    """Writes one shard whose totals are known in advance. The same calls always give the same bytes.

    The file is complete once :meth:`close` has returned; write it under a temporary name and rename it then.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header, sources: Sequence[str]) -> None:
        """Create the shard at ``path``.

        Args:
            path: The file to write.
            header: Its attributes; the totals must match what is appended.
            sources: Names of the text files of the whole set.

        Raises:
            OSError: The file cannot be written; the other methods raise it too.
        """
        self.path = os.fspath(path)
        self._header = header
        self._sink = DeferredErrorFile(self.path)
        self._file = h5py.File(self._sink, "w", track_order=False)
        self._tokens = _Appender(self._file, "tokens", header.num_tokens, np.int32)
        self._offsets = _Appender(self._file, "offsets", header.num_sentences + 1, np.int64)
        self._offsets.append(np.zeros(1, np.int64))
        self._num_unknown = 0
        names = np.array([source.encode("utf-8", "surrogateescape") for source in sources] or [b""])
        self._file.create_dataset("sources", data=names, chunks=names.shape, fletcher32=True, track_times=False)

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append sentences.

        Args:
            tokens: (tokens,) int32, the ids of all the sentences, concatenated.
            lengths: (sentences,) the number of tokens of each.
        """
        assert len(tokens) == lengths.sum(), "lengths do not add up to the tokens"
        self._offsets.append(self._tokens.count + np.cumsum(lengths, dtype=np.int64))
        self._tokens.append(tokens)
        self._num_unknown += int((tokens == UNKNOWN).sum())
        self._sink.check()

    def close(self) -> None:
        """Write the buffered data and the attributes, flush the file to the disk and close it."""
        self._tokens.flush()
        self._offsets.flush()
        assert self._tokens.count == self._header.num_tokens, "not all tokens were written"
        assert self._offsets.count == self._header.num_sentences + 1, "not all sentences were written"
        assert self._num_unknown == self._header.num_unknown, "the count of unknown tokens is wrong"
        self._file.attrs["format"] = FORMAT
        self._file.attrs["version"] = VERSION
        for name, value in dataclasses.asdict(self._header).items():
            self._file.attrs[name] = value
        self._file.close()
        self._sink.finish()

    def abandon(self) -> None:
        """Close the file without completing it, after an error. Does nothing after :meth:`close`."""
        with contextlib.suppress(*H5_ERRORS):
            self._file.close()
        self._sink.close()


class _Appender:
    """A one-dimensional dataset that grows by writes of whole chunks."""

    def __init__(self, file: h5py.File, name: str, size: int, dtype: type) -> None:
        self._dataset = file.create_dataset(
            name, (size,), dtype, chunks=(CHUNK,), maxshape=(None,), fletcher32=True, fillvalue=0, track_times=False
        )
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._written = 0

    @property
    def count(self) -> int:
        return self._written + self._buffered

    def append(self, values: np.ndarray) -> None:
        self._buffer.append(values)
        self._buffered += len(values)
        if self._buffered >= _BUFFER_VALUES:
            self._write(self._buffered - self._buffered % CHUNK)

    def flush(self) -> None:
        self._write(self._buffered)

    def _write(self, count: int) -> None:
        """Write the first ``count`` of the buffered values, and keep the others."""
        if not count:
            return
        values = np.concatenate(self._buffer)
        self._dataset[self._written : self._written + count] = values[:count]
        self._buffer = [values[count:]]
        self._written += count
        self._buffered -= count


class ShardFile:
    """One shard, open for reading.

    The header is read by the constructor. The data file is opened by the first read, and opened again in a forked
    process, because HDF5's state does not survive a fork.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header | None = None) -> None:
        """Read the header of the shard at ``path``.

        Args:
            path: The shard file.
            header: Its header, if another process has read it; then the file is not opened here.

        Raises:
            CorpusError: The file is missing, truncated, not a shard, or of another format version.
        """
        self.path = os.fspath(path)
        self._file: h5py.File | None = None
        self._owner = 0
        if header is not None:
            self.header = header
            return
        file = self._open()
        try:
            self.header = _header(file, self.path)
        except H5_ERRORS as error:
            raise self._damaged(error) from None
        finally:
            file.close()

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read sentences by their index in this shard.

        Args:
            indices: (n,) int64, ascending.

        Returns:
            The concatenated tokens, int32, and the lengths of the sentences, (n,) int64.

        Raises:
            CorpusError: The data is damaged (checksum, offsets or ids).
        """
        breaks = np.flatnonzero((np.diff(indices) > _MAX_GAP) | (np.diff(indices // _MAX_SPAN) > 0)) + 1
        tokens, lengths = [], []
        for run in np.split(indices, breaks):
            if len(run):
                run_tokens, run_lengths = self._read_span(run)
                tokens.append(run_tokens)
                lengths.append(run_lengths)
        if not tokens:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        return np.concatenate(tokens), np.concatenate(lengths)

    def _read_span(self, run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read everything from the first to the last sentence of ``run``, and drop the sentences that are not in it."""
        first, last = int(run[0]), int(run[-1])
        offsets = self.offsets(first, last + 2)
        tokens = self.tokens(int(offsets[0]), int(offsets[-1]))
        if (np.diff(run) == 1).all():
            return tokens, np.diff(offsets)
        starts, lengths = offsets[run - first], np.diff(offsets)[run - first]
        return tokens[ranges(starts - offsets[0], lengths)], lengths

    def offsets(self, start: int, stop: int) -> np.ndarray:
        """Read ``offsets[start:stop]``, int64.

        Raises:
            CorpusError: They do not ascend, or point outside the tokens.
        """
        offsets = self._slice("offsets", start, stop)
        lengths = np.diff(offsets)
        if len(lengths) and lengths.max() > _MAX_SENTENCE_TOKENS:
            raise self._damaged(
                f"a sentence has {lengths.max():,} tokens, expected at most {_MAX_SENTENCE_TOKENS:,}"
            )
        if (lengths < 0).any() or offsets[0] < 0 or offsets[-1] > self.header.num_tokens:
            raise self._damaged("sentence offsets out of order")
        return offsets

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Read ``tokens[start:stop]``, int32.

        Raises:
            CorpusError: An id is outside 1 to V, the vocabulary's size.
        """
        tokens = self._slice("tokens", start, stop)
        if len(tokens) and (tokens.min() < 1 or tokens.max() > self.header.vocabulary_size):
            raise self._damaged(f"ids outside 1 to {self.header.vocabulary_size}")
        return tokens

    def sources(self) -> list[str]:
        """Return the names of the text files that the set was made from."""
        return [name.decode("utf-8", "replace") for name in self._slice("sources", 0, None)]

    def verify(self) -> None:
        """Read the whole file and check every checksum, offset, id and count.

        Raises:
            CorpusError: Something is damaged.
        """
        self.sources()
        num_unknown = 0
        for start in range(0, self.header.num_tokens, 64 * CHUNK):
            tokens = self.tokens(start, min(start + 64 * CHUNK, self.header.num_tokens))
            num_unknown += int((tokens == UNKNOWN).sum())
        if num_unknown != self.header.num_unknown:
            raise self._damaged(f"{num_unknown} unknown tokens, expected {self.header.num_unknown} as in the header")
        last = 0
        for start in range(0, self.header.num_sentences + 1, 64 * CHUNK):
            offsets = self.offsets(start, min(start + 64 * CHUNK, self.header.num_sentences + 1))
            if offsets[0] < last or (start == 0 and offsets[0] != 0):
                raise self._damaged("sentence offsets out of order")
            last = int(offsets[-1])
        if last != self.header.num_tokens:
            raise self._damaged("the last sentence does not end at the last token")

    def close(self) -> None:
        """Close the file. A later read opens it again."""
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file = None

    def _slice(self, name: str, start: int, stop: int | None) -> np.ndarray:
        if self._file is None or self._owner != os.getpid():
            file = self._open()
            if _native(file.attrs.get("set_sha256")) != self.header.set_sha256:
                file.close()
                raise CorpusError(
                    f"shard {self.path} has been replaced by a shard of another set since the job started; start again"
                )
            self._file, self._owner = file, os.getpid()
        try:
            return self._file[name][start:stop]
        except H5_ERRORS as error:
            raise self._damaged(error) from None

    def _open(self) -> h5py.File:
        try:
            require_regular(self.path)
            return h5py.File(self.path, "r", locking=False)  # ranks only read, and some file systems have no locks
        except FileNotFoundError:
            raise CorpusError(
                f"shard {self.path} does not exist; make the shards with bin/preprocess shards"
            ) from None
        except PermissionError as error:
            raise CorpusError(f"cannot read shard {self.path}: {os.strerror(error.errno or 13)}") from None
        except H5_ERRORS as error:
            raise self._damaged(error) from None

    def _damaged(self, reason: object) -> CorpusError:
        if isinstance(reason, OSError) and reason.errno in (errno.EINVAL, errno.EISDIR):
            return CorpusError(f"cannot read shard {self.path}: {reason.strerror}")
        if isinstance(reason, OSError) and reason.errno in (errno.EMFILE, errno.ENFILE):
            return CorpusError(f"cannot read shard {self.path}: {os.strerror(reason.errno)}; raise ulimit -n")
        if isinstance(reason, OSError) and "signature not found" in str(reason):
            return CorpusError(f"{self.path} is not an HDF5 file; expected a shard made by bin/preprocess shards")
        text = in_one_line(reason)
        return CorpusError(f"shard {self.path} is damaged ({text}); copy it again, or make the shards again")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated integers of the ranges [start, start + length)."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def select(tokens: np.ndarray, offsets: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and offsets of the sentences ``members``, in the order of ``members``."""
    starts = offsets[members]
    lengths = offsets[members + 1] - starts
    return tokens[ranges(starts, lengths)], np.concatenate([[0], np.cumsum(lengths)])


def _header(file: h5py.File, path: str) -> Header:
    """Read and check the header of an open file. Errors of h5py pass through; the caller handles them."""
    remake = "make the shards again with bin/preprocess shards"
    if _native(file.attrs.get("format")) != FORMAT:
        raise CorpusError(
            f"{path} is an HDF5 file but not a shard of lapse-elmo; expected one made by bin/preprocess shards"
        )
    version = _native(file.attrs.get("version"))
    if version != VERSION:
        raise CorpusError(f"shard {path} has format version {version}, expected version {VERSION}; {remake}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Header):
        value = _native(file.attrs[field.name])
        wanted = {"int": int, "str": str}[str(field.type)]
        if type(value) is not wanted or (isinstance(value, int) and value < 0):
            expected_kind = "a number of 0 or more" if wanted is int else "text"
            raise ValueError(f"attribute {field.name} is {value!r}, expected {expected_kind}")
        values[field.name] = value
    header = Header(**values)
    if header.split not in SPLITS or header.shard_index >= header.num_shards:
        raise ValueError(f"shard {header.shard_index} of {header.num_shards}, split {header.split!r}")
    expected = {"tokens": (header.num_tokens, np.int32), "offsets": (header.num_sentences + 1, np.int64)}
    if header.num_shards > _MAX_SHARDS or header.vocabulary_size > _MAX_CLASSES:
        raise ValueError(f"{header.num_shards} shards, {header.vocabulary_size} classes")
    if not header.num_unknown <= header.num_tokens >= header.num_sentences:  # no sentence is empty
        raise ValueError(
            f"{header.num_sentences} sentences of {header.num_tokens} tokens, {header.num_unknown} of them unknown"
        )
    for name in (*expected, "sources"):
        if not isinstance(file[name], h5py.Dataset):
            raise ValueError(f"{name} is not a dataset")
        if file[name].nbytes > file[name].id.get_storage_size():  # never written, or compressed to nothing
            raise ValueError(
                f"{name} should have {file[name].nbytes} bytes, {file[name].id.get_storage_size()} are in the file"
            )
    if file["sources"].ndim != 1 or file["sources"].dtype.kind != "S":
        raise ValueError("sources are not a list of names")
    for name, (size, dtype) in expected.items():
        if file[name].shape != (size,) or file[name].dtype != dtype:
            raise ValueError(f"{name} should be {np.dtype(dtype)} of shape ({size},)")
    return header


def _native(value: Any) -> Any:
    """Return an HDF5 attribute as a Python int or str."""
    return value.item() if isinstance(value, np.generic) else value
