"""Matrix products of few rows with a prepacked weight: the bindings of prepacked.c, and when they are used.

Whether prepacked.c or torch is faster depends on the processor, the precision and the number of rows. The choice is not
timed at run time. It is a fixed function of the processor's instructions, the precision, the weight's layout and the
number of rows (:func:`rows_prepacked`), so that a resumed run gives bitwise the same results as an uninterrupted one on
the same kind of machine. benchmarks/products.py compares the two. In prepacked.c, each row's result is bitwise
independent of the other rows.
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

PREPACKED_SOURCE = Path(__file__).parent / "prepacked.c"
PREPACKED_MATMUL = "prepacked matmul"  # label in profiles
UNLIMITED = 1 << 30  # rows
_WIDEST_PANEL = 32  # columns of a panel of prepacked.c with AVX-512; 16 without
# Numbers of rows for which prepacked.c is faster than torch on processors with AMX, measured on Emerald Rapids
# (benchmarks/README.md). On processors without AMX, prepacked.c is always used.
_MAX_ROWS_AMX_BF16 = 192
_ROWS_AMX_FP32 = (8, 127)  # only for weights that are transposed views


@dataclass(frozen=True)
class Kernels:
    """The functions of prepacked.c for one storage dtype.

    Attributes:
        pack: Packs a weight.
        multiply: Multiplies by a prepacked weight.
        num_rows: The number of rows of a weight must be a multiple of this (2 for bfloat16, 1 for float32).
        tiles: Whether ``multiply`` uses AMX tiles.
    """

    pack: Callable[..., None]
    multiply: Callable[..., None]
    num_rows: int
    tiles: bool = False


class PrepackedWeight:
    """A copy of a (K, N) weight in the layout that prepacked.c reads.

    Args:
        kernels: The functions for the weight's dtype.
        weight: (K, N) on the CPU, of any strides; K must be a multiple of ``kernels.num_rows``.

    Attributes:
        shape: (K, N).
    """

    def __init__(self, kernels: Kernels, weight: Tensor) -> None:
        num_rows, num_columns = weight.shape
        assert num_rows % kernels.num_rows == 0 and weight.device.type == "cpu", weight.shape
        self._multiply, self.shape = kernels.multiply, weight.shape
        self._prepacked = weight.new_empty(-(-num_columns // _WIDEST_PANEL) * _WIDEST_PANEL * num_rows)
        kernels.pack(num_rows, num_columns, weight.data_ptr(), *weight.stride(), self._prepacked.data_ptr())
        # The public torch.profiler.record_function is 20 times as slow when no profiler is active.
        self._recorded = torch._C._profiler._RecordFunctionFast(PREPACKED_MATMUL)

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """Compute ``out`` (n, N) = ``first`` (n, K) @ weight, rounded to the storage dtype."""
        return self._run(out, first, False)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """Compute ``out`` += ``first`` @ weight, rounded to the storage dtype once."""
        return self._run(out, first, True)

    @property
    def multiply_address(self) -> int:
        """The address of the function that multiplies, for C code that calls it."""
        return native.address(self._multiply)

    def pointer(self, storage: torch.dtype) -> int:
        """Return the address of the prepacked copy, whose dtype must be ``storage``."""
        assert self._prepacked.dtype == storage
        return self._prepacked.data_ptr()

    def _run(self, out: Tensor, first: Tensor, add: bool) -> Tensor:
        num_terms, num_columns = self.shape
        dtype = self._prepacked.dtype
        assert out.shape == (len(first), num_columns) and first.shape[1] == num_terms, (out.shape, first.shape)
        assert out.dtype == first.dtype == dtype and out.is_contiguous() and first.is_contiguous()
        with self._recorded:
            self._multiply(
                len(out), num_terms, num_columns, first.data_ptr(), self._prepacked.data_ptr(), out.data_ptr(), add
            )
        return out


def kernels(storage: torch.dtype) -> Kernels | None:
    """Return the functions of prepacked.c for a storage dtype, or None if this machine or dtype has none."""
    library = native.load(PREPACKED_SOURCE)
    return None if library is None else _kernels(library).get(storage)


@functools.lru_cache(maxsize=4)
def _kernels(library: ctypes.CDLL) -> dict[torch.dtype, Kernels]:
    size, pointer = ctypes.c_long, ctypes.c_void_p
    found = {}
    for storage, kind, num_rows in ((torch.float32, "f", 1), (torch.bfloat16, "b", 2)):
        with contextlib.suppress(AttributeError):  # the processor has no bfloat16 instructions
            pack, multiply, tiles = getattr(library, f"pack_{kind}"), getattr(library, f"multiply_{kind}"), False
            with contextlib.suppress(AttributeError):  # the processor has no AMX
                if kind == "b" and library.permit_t():
                    multiply, tiles = library.multiply_t, True
            pack.argtypes = [size, size, pointer, size, size, pointer]
            multiply.argtypes = [size, size, size, pointer, pointer, pointer, ctypes.c_int]
            pack.restype = multiply.restype = None
            found[storage] = Kernels(pack, multiply, num_rows, tiles)
    return found


@dataclass(frozen=True)
class Range:
    """Numbers of rows, from ``first`` to ``last`` inclusive, for which products use prepacked.c instead of torch."""

    first: int
    last: int

    def __contains__(self, num_rows: int) -> bool:
        return self.first <= num_rows <= self.last


def rows_prepacked(storage: torch.dtype, strided: bool) -> Range:
    """Return the numbers of rows for which products use prepacked.c on this processor.

    Args:
        storage: The dtype of both factors.
        strided: Whether the weight is a transposed view, by which torch multiplies more slowly.
    """
    if kernels(storage) is None:
        return Range(1, 0)
    if not has_tiles():
        return Range(1, UNLIMITED)
    if storage == torch.bfloat16:
        return Range(1, _MAX_ROWS_AMX_BF16)
    return Range(*_ROWS_AMX_FP32) if strided else Range(1, 0)


def has_tiles() -> bool:
    """Whether prepacked.c multiplies bfloat16 by AMX tiles."""
    found = kernels(torch.bfloat16)
    return found is not None and found.tiles


def describe(precision: str) -> str:
    """Return a log line on which kernels multiply by the recurrent weights on this machine."""
    storage = torch.bfloat16 if precision == "bf16" else torch.float32
    native_kernel = "AMX tiles" if precision == "bf16" and has_tiles() else "prepacked.c"
    parts = []
    for direction, strided in (("forward", True), ("backward", False)):
        rows = rows_prepacked(storage, strided)
        if rows.last < rows.first:
            parts.append(f"{direction} by torch")
        elif rows.last == UNLIMITED:
            parts.append(f"{direction} by {native_kernel}")
        else:
            parts.append(f"{direction} by {native_kernel} for {rows.first} to {rows.last} rows, else by torch")
    return f"products of the LSTM's steps, {precision}: {'; '.join(parts)}"
