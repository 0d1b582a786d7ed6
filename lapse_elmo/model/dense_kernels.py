"""Updates of dense parameters and sums of squares in C: the bindings of dense_kernels.c."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lapse_elmo import native

DENSE_SOURCE = Path(__file__).parent / "dense_kernels.c"


class DenseKernels:
    """The functions of dense_kernels.c, for contiguous float32 tensors on the CPU that have equally many elements.

    Before a pointer is passed to C, its tensor is checked. The fallbacks in optimizers.py round differently in the last
    bit.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        self._squares, self._adam, self._adagrad = library.sum_of_squares, library.adam, library.adagrad
        self._squares.argtypes, self._squares.restype = [size, pointer], ctypes.c_double
        self._adam.argtypes, self._adam.restype = [size, *[pointer] * 4, *[number] * 7], None
        self._adagrad.argtypes, self._adagrad.restype = [size, *[pointer] * 3, *[number] * 3], None

    def sum_of_squares(self, values: Tensor) -> float:
        """Return the sum of squares, summed in float64."""
        return float(self._squares(*_arguments(values)))

    def adam(
        self, tensors: Sequence[Tensor], scale: float, rate: float, biases: tuple[float, float], epsilon: float,
        decays: tuple[float, float],
    ) -> None:
        """Update weights and moments in place.

        Args:
            tensors: Weights, gradients, first and second moments.
            scale: Factor on the gradients.
            rate: The step size.
            biases: What the moments are to be divided by, since they start at 0.
            epsilon: Added to the root of the second moments.
            decays: Of the moments, per step.
        """
        assert len(tensors) == 4
        self._adam(*_arguments(*tensors), scale, rate, biases[0], math.sqrt(biases[1]), epsilon, *decays)

    def adagrad(self, tensors: Sequence[Tensor], scale: float, rate: float, epsilon: float) -> None:
        """Update weights and accumulators in place; ``tensors`` are weights, gradients and accumulators."""
        assert len(tensors) == 3
        self._adagrad(*_arguments(*tensors), scale, rate, epsilon)


def dense_kernels(*tensors: Tensor) -> DenseKernels | None:
    """Return the kernels if they can be used with these tensors, else None."""
    fits = all(t.device.type == "cpu" and t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
    library = native.load(DENSE_SOURCE) if fits else None
    return None if library is None else _kernels(library)


@functools.lru_cache(maxsize=4)
def _kernels(library: ctypes.CDLL) -> DenseKernels:
    return DenseKernels(library)


def _arguments(*tensors: Tensor) -> list[int]:
    """Return the number of elements, which is that of each tensor, and the addresses."""
    size = tensors[0].numel()
    for tensor in tensors:
        fits = tensor.numel() == size and tensor.dtype is torch.float32 and tensor.device.type == "cpu"
        assert fits and tensor.is_contiguous(), f"{tuple(tensor.shape)} {tensor.dtype}, expected {size} float32 numbers"
    return [size, *(tensor.data_ptr() for tensor in tensors)]
