"""Copies of rows from the host's memory to the device, which overlap with computing on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Uploader:
    """Copies rows to ``device``; to a GPU through pinned memory, on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin to copy ``rows`` (n, width), contiguous or strided.

        With a GPU ``rows`` may be overwritten as soon as this returns, and the host never waits for the copy: GPU work
        that is queued after the returned function was called waits for it on the device.

        Returns:
            A function that returns the copy, contiguous, on the device. On the CPU it may be ``rows`` itself.
        """
        stream = self._stream
        if stream is None:
            return lambda: rows.to(self.device).contiguous()
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
        with torch.cuda.stream(stream):
            copy = pinned.to(self.device, non_blocking=True)
        arrived = stream.record_event()  # of this copy: waiting for the whole stream would include later copies

        def take() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            copy.record_stream(current)  # the allocator must not reuse its memory before this stream is done with it
            return copy

        return take
