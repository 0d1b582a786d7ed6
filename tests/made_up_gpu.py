"""A made-up GPU: tensors on another device whose numbers a CPU holds, for machines without a GPU.

Its tensors say that they are on ``DEVICE``. As with CUDA, an operation on tensors of both devices is an error. Stream
order, Triton's kernels, NCCL, pinned memory and speed are not emulated.

>>> with MadeUpGpu() as gpu:
...     doubled = (2 * torch.ones(3).to(DEVICE)).cpu()
>>> doubled.tolist(), len(gpu.waits)
([2.0, 2.0, 2.0], 1)
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # the only other device of which every torch has tensors
# Operations whose arguments may be on different devices: copies, and indices from the CPU.
_ACROSS = (
    "aten._to_copy", "aten.copy_", "aten.set_", "aten._local_scalar_dense", "aten.detach", "aten.is_same_size",
    "aten.index.", "aten.index_put",
)
# Operations for whose result the host waits.
_WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.repeat_interleave", "aten.is_nonzero", "aten.equal")


class _OnGpu(torch.Tensor):
    """A tensor on the made-up GPU."""

    numbers: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, numbers: Tensor) -> _OnGpu:
        made: _OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=DEVICE,
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return _OnGpu(self.numbers)

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, _OnGpu)
        self.numbers = value.numbers

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class MadeUpGpu(TorchDispatchMode):
    """Has tensors created on the made-up GPU as long as the context lasts.

    Attributes:
        waits: The package's line at which each transfer to the host, or operation that has the host wait, was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(leaf, _OnGpu) for leaf in tree_leaves((args, kwargs)))
        if there and (str(operation).startswith(_WAITS) or _names_cpu(operation, args, kwargs)):
            self.waits.append(_place())
        if there or _is_there(kwargs.get("device")):
            return _run(operation, args, kwargs)
        return operation(*args, **kwargs)


def _run(operation: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers of its tensors; return its result on the made-up GPU, if it is there."""
    name = str(operation)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _OnGpu)]
    if there and not name.startswith(_ACROSS) and any(t.dim() and not isinstance(t, _OnGpu) for t in tensors):
        raise RuntimeError(f"{name} of tensors on both devices at {_place()}")
    given = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, _OnGpu) else leaf, (args, kwargs))
    wanted = kwargs.get("device")
    if _is_there(wanted):
        given[1]["device"] = torch.device("cpu")
    out = operation(*given[0], **given[1])
    if operation._schema.name.endswith("_"):  # type: ignore[attr-defined]
        return args[0]
    for output in ("out", "grad_input"):
        if isinstance(kwargs.get(output), Tensor):
            return kwargs[output]
    if not (_is_there(wanted) if wanted is not None else there):
        return out
    return tree_map(lambda leaf: _OnGpu(leaf) if isinstance(leaf, Tensor) else leaf, out)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _names_cpu(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation copies to the CPU."""
    if str(operation).startswith("aten.copy_"):
        return not isinstance(args[0], _OnGpu)
    device = kwargs.get("device")
    return device is not None and not _is_there(device)


def _place() -> str:
    """Return the innermost line of the package that is being executed."""
    frames = [frame for frame in traceback.extract_stack() if "/lapse_elmo/" in frame.filename]
    return f"{frames[-1].filename.rpartition('/lapse_elmo/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
