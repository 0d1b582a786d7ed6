"""The encoding of messages as bytes.

A message is a block of bytes: a header of 8-byte words (the kind, the size in bytes, the scalar fields in order, the
number of rows of each array, the width of the values), then the arrays in order. Every message is a multiple of 8 bytes
long, so that several fit into one transmission without gaps. Array fields are views of the block: the sender fills them
in place and the receiver reads them in place, without a copy.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from lapse_elmo.ps.messages import KINDS, Message

CHUNK_BYTES = 1 << 20  # of values per message: small enough that sender and receiver work at the same time
_SMALLEST_REQUEST_BYTES, _LARGEST_REQUEST_BYTES, _GROWTH = 1 << 19, 1 << 24, 4  # of values requested per `Pull`
_WORD = 8
_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_KIND_AND_SIZE = struct.Struct("=qq")


class Allocator(Protocol):
    """Allocates the memory of messages."""

    def allocate(self, size: int) -> np.ndarray:
        """Return a block (size,) uint8."""


M = TypeVar("M", bound=Message)
_SCALARS = {"int": "q", "float": "d"}  # struct codes


@dataclass(frozen=True)
class _Schema:
    """The fields of a kind in encoded order: scalars, int64 arrays, and at most one array of values."""

    kind: type[Message]
    scalars: tuple[str, ...]
    rows: tuple[str, ...]
    values: str | None
    header: struct.Struct


@lru_cache(maxsize=64)
def _schema(kind: Any) -> _Schema:
    fields = [field for field in dataclasses.fields(kind) if field.name != "block"]
    types = {field.name: str(field.type) for field in fields}
    scalars = tuple(name for name in types if types[name] in _SCALARS)
    rows = tuple(name for name in types if types[name] == "Ints")
    values = next((name for name in types if types[name] == "Values"), None)
    codes = "".join(_SCALARS[types[name]] for name in scalars)
    # kind, size, scalars, number of rows of each array, width of the values
    return _Schema(kind, scalars, rows, values, struct.Struct(f"=qq{codes}{len(rows) + (values is not None)}q"))


def _schema_of(kind: Any) -> _Schema:
    return _schema(kind)


@lru_cache(maxsize=1)
def _kinds() -> dict[int, _Schema]:
    return {kind.KIND: _schema_of(kind) for kind in KINDS}


def new(kind: type[M], allocator: Allocator | None = None, /, *, width: int = 0, **fields: Any) -> M:
    """Return a message in a new block.

    Args:
        kind: The class of the message.
        allocator: Allocates the block; by default NumPy does.
        width: Floats per row of ``values``, if they are not given; the caller then fills ``message.values``.
        **fields: All fields but ``block``. Arrays are copied into the block. An int64 array may be given as its length;
            the caller then fills it.
    """
    schema = _schema_of(kind)
    lengths = [fields[name] if isinstance(fields[name], int) else len(fields[name]) for name in schema.rows]
    shape = list(lengths)
    num_bytes = 0
    given = None
    if schema.values is not None:
        given = fields.get(schema.values)
        width = width if given is None else given.shape[1]
        shape.append(width)
        num_bytes = -(-4 * lengths[0] * width // _WORD) * _WORD
    size = schema.header.size + _WORD * sum(lengths) + num_bytes
    block = np.empty(size, np.uint8) if allocator is None else allocator.allocate(size)
    values = {name: fields[name] for name in schema.scalars}
    schema.header.pack_into(block.data, 0, kind.KIND, size, *values.values(), *shape)
    arrays = _arrays(schema, block, shape)
    for name in schema.rows:
        if not isinstance(fields[name], int):
            arrays[name][:] = fields[name]
    if given is not None:
        arrays[str(schema.values)][:] = given
    return _message(kind, block, values, arrays)


def read(block: np.ndarray) -> Iterator[Message]:
    """Yield the messages in ``block`` (n,) uint8, one after another, as views of it."""
    start = 0
    while start < block.size:
        kind, size = _KIND_AND_SIZE.unpack_from(block.data, start)
        yield _parse(_kinds()[kind], block[start : start + size])
        start += size


def _parse(schema: _Schema, block: np.ndarray) -> Message:
    """Return the message encoded in ``block``, whose arrays are views of it."""
    header = schema.header.unpack_from(block.data)
    end = 2 + len(schema.scalars)
    scalars = dict(zip(schema.scalars, header[2:end], strict=True))
    return _message(schema.kind, block, scalars, _arrays(schema, block, header[end:]))


def _message(kind: type[M], block: np.ndarray, scalars: dict[str, Any], arrays: dict[str, np.ndarray]) -> M:
    """Return the message with these fields.

    The constructor of a frozen dataclass would set them one by one, which takes longer than the rest of decoding.
    """
    message = object.__new__(kind)
    message.__dict__.update(block=block, **scalars, **arrays)
    return message


def _arrays(schema: _Schema, block: np.ndarray, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the arrays in ``block`` by name; ``shape`` has the number of rows of each, and the width of the values."""
    arrays: dict[str, np.ndarray] = {}
    at = schema.header.size
    for name, number in zip(schema.rows, shape, strict=False):
        arrays[name] = np.ndarray((number,), _INT64, block, at)
        at += _WORD * number
    if schema.values is not None:
        arrays[schema.values] = np.ndarray((shape[0], shape[-1]), _FLOAT32, block, at)
    return arrays


def select(message: M, chosen: np.ndarray | slice, **changes: Any) -> M:
    """Return a copy of ``message`` with only the rows at the indices ``chosen``; ``changes`` replace fields.

    Used to split a request between what is served here, forwarded and queued.
    """
    schema = _schema_of(type(message))
    fields: dict[str, Any] = {name: getattr(message, name) for name in schema.scalars}
    for name in (*schema.rows, *((schema.values,) if schema.values else ())):
        if name not in changes:
            fields[name] = getattr(message, name)[chosen]
    return new(type(message), **(fields | changes))


def chunks(number: int, width: int) -> Iterator[slice]:
    """Return slices of ``number`` rows, each with at most ``CHUNK_BYTES`` of values of ``width`` floats per row."""
    size = _rows_in(CHUNK_BYTES, width)
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def growing_chunks(number: int, width: int) -> Iterator[slice]:
    """Yield slices of ``number`` rows to request in one message each: a small one first, so that owners start early."""
    start, size = 0, _rows_in(_SMALLEST_REQUEST_BYTES, width)
    while start < number:
        yield slice(start, min(start + size, number))
        start += size
        size = min(_GROWTH * size, _rows_in(_LARGEST_REQUEST_BYTES, width))


def _rows_in(num_bytes: int, width: int) -> int:
    """Return how many rows of ``width`` floats fit into ``num_bytes``, at least 1."""
    return max(num_bytes // (4 * width), 1)
