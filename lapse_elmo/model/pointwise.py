"""The row-wise parts of the LSTM and of the softmax: in C where there is a compiler, in Triton on a GPU, and in torch.

All kinds do the same on rows of one storage dtype (float32, float64 or bfloat16) with state, bias and sums in the
``wide`` dtype (float32 for bfloat16, else the same). An object serves one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapse_elmo import native
from lapse_elmo.errors import in_one_line
from lapse_elmo.model.pointwise_torch import TorchPointwise, wide_dtype

SOURCE = Path(__file__).parent / "pointwise.c"
_KINDS = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "b"}
# Of each function, after two sizes: the number of pointers, and whether a clip follows them.
_FUNCTIONS = {
    "lstm_cell_forward": (5, True), "lstm_cell_backward": (6, True), "lstm_clip_forward": (2, True),
    "lstm_clip_backward": (4, True),
    "column_sums": (2, False), "softmax_rows": (7, False), "softmax_totals": (4, False),
}


class Pointwise(Protocol):
    """Interface of all backends. All tensors are contiguous, with n rows; buffers may have more."""

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        """Compute one LSTM step except for its matrix products; pointwise.c has the formulas.

        Args:
            gates: (n, 4C) before activation and bias; activated in place, in the order i, f, g, o.
            bias: (4C,) wide.
            previous_cells: (at least n, C) wide, cells of the step before; None for zero.
            cells: (n, C) wide, written.
            cell_output: (n, C), written with o * tanh(cells).
            clip: Bound on cells; infinite for none.
        """

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        """Backpropagate through :meth:`cell_forward`; pointwise.c has the formulas.

        Args:
            gates: (n, 4C) activated; replaced by the gradients before activation.
            cell_output: (n, C), written with o * tanh(cells); may be ``cells`` itself.
            d_cell_output: (n, C) gradient of ``cell_output``; may be used up.
            d_cells: (n, C) wide, from the step after this one; replaced by that for the step before.
        """

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        """Clip ``hidden`` (n, D) in place, then multiply by ``mask`` (at least n, D, wide) where there is one."""

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        """Add ``d_recurrent`` (at least n, D) to ``d_hidden`` (n, D); backpropagate through :meth:`clip_forward`."""

    def column_sums(self, rows: Tensor) -> Tensor:
        """Return the sums (m,) wide of the columns of ``rows`` (n, m)."""

    def softmax_rows(
        self, logits: Tensor, bias_minus_log_q: Tensor, target: Tensor, nll: Tensor, inv_sum: Tensor, d_target: Tensor,
        d_bias: Tensor,
    ) -> None:
        """Compute the sampled softmax of n targets against S samples.

        Args:
            logits: (n, S) before ``bias_minus_log_q`` (S,) wide is added; replaced by exp_logits = exp(logit -
                largest); ``inv_sum * exp_logits`` are the probabilities.
            target: (n,) wide, the targets' logits.
            nll: (n,) wide, written; so are ``inv_sum`` and ``d_target``, the gradient of ``target``.
            d_bias: (S,) wide; the gradient of ``bias_minus_log_q`` is added.
        """

    def softmax_totals(self, logits: Tensor, bias: Tensor, largest: Tensor, total: Tensor) -> None:
        """Bring a full softmax's ``largest`` logit (n,) wide and ``total`` = sum of exp(logit - largest), (n,) float64,
        up to date with further classes.

        Args:
            logits: (n, V') before ``bias`` (V',) wide; may be used up.
        """


def pointwise(like: Tensor) -> Pointwise:
    """Return a new instance of the fastest backend for tensors like ``like``, for use by one thread."""
    if like.device.type == "cpu" and like.dtype in _KINDS:
        library = native.load(SOURCE)
        if library is not None:
            return NativePointwise(_functions(library)[_KINDS[like.dtype]])
    if like.device.type == "cuda" and not triton_problem(like.device):
        from lapse_elmo.model.pointwise_triton import TritonPointwise

        return TritonPointwise()
    return TorchPointwise()


def triton_problem(device: torch.device) -> str:
    """Why Triton's kernels are not used on ``device``, as one line; empty where they are."""
    return _triton_problem(device) if native.enabled() else f"switched off by {native.SWITCH}"


@functools.cache
def _triton_problem(device: torch.device) -> str:
    try:
        from lapse_elmo.model import pointwise_triton

        pointwise_triton.check(device)
    except Exception as error:  # a compiler's or a driver's, of whatever kind
        return in_one_line(error)
    return ""


@functools.lru_cache(maxsize=4)
def _functions(library: ctypes.CDLL) -> dict[str, dict[str, Callable[..., None]]]:
    """Return the library's functions, by kind and name."""
    found: dict[str, dict[str, Callable[..., None]]] = {kind: {} for kind in _KINDS.values()}
    for kind, functions in found.items():
        for name, (num_pointers, clips) in _FUNCTIONS.items():
            function = getattr(library, f"{name}_{kind}")
            function.restype = None
            types = [ctypes.c_long] * 2 + [ctypes.c_void_p] * num_pointers
            function.argtypes = [*types, ctypes.c_double] if clips else types
            functions[name] = function
    return found


class NativePointwise:
    """By pointwise.c. Sizes are taken from the first argument; the caller answers for the others."""

    def __init__(self, functions: dict[str, Callable[..., None]]) -> None:
        self._cell_forward, self._cell_backward = functions["lstm_cell_forward"], functions["lstm_cell_backward"]
        self._clip_forward, self._clip_backward = functions["lstm_clip_forward"], functions["lstm_clip_backward"]
        self._column_sums = functions["column_sums"]
        self._softmax_rows, self._softmax_totals = functions["softmax_rows"], functions["softmax_totals"]

    def cell_forward(
        self, gates: Tensor, bias: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor,
        clip: float,
    ) -> None:
        self._cell_forward(
            *cells.shape, gates.data_ptr(), bias.data_ptr(), _pointer(previous_cells), cells.data_ptr(),
            cell_output.data_ptr(), clip,
        )

    def cell_backward(
        self, gates: Tensor, previous_cells: Tensor | None, cells: Tensor, cell_output: Tensor, d_cell_output: Tensor,
        d_cells: Tensor, clip: float,
    ) -> None:
        self._cell_backward(
            *cells.shape, gates.data_ptr(), _pointer(previous_cells), cells.data_ptr(), cell_output.data_ptr(),
            d_cell_output.data_ptr(), d_cells.data_ptr(), clip,
        )

    def clip_forward(self, hidden: Tensor, mask: Tensor | None, clip: float) -> None:
        self._clip_forward(*hidden.shape, hidden.data_ptr(), _pointer(mask), clip)

    def clip_backward(
        self, d_hidden: Tensor, d_recurrent: Tensor, hidden: Tensor, mask: Tensor | None, clip: float
    ) -> None:
        self._clip_backward(
            *hidden.shape, d_hidden.data_ptr(), d_recurrent.data_ptr(), hidden.data_ptr(), _pointer(mask), clip
        )

    def column_sums(self, rows: Tensor) -> Tensor:
        sums = rows.new_empty(rows.shape[1], dtype=wide_dtype(rows.dtype))
        self._column_sums(*rows.shape, rows.data_ptr(), sums.data_ptr())
        return sums

    def softmax_rows(self, logits: Tensor, *rest: Tensor) -> None:
        self._softmax_rows(*logits.shape, logits.data_ptr(), *(tensor.data_ptr() for tensor in rest))

    def softmax_totals(self, logits: Tensor, *rest: Tensor) -> None:
        self._softmax_totals(*logits.shape, logits.data_ptr(), *(tensor.data_ptr() for tensor in rest))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
