"""Matrix products in float32 or in bfloat16, with sums in float32 either way.

``bf16`` rounds what goes into a product to bfloat16, whose significand has 8 bits, and keeps gates, cell outputs and
projected states in it; cells, sums and the parameters themselves stay float32. Processors without bfloat16 products
(before AMX or AVX512_BF16) would take hundreds of times as long for them, so there the rounded factors are multiplied
in float32: the same results but for the order of sums, at the speed of float32.

The steps of an LSTM multiply few rows by the same weights again and again: a :class:`Weight` is prepared for that once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model.packed import ANY_NUMBER, PrepackedWeight, Range, kernels, rows_packed

PRECISIONS = ("fp32", "bf16")
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return not _BF16_FEATURES.isdisjoint(native.processor_features())


class Weight(Protocol):
    """A (K, N) matrix as the second factor of products with few rows."""

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` (n, N) = ``first`` (n, K) @ this, rounded to the storage; both contiguous."""

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """``out`` += ``first`` @ this, rounded to the storage once."""


@dataclass(frozen=True)
class Matmul:
    """Products of matrices whose elements are stored in ``storage``.

    Args:
        emulated: Multiply bfloat16 in float32.
    """

    storage: torch.dtype
    emulated: bool = False

    @classmethod
    def of(cls, precision: str, like: Tensor) -> Matmul:
        """For tensors such as ``like``; float64 is never narrowed."""
        if precision == "fp32" or like.dtype == torch.float64:
            return cls(like.dtype)
        return cls(torch.bfloat16, emulated=like.device.type == "cpu" and not cpu_multiplies_bf16())

    def cast(self, values: Tensor) -> Tensor:
        """``values`` as they go into a product once."""
        return values.to(self.storage)

    def cast_weight(self, values: Tensor) -> Tensor:
        """``values`` as they go into more than one product."""
        rounded = values.to(self.storage)
        return rounded.float() if self.emulated else rounded

    def mm_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """``out`` = first @ second, rounded to the storage."""
        if self.emulated:
            return out.copy_(torch.mm(first.float(), second.float()))
        return torch.mm(first, second, out=out)

    def addmm_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """``out`` += first @ second, rounded to the storage of ``out`` once."""
        if self.emulated:
            return out.add_(torch.mm(first.float(), second.float()))
        if out.dtype != first.dtype:
            return out.add_(torch.mm(first, second))
        return out.addmm_(first, second)

    def mm(self, first: Tensor, second: Tensor) -> Tensor:
        """Return first @ second in the storage dtype."""
        return self.mm_into(first.new_empty(first.shape[0], second.shape[1], dtype=self.storage), first, second)

    def prepare(self, values: Tensor, sizes: Sequence[int] = ()) -> Weight:
        """``values`` (K, N) as the second factor of many products with few rows.

        Args:
            sizes: The numbers of rows of the products to come, where they are known.
        """
        found = None
        if values.device.type == "cpu" and not self.emulated:
            found = kernels(self.storage)
        if found is None or values.shape[0] % found.num_rows:
            return TorchWeight(self, self.cast_weight(values))
        rows, second = rows_packed(self.storage, strided=values.stride(1) != 1), self.cast(values)
        fewest, most = (min(sizes), max(sizes)) if sizes else (1, ANY_NUMBER)
        if most < rows.first or fewest > rows.last:
            return TorchWeight(self, second)
        packed = PrepackedWeight(found, second)
        return packed if fewest in rows and most in rows else HybridWeight(packed, TorchWeight(self, second), rows)


class TorchWeight:
    """By torch, on any device."""

    def __init__(self, matmul: Matmul, second: Tensor) -> None:
        self._matmul, self._second = matmul, second

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._matmul.mm_into(out, first, self._second)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._matmul.addmm_into(out, first, self._second)


@dataclass(frozen=True)
class HybridWeight:
    """By packed.c where the number of rows is in ``rows``, else by torch."""

    packed: PrepackedWeight
    by_torch: TorchWeight
    rows: Range

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.packed if len(out) in self.rows else self.by_torch).mm_into(out, first)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.packed if len(out) in self.rows else self.by_torch).addmm_into(out, first)
