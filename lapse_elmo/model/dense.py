"""The passes over memory of a step of the dense parameters: in C (dense.c), or in torch with the same bits.

torch.sqrt calls MKL's, which does not round correctly and so differs from processor to processor. Both forms for
float32 on the CPU therefore use the processor's square root, and differ from torch.optim in its last bit.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lapse_elmo import native

SOURCE = Path(__file__).parent / "dense.c"
BETAS = (0.9, 0.999)  # Adam's; those of torch.optim.Adam
_BLOCK_SIZE = 1 << 17  # elements; a core's cache holds blocks of several tensors at once
_CHUNK = 1 << 15  # elements for each sum of squares, as in dense.c
_RULES = {"adam": 0, "adagrad": 1, "sgd": 2}  # as in dense.c


@dataclass(frozen=True)
class Rates:
    """The numbers of one step.

    Attributes:
        scale: Factor of the gradients.
        learning_rate: The step size; Adam's is divided by the bias of its first moments.
        epsilon: Added to square roots.
        root: The square root of the bias of Adam's second moments.
        square: Factor of the gradients' squares in Adam's second moments and in Adagrad's accumulators.
    """

    scale: float
    learning_rate: float
    epsilon: float
    root: float = 1.0
    square: float = 1.0


def iter_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return an iterator over corresponding flat blocks of contiguous tensors with equally many elements.

    A chain of elementwise operations on one block at a time keeps the intermediate results in the cache. Its result is
    bitwise the same as on whole tensors. On a GPU there is only one block.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    return zip(*(f.split(_BLOCK_SIZE if f.device.type == "cpu" else max(f.numel(), 1)) for f in flat), strict=True)


def sum_of_squares(tensor: Tensor) -> float:
    """Return the sum of squares, summed in float64."""
    tensor = tensor.detach().contiguous()
    library = _library(tensor)
    if library is None:
        return sum(float(block.square().sum(dtype=torch.float64)) for (block,) in iter_blocks(tensor))
    sums = _sums(tensor.numel())
    library.dense_squares(tensor.numel(), tensor.data_ptr(), sums.ctypes.data)
    return float(sums.sum())


def add_up(gradients: Tensor, divisor: int, squares: bool, mean_square: bool) -> tuple[float, float]:
    """Add up rows of numbers into the first one, in their order, and divide the sum.

    Args:
        gradients: (ranks, n) float32 on the CPU; each row is contiguous.
        divisor: What the sum is divided by.
        squares: Whether the first result is wanted.
        mean_square: Whether the second result is wanted.

    Returns:
        The sum of the squares of all numbers, and that of the results; 0 for one that is not wanted.
    """
    ranks, n = gradients.shape
    total, *others = gradients
    library = _library(total)
    if library is None:
        before = sum(map(sum_of_squares, gradients)) if squares else 0.0
        for sums, *more in iter_blocks(total, *others):
            for other in more:
                sums.add_(other)
        total.div_(divisor)
        return before, sum_of_squares(total) if mean_square else 0.0
    assert ranks == 1 or gradients.stride(0) >= n
    wanted = [_sums(n) if which else None for which in (squares, mean_square)]
    pointers = [None if of_chunks is None else of_chunks.ctypes.data for of_chunks in wanted]
    library.dense_add_up(n, ranks, gradients.stride(0), total.data_ptr(), divisor, *pointers)
    before, after = (0.0 if of_chunks is None else float(of_chunks.sum()) for of_chunks in wanted)
    return before, after


def update(kind: str, weights: Tensor, gradient: Tensor, state: Sequence[Tensor], rates: Rates) -> None:
    """Update contiguous ``weights`` and the ``state`` of the rule ``kind``, in place."""
    library = _library(weights)
    if library is None:
        for some, block, *states in iter_blocks(weights, gradient, *state):
            _TWINS[kind](some, block if rates.scale == 1.0 else block * rates.scale, states, rates)
        return
    tensors = weights, gradient, *state
    fit = all(t.dtype is torch.float32 and t.is_contiguous() and t.numel() == weights.numel() for t in tensors)
    assert fit and len(state) == (2, 1, 0)[_RULES[kind]], [(t.dtype, t.shape, t.stride()) for t in tensors]
    pointers = [tensor.data_ptr() for tensor in state] + [None, None]
    share = (1.0 - BETAS[1] if kind == "adam" else 1.0) * rates.square
    # Held by a name during the call: other threads run meanwhile, and would reuse the memory of a temporary array.
    numbers = np.array(
        [rates.scale, -rates.learning_rate, rates.epsilon, 1.0 - BETAS[0], BETAS[1], share, rates.root], np.float32
    )
    library.dense_step(
        weights.numel(), _RULES[kind], gradient.data_ptr(), weights.data_ptr(), *pointers[:2], numbers.ctypes.data
    )


# The same operations as in torch.optim: adding a separate delta would round once more.


def _adam(weights: Tensor, gradient: Tensor, state: Sequence[Tensor], rates: Rates) -> None:
    first, second = state
    first.lerp_(gradient, 1.0 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=(1.0 - BETAS[1]) * rates.square)
    size = _root(second).div_(rates.root).add_(rates.epsilon)
    weights.addcdiv_(first, size, value=-rates.learning_rate)


def _adagrad(weights: Tensor, gradient: Tensor, state: Sequence[Tensor], rates: Rates) -> None:
    (squares,) = state
    squares.addcmul_(gradient, gradient, value=rates.square)
    weights.addcdiv_(gradient, _root(squares).add_(rates.epsilon), value=-rates.learning_rate)


def _sgd(weights: Tensor, gradient: Tensor, state: Sequence[Tensor], rates: Rates) -> None:
    weights.add_(gradient, alpha=-rates.learning_rate)


_TWINS = {"adam": _adam, "adagrad": _adagrad, "sgd": _sgd}


def _root(values: Tensor) -> Tensor:
    """Return a new tensor of the square roots: the processor's for float32."""
    if values.device.type == "cpu" and values.dtype is torch.float32:
        return torch.from_numpy(np.sqrt(values.detach().numpy()))
    return values.sqrt()


def _sums(n: int) -> np.ndarray:
    """Return memory for one sum per chunk of n numbers."""
    return np.empty(math.ceil(n / _CHUNK))


def _library(tensor: Tensor) -> ctypes.CDLL | None:
    """Return the functions of dense.c if they take this tensor and are available."""
    if tensor.device.type != "cpu" or tensor.dtype is not torch.float32 or not native.enabled():
        return None
    return _declared()


@functools.cache
def _declared() -> ctypes.CDLL | None:
    library = native.load(SOURCE)
    if library is not None:
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        for name, types in {
            "dense_squares": [number, pointer, pointer],
            "dense_add_up": [number, number, number, pointer, number, pointer, pointer],
            "dense_step": [number, number, *[pointer] * 5],
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
    return library
