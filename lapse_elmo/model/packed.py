"""Products of few rows with a prepacked weight, by packed.c: its functions, and which products go to them.

Which of packed.c and torch is faster depends on the processor, the precision and the number of rows. The choice is a
fixed function of the processor's instructions, the precision, the weight's layout and the number of rows
(:func:`rows_packed`), so that a resumed run computes the same bits as an uninterrupted one on the same kind of
machine. benchmarks/products.py shows both sides. In packed.c a row's result has the same bits whatever other rows
come with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapse_elmo import native

PACKED_SOURCE = Path(__file__).parent / "packed.c"
PREPACKED_MATMUL = "prepacked matmul"  # its name in a profile
ANY_NUMBER = 1 << 30
_WIDEST_PANEL = 32  # columns that packed.c packs together
# On processors with AMX (benchmarks/README.md; measured on Emerald Rapids). Elsewhere packed.c wins at any number.
_TILES_WIN_UP_TO = 192  # rows, in bfloat16
_FLOAT32_WINS_WITH = (8, 127)  # rows, with weights that are transposed views


@dataclass(frozen=True)
class Kernels:
    """The functions of packed.c for one storage dtype, which take ``num_rows`` rows of the weight at a time.

    Attributes:
        tiles: Whether they multiply by AMX.
    """

    pack: Callable[..., None]
    multiply: Callable[..., None]
    num_rows: int
    tiles: bool = False


class PrepackedWeight:
    """A (K, N) weight in the order in which packed.c reads it.

    Args:
        second: (K, N), strided as it likes, in the storage dtype of ``kernels``; K a multiple of ``num_rows``.
    """

    def __init__(self, kernels: Kernels, second: Tensor) -> None:
        num_rows, num_columns = second.shape
        assert num_rows % kernels.num_rows == 0 and second.device.type == "cpu", second.shape
        self._multiply, self._shape = kernels.multiply, second.shape
        self._packed = second.new_empty(-(-num_columns // _WIDEST_PANEL) * _WIDEST_PANEL * num_rows)
        kernels.pack(num_rows, num_columns, second.data_ptr(), *second.stride(), self._packed.data_ptr())
        # torch.profiler.record_function, which does the same, takes 20 times as long where nothing is recorded.
        self._recorded = torch._C._profiler._RecordFunctionFast(PREPACKED_MATMUL)

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` (n, N) = ``first`` (n, K) @ the weight, rounded to the storage."""
        return self._run(out, first, False)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` += ``first`` @ the weight, rounded to the storage once."""
        return self._run(out, first, True)

    def _run(self, out: Tensor, first: Tensor, add: bool) -> Tensor:
        num_terms, num_columns = self._shape
        dtype = self._packed.dtype
        assert out.shape == (len(first), num_columns) and first.shape[1] == num_terms, (out.shape, first.shape)
        assert out.dtype == first.dtype == dtype and out.is_contiguous() and first.is_contiguous()
        with self._recorded:
            self._multiply(
                len(out), num_terms, num_columns, first.data_ptr(), self._packed.data_ptr(), out.data_ptr(), add
            )
        return out


def kernels(storage: torch.dtype) -> Kernels | None:
    """Return the functions of packed.c for this processor, or None if there are none."""
    library = native.load(PACKED_SOURCE)
    return None if library is None else _kernels(library).get(storage)


@functools.lru_cache(maxsize=4)
def _kernels(library: ctypes.CDLL) -> dict[torch.dtype, Kernels]:
    size, pointer = ctypes.c_long, ctypes.c_void_p
    found = {}
    for storage, kind, num_rows in ((torch.float32, "f", 1), (torch.bfloat16, "b", 2)):
        with contextlib.suppress(AttributeError):  # no bfloat16 on this processor
            pack, multiply, tiles = getattr(library, f"pack_{kind}"), getattr(library, f"multiply_{kind}"), False
            with contextlib.suppress(AttributeError):  # no tiles on it
                if kind == "b" and library.permit_t():
                    multiply, tiles = library.multiply_t, True
            pack.argtypes = [size, size, pointer, size, size, pointer]
            multiply.argtypes = [size, size, size, pointer, pointer, pointer, ctypes.c_int]
            pack.restype = multiply.restype = None
            found[storage] = Kernels(pack, multiply, num_rows, tiles)
    return found


@dataclass(frozen=True)
class Range:
    """The numbers of rows of the products that go to packed.c; those of fewer or more rows go to torch.

    Args:
        first: The smallest.
        last: The largest.
    """

    first: int
    last: int

    def __contains__(self, num_rows: int) -> bool:
        return self.first <= num_rows <= self.last


def rows_packed(storage: torch.dtype, strided: bool) -> Range:
    """Which products go to packed.c on this processor.

    Args:
        strided: Whether the weight is a transposed view, which torch takes longer to multiply by.
    """
    if kernels(storage) is None:
        return Range(1, 0)
    if not has_tiles():
        return Range(1, ANY_NUMBER)
    if storage == torch.bfloat16:
        return Range(1, _TILES_WIN_UP_TO)
    return Range(*_FLOAT32_WINS_WITH) if strided else Range(1, 0)


def has_tiles() -> bool:
    """Whether products of bfloat16 run on AMX."""
    found = kernels(torch.bfloat16)
    return found is not None and found.tiles


def describe(precision: str) -> str:
    """Return one line that names what multiplies in the LSTM's steps on this machine."""
    storage = torch.bfloat16 if precision == "bf16" else torch.float32
    by = "AMX tiles" if precision == "bf16" and has_tiles() else "packed.c"
    parts = []
    for pass_, strided in (("forward", True), ("backward", False)):
        rows = rows_packed(storage, strided)
        if rows.last < rows.first:
            parts.append(f"{pass_} by torch")
        elif rows.last == ANY_NUMBER:
            parts.append(f"{pass_} by {by}")
        else:
            parts.append(f"{pass_} by {by} for {rows.first} to {rows.last} rows, else by torch")
    return f"products of the LSTM's steps, {precision}: {'; '.join(parts)}"
