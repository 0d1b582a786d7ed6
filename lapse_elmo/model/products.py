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
from lapse_elmo.model.prepacked import UNLIMITED, PrepackedWeight, Range, kernels, rows_prepacked

PRECISIONS = ("fp32", "bf16")
# A product of at most _MOST_WHOLE_ROWS rows is not split if their number is a multiple of WHOLE_ROWS.
WHOLE_ROWS, _MOST_WHOLE_ROWS = 16, 256
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
            return out.copy_(self._mm(first.float(), second.float()))
        return self._mm(first, second, out)

    def _mm(self, first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
        """Return first @ second, in the dtype of the factors, of which the first one has a varying number of rows."""
        parts = split_rows(len(first)) if first.device.type == "cpu" else None
        if parts is None:
            return torch.mm(first, second, out=out)
        if out is None:
            out = first.new_empty(len(first), second.shape[1])
        for rows in (slice(parts.main), slice(len(first) - parts.padded_rest, None)):
            torch.mm(first[rows], second, out=out[rows])  # the parts may overlap
        return out

    def sum_outer(self, first: Tensor, second: Tensor) -> Tensor:
        """Return first.t() @ second in the storage dtype: the sum of the outer products of corresponding rows.

        Args:
            first: (n, N) in the storage dtype.
            second: (n, K) in the storage dtype.
        """
        if self.emulated:
            return _sum_outer(first.float(), second.float()).to(self.storage)
        return _sum_outer(first, second)

    def add_outer_into(self, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Compute ``out`` += first.t() @ second, see :meth:`sum_outer`, rounded to the dtype of ``out``."""
        if self.emulated:
            return out.add_(_sum_outer(first.float(), second.float()))
        if out.dtype != first.dtype:
            return out.add_(_sum_outer(first, second))
        return _sum_outer(first, second, out)

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
        rows, second = rows_prepacked(self.storage, strided=values.stride(1) != 1), self.cast(values)
        fewest, most = (min(sizes), max(sizes)) if sizes else (1, UNLIMITED)
        if most < rows.first or fewest > rows.last:
            return TorchWeight(self, second)
        prepacked = PrepackedWeight(native_kernels, second)
        if fewest in rows and most in rows:
            return prepacked
        return HybridWeight(prepacked, TorchWeight(self, second), rows)


@dataclass(frozen=True)
class RowSplit:
    """A number of rows as ``main`` rows and a rest, which is padded to ``padded_rest`` rows."""

    main: int
    rest: int
    padded_rest: int


def split_rows(num_rows: int) -> RowSplit | None:
    """Split a product over rows in two, so that few distinct shapes occur; None if it needs no split.

    oneDNN generates code for each shape, which takes half a millisecond and, for up to 1,024 shapes, half a megabyte
    each; and the number of tokens differs from step to step. Both parts have 4, 5, 6 or 7 times a power of two rows, or
    fewer than 16, and together at most 1/16 more than ``num_rows``. Multiples of 16 up to 256 need no split: there are
    few of them.
    """
    if num_rows < WHOLE_ROWS or (num_rows <= _MOST_WHOLE_ROWS and num_rows % WHOLE_ROWS == 0):
        return None
    unit = 1 << (num_rows.bit_length() - 3)
    main = num_rows // unit * unit
    rest, small_unit = num_rows - main, max(unit // 4, 1)
    return RowSplit(main, rest, -(-rest // small_unit) * small_unit) if rest else None


def _sum_outer(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Return first.t() @ second, added to ``out`` if it is given."""
    parts = split_rows(len(first)) if first.device.type == "cpu" else None
    whole = slice(None if parts is None else parts.main)
    factors = first[whole].t(), second[whole]
    out = torch.mm(*factors) if out is None else out.addmm_(*factors)
    if parts is not None:
        padding = (0, 0, 0, parts.padded_rest - parts.rest)
        first, second = (torch.nn.functional.pad(factor[parts.main :], padding) for factor in (first, second))
        out.addmm_(first.t(), second)
    return out


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
    """A weight multiplied by prepacked.c if the number of rows is in ``rows``, otherwise by torch."""

    prepacked: PrepackedWeight
    by_torch: TorchWeight
    rows: Range

    def mm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.prepacked if len(out) in self.rows else self.by_torch).mm_into(out, first)

    def addmm_into(self, out: Tensor, first: Tensor) -> Tensor:
        return (self.prepacked if len(out) in self.rows else self.by_torch).addmm_into(out, first)
