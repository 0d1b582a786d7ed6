"""The pointwise kernels of the LSTM and the softmax: everything but matrix products.

There are three backends with the same results: C (pointwise.c) on a CPU with a compiler, Triton on a GPU, and torch
anywhere. Rows are stored in float32, float64 or bfloat16. Cells, biases and sums have the *wide* dtype, which is
float32 for bfloat16 rows and otherwise that of the rows. An instance must be used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.code_cache import cache_folder
from lapse_elmo.errors import in_one_line
from lapse_elmo.model.pointwise_torch import TorchPointwise, wide_dtype

SOURCE = Path(__file__).parent / "pointwise.c"
_SUFFIXES = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "b"}
# Arguments of each C function after the two sizes: the number of pointers, and whether a clip value follows.
_FUNCTIONS = {
    "lstm_cell_forward": (5, True), "lstm_cell_backward": (6, True), "lstm_clip_forward": (2, True),
    "lstm_clip_backward": (4, True),
    "column_sums": (2, False), "softmax_rows": (7, False), "softmax_totals": (4, False),
}


class Pointwise(Protocol):
    """Interface of all backends; pointwise.c has the formulas.

    All tensors are contiguous and have n rows, one per unfinished sentence. Those that are described as "at least n"
    may have further rows, which are not read.
    """

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        """Compute one LSTM step except for its matrix products.

        Args:
            gates: (n, 4C) pre-activations without bias, in the order i, f, g, o; activated in place.
            bias: (4C,) wide.
            previous_cells: (at least n, C) wide, cells of the previous step; None for zero.
            cells: (n, C) wide; output.
            cell_output: (n, C), output: o * tanh(cells).
            clip: Largest magnitude of a cell; infinite for no clipping.
        """

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        """Backpropagate through :meth:`cell_forward`.

        Args:
            gates: (n, 4C) activated gates; replaced by the gradients of the pre-activations.
            previous_cells: (at least n, C) wide, cells of the previous step; None for zero.
            cells: (n, C) wide, cells of this step.
            cell_output: (n, C), output: o * tanh(cells), recomputed; may be ``cells`` itself.
            d_cell_output: (n, C) gradient of ``cell_output``; may be overwritten.
            d_cells: (n, C) wide gradient of ``cells`` from the next step; replaced by that of ``previous_cells``.
            clip: As in the forward pass.
        """

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        """Clip ``hidden`` (n, D) in place, then multiply it by the dropout ``mask`` (at least n, D, wide) if any."""

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        """Backpropagate through :meth:`clip_forward`.

        Args:
            d_hidden: (n, D) gradient from the layer above; replaced by the gradient of the projection's output.
            d_recurrent: (at least n, D) gradient from the next step, which is added.
            hidden: (n, D) output of :meth:`clip_forward`.
            mask: As in the forward pass.
            clip: As in the forward pass.
        """

    def column_sums(self, rows: Tensor) -> Tensor:
        """Return the column sums (m,), wide, of ``rows`` (n, m)."""

    def softmax_rows(
        self, logits: Tensor, bias_minus_log_q: Tensor, target: Tensor, nll: Tensor, inv_sum: Tensor, d_target: Tensor,
        d_bias: Tensor,
    ) -> None:
        """Compute the sampled softmax of n targets, each over itself and S samples.

        Args:
            logits: (n, S) logits of the samples without ``bias_minus_log_q``; replaced by exp_logits = exp(logit - row
                maximum). The probabilities of the samples are ``inv_sum * exp_logits``.
            bias_minus_log_q: (S,) wide, added to each row of ``logits``.
            target: (n,) wide logits of the targets.
            nll: (n,) wide; output.
            inv_sum: (n,) wide, output: 1 / the sum of exp(logit - row maximum), including the target's.
            d_target: (n,) wide, output: the gradient of ``target``.
            d_bias: (S,) wide; the gradient of ``bias_minus_log_q`` is added to it.
        """

    def softmax_totals(self, logits: Tensor, bias: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
        """Update the running maximum and sum of a full softmax in place with further classes.

        Args:
            logits: (n, m) logits of m classes without ``bias``; may be overwritten.
            bias: (m,) wide.
            running_max: (n,) wide, the largest logit so far; initially -inf.
            running_sum: (n,) float64, the sum of exp(logit - running_max) so far; initially 0.
        """


def pointwise(like: Tensor) -> Pointwise:
    """Return a new instance of the fastest backend for the device and dtype of ``like``."""
    if like.device.type == "cpu" and like.dtype in _SUFFIXES:
        library = native.load(SOURCE)
        if library is not None:
            return NativePointwise(_functions(library)[_SUFFIXES[like.dtype]], like.dtype)
    if like.device.type == "cuda" and not triton_problem(like.device):
        from lapse_elmo.model.pointwise_triton import TritonPointwise

        return TritonPointwise()
    return TorchPointwise()


def triton_problem(device: torch.device) -> str:
    """Return in one line why the Triton kernels are not used on ``device``; empty if they are."""
    return _triton_problem(device) if native.enabled() else f"switched off by {native.SWITCH}"


@functools.cache
def _triton_problem(device: torch.device) -> str:
    with contextlib.suppress(OSError):  # Triton's own default is a home directory that may be read-only
        os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    try:
        from lapse_elmo.model import pointwise_triton

        pointwise_triton.check(device)
    except Exception as error:  # compilers and drivers raise exceptions of any type
        return in_one_line(error)
    return ""


@functools.lru_cache(maxsize=4)
def _functions(library: ctypes.CDLL) -> dict[str, dict[str, Callable[..., None]]]:
    """Return the library's functions by dtype suffix and name."""
    by_suffix: dict[str, dict[str, Callable[..., None]]] = {suffix: {} for suffix in _SUFFIXES.values()}
    for suffix, functions in by_suffix.items():
        for name, (num_pointers, has_clip) in _FUNCTIONS.items():
            function = getattr(library, f"{name}_{suffix}")
            function.restype = None
            types = [ctypes.c_long] * 2 + [ctypes.c_void_p] * num_pointers
            function.argtypes = [*types, ctypes.c_double] if has_clip else types
            functions[name] = function
    return by_suffix


class NativePointwise:
    """The backend in C (pointwise.c).

    Sizes are those of ``cells``, ``hidden``, ``rows`` or ``logits``. Before a pointer is passed to C, dtype, shape and
    contiguity of its tensor are asserted; with them, a call takes about a microsecond longer.

    Args:
        functions: The functions of pointwise.c for ``storage``.
        storage: Dtype of the rows.

    Attributes:
        storage: Dtype of the rows.
        wide: Dtype of cells, biases and sums.
    """

    def __init__(self, functions: dict[str, Callable[..., None]], storage: torch.dtype) -> None:
        self.storage, self.wide = storage, wide_dtype(storage)
        self._functions = functions
        self._cell_forward, self._cell_backward = functions["lstm_cell_forward"], functions["lstm_cell_backward"]
        self._clip_forward, self._clip_backward = functions["lstm_clip_forward"], functions["lstm_clip_backward"]
        self._column_sums = functions["column_sums"]
        self._softmax_rows, self._softmax_totals = functions["softmax_rows"], functions["softmax_totals"]

    def address(self, name: str) -> int:
        """Return the address of a function of pointwise.c, for C code that calls it."""
        return native.address(self._functions[name])

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        shape, storage, wide = cells.shape, self.storage, self.wide
        n, width = shape
        self._cell_forward(
            n, width, pointer(gates, (n, 4 * width), storage), pointer(bias, (4 * width,), wide),
            pointer_to_rows(previous_cells, shape, wide), pointer(cells, shape, wide),
            pointer(cell_output, shape, storage), clip,
        )

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        shape, storage, wide = cells.shape, self.storage, self.wide
        n, width = shape
        self._cell_backward(
            n, width, pointer(gates, (n, 4 * width), storage), pointer_to_rows(previous_cells, shape, wide),
            pointer(cells, shape, wide), pointer(cell_output, shape, storage),
            pointer(d_cell_output, shape, storage), pointer(d_cells, shape, wide), clip,
        )

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        shape = hidden.shape
        self._clip_forward(
            *shape, pointer(hidden, shape, self.storage), pointer_to_rows(mask, shape, self.wide), clip
        )

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        shape, storage = hidden.shape, self.storage
        self._clip_backward(
            *shape, pointer(d_hidden, shape, storage), pointer_to_rows(d_recurrent, shape, storage),
            pointer(hidden, shape, storage), pointer_to_rows(mask, shape, self.wide), clip,
        )

    def column_sums(self, rows: Tensor) -> Tensor:
        sums = rows.new_empty(rows.shape[1], dtype=self.wide)
        self._column_sums(*rows.shape, pointer(rows, rows.shape, self.storage), sums.data_ptr())
        return sums

    def softmax_rows(
        self, logits: Tensor, bias_minus_log_q: Tensor, target: Tensor, nll: Tensor, inv_sum: Tensor, d_target: Tensor,
        d_bias: Tensor,
    ) -> None:
        shape, wide = logits.shape, self.wide
        n, num_samples = shape
        self._softmax_rows(
            n, num_samples, pointer(logits, shape, self.storage), pointer(bias_minus_log_q, (num_samples,), wide),
            pointer(target, (n,), wide), pointer(nll, (n,), wide), pointer(inv_sum, (n,), wide),
            pointer(d_target, (n,), wide), pointer(d_bias, (num_samples,), wide),
        )

    def softmax_totals(self, logits: Tensor, bias: Tensor, running_max: Tensor, running_sum: Tensor) -> None:
        shape, wide = logits.shape, self.wide
        n, num_classes = shape
        self._softmax_totals(
            n, num_classes, pointer(logits, shape, self.storage), pointer(bias, (num_classes,), wide),
            pointer(running_max, (n,), wide), pointer(running_sum, (n,), torch.float64),
        )


def pointer(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the address of a contiguous tensor of this shape and dtype."""
    assert tensor.shape == shape and tensor.dtype is dtype and tensor.is_contiguous(), _mismatch(tensor, shape, dtype)
    return tensor.data_ptr()


def pointer_to_rows(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Return the address of a contiguous tensor with at least the rows of ``shape``; None for None."""
    if tensor is None:
        return None
    rows, columns = tensor.shape
    fits = rows >= shape[0] and columns == shape[1]
    assert fits and tensor.dtype is dtype and tensor.is_contiguous(), _mismatch(tensor, shape, dtype)
    return tensor.data_ptr()


def _mismatch(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}, expected {tuple(shape)} {dtype}"
