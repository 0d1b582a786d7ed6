"""Matrix products in float32 or bfloat16, with accumulation in float32 either way.

``bf16`` rounds the factors of products to bfloat16 (8 significant bits) and stores gates, cell outputs and hidden
states in bfloat16. Cells, sums and the parameters stay float32. On processors without bfloat16 instructions
(AVX512_BF16 or AMX), bfloat16 products would be hundreds of times slower. There, the rounded factors are multiplied in
float32, which gives the same results up to the order of summation, at the speed of float32.

The steps of an LSTM multiply few rows by the same weight again and again, so a :class:`Weight` is prepared once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.model.packed import UNLIMITED, PrepackedWeight, Range, kernels, rows_packed

PRECISIONS = ("fp32", "bf16")
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_multiplies_bf16() -> bool:
    """Return whether this processor has instructions for bfloat16 products."""
    return not _BF16_FEATURES.isdisjoint(native.processor_features())


class Weight(Protocol):
    """A (K, N) matrix, prepared as the second factor of many products with few rows."""

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """Compute ``out`` (n, N) = ``first`` (n, K) @ self, rounded to the storage dtype; both tensors contiguous.

        Returns:
            ``out``.
        """

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        """Compute ``out`` += ``first`` @ self, rounded to the storage dtype once; returns ``out``."""


@dataclass(frozen=True)
class Matmul:
    """Matrix products with factors and results in one storage dtype.

    Attributes:
        storage: The dtype.
        emulated: Whether bfloat16 factors are multiplied in float32.
    """

    storage: torch.dtype
    emulated: bool = False

    @classmethod
    def of(cls, precision: str, like: Tensor) -> Matmul:
        """Return the products of a precision for tensors with the dtype and device of ``like``.

        Args:
            precision: ``fp32`` stores in the dtype of ``like``, ``bf16`` in bfloat16.
            like: A float64 tensor is never rounded to a narrower dtype, whatever the precision.
        """
        if precision == "fp32" or like.dtype == torch.float64:
            return cls(like.dtype)
        return cls(torch.bfloat16, emulated=like.device.type == "cpu" and not cpu_multiplies_bf16())

    def cast(self, values: Tensor) -> Tensor:
        """Return ``values`` in the storage dtype, for use in one product."""
        return values.to(self.storage)

    def cast_weight(self, values: Tensor) -> Tensor:
        """Return ``values`` rounded to the storage dtype, for use in several products.

        The result is float32 if products are emulated, so that it need not be converted again for each of them.
        """
        rounded = values.to(self.storage)
        return rounded.float() if self.emulated else rounded

    def mm_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Compute ``out`` = first @ second, rounded to the storage dtype; returns ``out``."""
        if self.emulated:
            return out.copy_(torch.mm(first.float(), second.float()))
        return torch.mm(first, second, out=out)

    def addmm_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Compute ``out`` += first @ second, rounded to the dtype of ``out`` once; returns ``out``."""
        if self.emulated:
            return out.add_(torch.mm(first.float(), second.float()))
        if out.dtype != first.dtype:
            return out.add_(torch.mm(first, second))
        return out.addmm_(first, second)

    def mm(self, first: Tensor, second: Tensor) -> Tensor:
        """Return first @ second in the storage dtype."""
        return self.mm_into(first.new_empty(first.shape[0], second.shape[1], dtype=self.storage), first, second)

    def prepare(self, values: Tensor, sizes: Sequence[int] = ()) -> Weight:
        """Prepare a matrix as the second factor of many products with few rows.

        Args:
            values: (K, N), of any strides.
            sizes: The numbers of rows of the products that will follow, if known.
        """
        native_kernels = None
        if values.device.type == "cpu" and not self.emulated:
            native_kernels = kernels(self.storage)
        if native_kernels is None or values.shape[0] % native_kernels.num_rows:
            return TorchWeight(self, self.cast_weight(values))
        rows, second = rows_packed(self.storage, strided=values.stride(1) != 1), self.cast(values)
        fewest, most = (min(sizes), max(sizes)) if sizes else (1, UNLIMITED)
        if most < rows.first or fewest > rows.last:
            return TorchWeight(self, second)
        packed = PrepackedWeight(native_kernels, second)
        return packed if fewest in rows and most in rows else HybridWeight(packed, TorchWeight(self, second), rows)


class TorchWeight:
    """A weight multiplied by torch, on any device."""

    def __init__(self, matmul: Matmul, second: Tensor) -> None:
        self._matmul, self._second = matmul, second

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._matmul.mm_into(out, first, self._second)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return self._matmul.addmm_into(out, first, self._second)


@dataclass(frozen=True)
class HybridWeight:
    """A weight multiplied by packed.c if the number of rows is in ``rows``, otherwise by torch."""

    packed: PrepackedWeight
    by_torch: TorchWeight
    rows: Range

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.packed if len(out) in self.rows else self.by_torch).mm_into(out, first)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.packed if len(out) in self.rows else self.by_torch).addmm_into(out, first)
