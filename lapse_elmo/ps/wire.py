"""How messages are laid out in bytes.

A message is a block of bytes: a header of int64 (its kind, its size, the scalar fields in order, then the shape of each
array field), followed by the arrays in order. Every message is a multiple of 8 bytes long, so that several of them can
follow each other in one transmission. Arrays are views of the block, filled in place by the sender and read in place by
the receiver.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from lapse_elmo.ps.messages import KINDS, Message

CHUNK_BYTES = 1 << 20  # of values in one message, so that sender and receiver work at the same time
_SMALLEST_REQUEST_BYTES, _LARGEST_REQUEST_BYTES, _GROWTH = 1 << 19, 1 << 24, 4  # of values that one message asks for
_WORD = 8


class Allocator(Protocol):
    """Where the memory of messages comes from."""

    def allocate(self, size: int) -> np.ndarray:
        """Return a block (size,) uint8."""


M = TypeVar("M", bound=Message)
_SCALARS = {"int": "q", "float": "d"}  # struct codes


@dataclass(frozen=True)
class _Schema:
    """The fields of a kind in the order of the header: scalars, row arrays, and at most one array of values."""

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

    Array fields are copied into the block. An array of rows may be given as its length, and is then for the caller to
    fill; so are values where only their ``width`` is given (there are as many as ``rows``).
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
    scalars = [fields[name] for name in schema.scalars]
    schema.header.pack_into(block.data, 0, kind.KIND, size, *scalars, *shape)
    message = _parse(schema, block)
    for name in schema.rows:
        if not isinstance(fields[name], int):
            getattr(message, name)[:] = fields[name]
    if given is not None:
        getattr(message, str(schema.values))[:] = given
    return message  # type: ignore[return-value]


def read(block: np.ndarray) -> Iterator[Message]:
    """Yield the messages that lie one after another in ``block``, as views of it."""
    start = 0
    while start < block.size:
        kind, size = struct.unpack_from("=qq", block.data, start)
        yield _parse(_kinds()[kind], block[start : start + size])
        start += size


def _parse(schema: _Schema, block: np.ndarray) -> Message:
    header = schema.header.unpack_from(block.data, 0)
    end = 2 + len(schema.scalars)
    fields: dict[str, Any] = dict(zip(schema.scalars, header[2:end], strict=True))
    at = schema.header.size
    for name, number in zip(schema.rows, header[end : end + len(schema.rows)], strict=True):
        fields[name] = block[at : at + _WORD * number].view(np.int64)
        at += _WORD * number
    if schema.values is not None:
        number, width = header[end], header[-1]
        fields[schema.values] = block[at : at + 4 * number * width].view(np.float32).reshape(number, width)
    return schema.kind(block=block, **fields)


def select(message: M, chosen: np.ndarray | slice, **changes: Any) -> M:
    """Return the same message about the rows at ``chosen`` only, with other ``changes``."""
    schema = _schema_of(type(message))
    fields: dict[str, Any] = {name: getattr(message, name) for name in schema.scalars}
    for name in (*schema.rows, *((schema.values,) if schema.values else ())):
        if name not in changes:
            fields[name] = getattr(message, name)[chosen]
    return new(type(message), **(fields | changes))


def chunks(number: int, width: int) -> Iterator[slice]:
    """Yield slices of ``number`` rows whose values of ``width`` floats fit into one message each."""
    size = _rows_in(CHUNK_BYTES, width)
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def growing_chunks(number: int, width: int) -> Iterator[slice]:
    """Yield slices of ``number`` rows to ask for in one message each: small ones first, so that owners soon begin."""
    start, size = 0, _rows_in(_SMALLEST_REQUEST_BYTES, width)
    while start < number:
        yield slice(start, min(start + size, number))
        start += size
        size = min(_GROWTH * size, _rows_in(_LARGEST_REQUEST_BYTES, width))


def _rows_in(num_bytes: int, width: int) -> int:
    return max(num_bytes // (4 * width), 1)
