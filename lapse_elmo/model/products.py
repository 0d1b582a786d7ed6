"""Matrix products in float32 or in bfloat16, with sums in float32 either way.

``bf16`` rounds what goes into a product to bfloat16, whose significand has 8 bits, and keeps gates, exposed cells and
projected states in it; cells, sums and the parameters themselves stay float32. Processors without bfloat16 products
(before AMX or AVX512_BF16) would take hundreds of times as long for them, so there the rounded factors are multiplied
in float32: the same results but for the order of sums, at the speed of float32.

The steps of an LSTM multiply few rows by the same weights again and again: a :class:`Factor` is prepared for that once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo import native

PACKED_SOURCE = Path(__file__).parent / "packed.c"
PACKED_PRODUCT = "packed product"  # its name in a profile
PRECISIONS = ("fp32", "bf16")
_WIDEST_PANEL = 32  # columns that packed.c packs together
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith(("flags", "Features")):
                return not _BF16_FEATURES.isdisjoint(line.split())
    return False


class Factor(Protocol):
    """A (K, N) matrix as the second factor of products with few rows."""

    def into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` (n, N) = ``first`` (n, K) @ this, rounded to the storage; both contiguous."""

    def add_into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` += ``first`` @ this, rounded to the storage once."""


@dataclass(frozen=True)
class Products:
    """Products of matrices whose elements are stored in ``storage``.

    :param emulated: multiply bfloat16 in float32.
    """

    storage: torch.dtype
    emulated: bool = False

    @classmethod
    def of(cls, precision: str, like: Tensor) -> Products:
        """For tensors such as ``like``; float64 is never narrowed."""
        if precision == "fp32" or like.dtype == torch.float64:
            return cls(like.dtype)
        return cls(torch.bfloat16, emulated=like.device.type == "cpu" and not cpu_multiplies_bf16())

    def operand(self, values: Tensor) -> Tensor:
        """``values`` as they go into a product once."""
        return values.to(self.storage)

    def weight(self, values: Tensor) -> Tensor:
        """``values`` as they go into more than one product."""
        rounded = values.to(self.storage)
        return rounded.float() if self.emulated else rounded

    def into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """``out`` = first @ second, rounded to the storage."""
        if self.emulated:
            return out.copy_(torch.mm(first.float(), second.float()))
        return torch.mm(first, second, out=out)

    def add_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """``out`` += first @ second, rounded to the storage of ``out`` once."""
        if self.emulated:
            return out.add_(torch.mm(first.float(), second.float()))
        if out.dtype != first.dtype:
            return out.add_(torch.mm(first, second))
        return out.addmm_(first, second)

    def new(self, first: Tensor, second: Tensor) -> Tensor:
        """first @ second in the storage dtype."""
        return self.into(first.new_empty(first.shape[0], second.shape[1], dtype=self.storage), first, second)

    def factor(self, values: Tensor) -> Factor:
        """``values`` (K, N) as the second factor of many products with few rows."""
        kernels = None
        if values.device.type == "cpu" and not self.emulated and (library := native.load(PACKED_SOURCE)) is not None:
            kernels = _kernels(library).get(self.storage)
        if kernels is None or len(values) % kernels.num_rows:
            return TorchFactor(self, self.weight(values))
        return PackedFactor(kernels, self.operand(values))


class TorchFactor:
    """By torch, on any device."""

    def __init__(self, products: Products, second: Tensor) -> None:
        self._products, self._second = products, second

    def into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._products.into(out, first, self._second)

    def add_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._products.add_into(out, first, self._second)


@dataclass(frozen=True)
class _Kernels:
    """The functions of packed.c for one storage dtype, which take ``num_rows`` rows of the matrix at a time."""

    pack: Callable[..., None]
    multiply: Callable[..., None]
    num_rows: int


class PackedFactor:
    """By packed.c, which has the matrix in the order in which it reads it: up to six times as fast as torch, which
    brings it into such an order in every product."""

    def __init__(self, kernels: _Kernels, second: Tensor) -> None:
        self._multiply, self._shape = kernels.multiply, second.shape
        num_rows, num_columns = second.shape
        self._packed = second.new_empty(-(-num_columns // _WIDEST_PANEL) * _WIDEST_PANEL * num_rows)
        kernels.pack(num_rows, num_columns, second.data_ptr(), *second.stride(), self._packed.data_ptr())
        # torch.profiler.record_function, which does the same, takes 20 times as long where nothing is recorded.
        self._recorded = torch._C._profiler._RecordFunctionFast(PACKED_PRODUCT)

    def into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._run(out, first, False)

    def add_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._run(out, first, True)

    def _run(self, out: Tensor, first: Tensor, add: bool) -> Tensor:
        with self._recorded:
            self._multiply(len(out), *self._shape, first.data_ptr(), self._packed.data_ptr(), out.data_ptr(), add)
        return out


@functools.lru_cache(maxsize=4)
def _kernels(library: ctypes.CDLL) -> dict[torch.dtype, _Kernels]:
    """What packed.c has for this processor, by storage dtype."""
    found = {}
    for storage, kind, num_rows in ((torch.float32, "f", 1), (torch.bfloat16, "b", 2)):
        with contextlib.suppress(AttributeError):  # no bfloat16 on this processor
            pack, multiply = getattr(library, f"pack_{kind}"), getattr(library, f"multiply_{kind}")
            size, pointer = ctypes.c_long, ctypes.c_void_p
            pack.argtypes = [size, size, pointer, size, size, pointer]
            multiply.argtypes = [size, size, size, pointer, pointer, pointer, ctypes.c_int]
            pack.restype = multiply.restype = None
            found[storage] = _Kernels(pack, multiply, num_rows)
    return found
