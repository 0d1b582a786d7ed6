"""The steps of an LSTM layer in one call of C: the bindings of lstm_steps.c, and when they are used.

They are used on a CPU whose kernels in C compute everything in a step. Elsewhere, lstm_pass.py calls the kernels of
each step from Python, with bitwise the same results.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.autograd import profiler

from lapse_elmo import native
from lapse_elmo.model.pointwise import NativePointwise, Pointwise, pointer, pointer_to_rows
from lapse_elmo.model.prepacked import PrepackedWeight
from lapse_elmo.model.products import Weight

STEPS_SOURCE = Path(__file__).parent / "lstm_steps.c"


@dataclass(frozen=True)
class Layer:
    """What the steps of one layer in one direction share.

    Attributes:
        sizes: Number of rows of each step, not increasing; N in total, B in the first step.
        initial_cells: (B, C) wide; None for zero.
        mask: (B, D) wide dropout mask; None for no dropout.
        cell_clip: Largest magnitude of a cell; infinite for no clipping.
        projection_clip: Largest magnitude of a hidden state; infinite for no clipping.
    """

    sizes: list[int]
    initial_cells: Tensor | None
    mask: Tensor | None
    cell_clip: float
    projection_clip: float


class NativeSteps:
    """All steps of a layer by lstm_steps.c. Before a pointer is passed to C, its tensor is checked.

    Args:
        functions: The functions of lstm_steps.c.
        kernels: The pointwise kernels.
        recurrent: The recurrent weight, (D, 4C) in the forward pass and (4C, D) in the backward pass.
        projection: The projection, (C, D) in the forward pass and (D, C) in the backward pass.
    """

    def __init__(
        self, functions: dict[str, Callable[..., None]], kernels: NativePointwise, recurrent: PrepackedWeight,
        projection: PrepackedWeight,
    ) -> None:
        self._functions, self._kernels = functions, kernels
        self._recurrent, self._projection = recurrent, projection

    def forward(
        self, layer: Layer, gates: Tensor, bias: Tensor, initial_hidden: Tensor | None, cells: Tensor, hidden: Tensor,
        cell_output: Tensor,
    ) -> None:
        """Run the forward pass.

        Args:
            layer: What all steps share.
            gates: (N, 4C), the input's part of the pre-activations; replaced by the activated gates.
            bias: (4C,) wide.
            initial_hidden: (B, D); None for zero.
            cells: (N, C) wide; output.
            hidden: (N, D); output.
            cell_output: (B, C), overwritten.
        """
        kernels, sizes = self._kernels, layer.sizes
        num_rows, size, width, most = *hidden.shape, cells.shape[1], max(sizes, default=0)
        storage, wide = kernels.storage, kernels.wide
        assert sum(sizes) == num_rows and sizes == sorted(sizes, reverse=True)
        assert self._recurrent.shape == (size, 4 * width) and self._projection.shape == (width, size)
        self._functions["forward"](
            len(sizes), (ctypes.c_long * len(sizes))(*sizes), size, width, storage.itemsize, wide.itemsize,
            self._recurrent.multiply_address, kernels.address("lstm_cell_forward"),
            kernels.address("lstm_clip_forward"), pointer(gates, (num_rows, 4 * width), storage),
            self._recurrent.pointer(storage), pointer(bias, (4 * width,), wide), self._projection.pointer(storage),
            pointer_to_rows(initial_hidden, (most, size), storage),
            pointer_to_rows(layer.initial_cells, (most, width), wide),
            pointer_to_rows(layer.mask, (most, size), wide), pointer(cells, (num_rows, width), wide),
            pointer(hidden, (num_rows, size), storage), pointer_to_rows(cell_output, (most, width), storage),
            layer.cell_clip, layer.projection_clip,
        )

    def backward(
        self, layer: Layer, gates: Tensor, cells: Tensor, hidden: Tensor, d_hidden: Tensor, cell_output: Tensor,
        d_recurrent: Tensor, d_cells: Tensor, d_cell_output: Tensor,
    ) -> None:
        """Run the backward pass.

        Args:
            layer: What all steps share.
            gates: (N, 4C) activated gates; replaced by the gradients of the pre-activations.
            cells: (N, C) wide.
            hidden: (N, D).
            d_hidden: (N, D) gradient from the layer above; replaced by the gradient before clipping and dropout.
            cell_output: (N, C), output: o * tanh(cells); may be ``cells`` itself.
            d_recurrent: (B, D) zeros, overwritten.
            d_cells: (B, C) wide zeros, overwritten.
            d_cell_output: (B, C), overwritten.
        """
        kernels, sizes = self._kernels, layer.sizes
        num_rows, size, width, most = *hidden.shape, cells.shape[1], max(sizes, default=0)
        storage, wide = kernels.storage, kernels.wide
        assert sum(sizes) == num_rows and sizes == sorted(sizes, reverse=True)
        assert self._recurrent.shape == (4 * width, size) and self._projection.shape == (size, width)
        self._functions["backward"](
            len(sizes), (ctypes.c_long * len(sizes))(*sizes), num_rows, size, width, storage.itemsize, wide.itemsize,
            self._recurrent.multiply_address, kernels.address("lstm_cell_backward"),
            kernels.address("lstm_clip_backward"), pointer(gates, (num_rows, 4 * width), storage),
            self._recurrent.pointer(storage), self._projection.pointer(storage),
            pointer_to_rows(layer.initial_cells, (most, width), wide), pointer_to_rows(layer.mask, (most, size), wide),
            pointer(cells, (num_rows, width), wide), pointer(hidden, (num_rows, size), storage),
            pointer(d_hidden, (num_rows, size), storage), pointer(cell_output, (num_rows, width), storage),
            pointer_to_rows(d_recurrent, (most, size), storage), pointer_to_rows(d_cells, (most, width), wide),
            pointer_to_rows(d_cell_output, (most, width), storage), layer.cell_clip, layer.projection_clip,
        )


def native_steps(kernels: Pointwise, recurrent: Weight, projection: Weight) -> NativeSteps | None:
    """Return the steps in C; None if a kernel of a step is not in C, or while a profiler records.

    A profile separates products from the rest of a step, so its steps are called from Python.
    """
    if not (isinstance(kernels, NativePointwise) and not profiler._is_profiler_enabled):
        return None
    if not (isinstance(recurrent, PrepackedWeight) and isinstance(projection, PrepackedWeight)):
        return None
    library = native.load(STEPS_SOURCE)
    return None if library is None else NativeSteps(_functions(library), kernels, recurrent, projection)


@functools.lru_cache(maxsize=4)
def _functions(library: ctypes.CDLL) -> dict[str, Callable[..., None]]:
    size, address, clip = ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    # sizes; the addresses of the three kernels and of the tensors; the two clip values
    types = {
        "forward": [size, address, *[size] * 4, *[address] * 13, clip, clip],
        "backward": [size, address, *[size] * 5, *[address] * 15, clip, clip],
    }
    functions: dict[str, Callable[..., None]] = {}
    for name, argtypes in types.items():
        function = getattr(library, f"lstm_steps_{name}")
        function.argtypes, function.restype = argtypes, None
        functions[name] = function
    return functions
