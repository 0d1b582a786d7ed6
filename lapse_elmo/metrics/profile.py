"""Profile training steps: a table of where the time goes, and a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from lapse_elmo.corpus.files import write_failed
from lapse_elmo.metrics.run_log import table
from lapse_elmo.model.prepacked import PREPACKED_MATMUL

FOLDER = "profile"
WARM_UP = 3  # steps before profiling starts: they allocate buffers and fill caches
_MOST_ROWS = 30
_WIDEST = 80  # characters; names of C++ kernels have hundreds
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_", "aten::bmm", PREPACKED_MATMUL)


class StepProfile:
    """Profiles ``num_steps`` steps of this rank after ``WARM_UP`` others, and writes files to ``run_dir/profile``.

    ``rank-00000.json`` is the trace, ``rank-00000.txt`` the table. The table has the self time of each kind of work, in
    seconds per step and as a share of the steps' wall time. Since two threads work in parallel, the shares add up to
    more than 1. With a GPU, there are tables of the time on it, too.
    """

    def __init__(self, run_dir: Path, num_steps: int, rank: int) -> None:
        self.num_steps = num_steps
        self.base = run_dir / FOLDER / f"rank-{rank:05d}"
        self._seen = 0
        self._profiler: Any = None

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Return a context manager for one training step, which is profiled if it is its turn."""
        if self.num_steps and self._seen == WARM_UP:
            self._profiler = _profiler()
            self._profiler.start()
        self._seen += 1
        with torch.profiler.record_function("step"):
            yield
        if self._profiler is not None and self._seen == WARM_UP + self.num_steps:
            self.close()

    def close(self) -> None:
        """Write the profile, if a step was recorded.

        Raises:
            OutputError: If the files cannot be written.
        """
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            self.base.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.base.with_suffix(".json")))
            self.base.with_suffix(".txt").write_text(summary(profiler.key_averages()) + "\n", encoding="utf-8")
        except OSError as error:
            raise write_failed(str(self.base), error) from None


def summary(events: Any) -> str:
    """Return the tables of a profile's events (the result of torch's ``key_averages()``) as text.

    With a GPU, tables of the time on it come first: by operation of torch, and by kernel. The time of an operation on
    the host is then that of launching its kernels, or of waiting.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    # Labels (record_function) occur a second time as ranges on the device: from their first kernel to their last.
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    steps = next(event for event in host if event.key == "step")
    head = f"{steps.count} steps of {steps.cpu_time_total / steps.count / 1e6:.3f} s"
    own_time = "self time of each kind of work"
    own = _table([(event.key, event.self_cpu_time_total, event.count) for event in host], steps)
    busy_us = sum(event.self_device_time_total for event in kernels)
    if not busy_us:
        return f"{head}; {own_time}\n\n{own}"
    of_kernels, launched = (
        [(event.key, event.self_device_time_total, event.count) for event in some if event.self_device_time_total]
        for some in (kernels, host)
    )
    rest_us = busy_us - sum(time for _, time, _ in launched)
    if rest_us > 0:
        launched.append(("kernels of no operation", rest_us, 0))
    return "\n\n".join((
        f"{head}; the device computes or copies for {busy_us / steps.cpu_time_total:.1%} of them",
        "time on the device of each kind of work", _table(launched, steps),
        "time on the device of each kernel", _table(of_kernels, steps),
        f"{own_time} on the host", own,
    ))


def _table(rows: list[tuple[str, float, int]], steps: Any) -> str:
    """Return a table of the largest of ``rows``: name, microseconds, calls. All matrix products are one row."""
    products = [row for row in rows if row[0] in _PRODUCTS]
    rows = [row for row in rows if row[0] not in _PRODUCTS]
    if products:
        rows.append(("matrix products", sum(time for _, time, _ in products), sum(count for *_, count in products)))
    rows.sort(key=lambda row: -row[1])
    lines = [
        (
            name if len(name) <= _WIDEST else f"{name[:_WIDEST]}...", f"{time / steps.count / 1e6:.4f}",
            f"{time / steps.cpu_time_total:.1%}", f"{count / steps.count:,.1f}",
        )
        for name, time, count in rows[:_MOST_ROWS]
    ]
    return table([("work", "s/step", "share", "calls/step"), *lines])


def _profiler() -> Any:
    """Return a profiler of all threads, and of the GPU if there is one."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return torch.profiler.profile(activities=activities, experimental_config=every)
