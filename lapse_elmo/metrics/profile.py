"""Profile training steps: a table of where the time goes, and a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lapse_elmo.corpus.files import write_failed
from lapse_elmo.metrics.run_log import table
from lapse_elmo.model.packed import PREPACKED_MATMUL

FOLDER = "profile"
WARM_UP = 3  # steps before profiling starts: they allocate buffers and fill caches
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_", "aten::bmm", PREPACKED_MATMUL)


class StepProfile:
    """Profiles ``num_steps`` steps of this rank after ``WARM_UP`` others, and writes files to ``run_dir/profile``.

    ``rank-00000.json`` is the trace, ``rank-00000.txt`` the table. The table has the self time of each kind of work, in
    seconds per step and as a share of the steps' wall time. Since two threads work in parallel, the shares add up to
    more than 1.
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
    """Return the table of a profile's events (the result of torch's ``key_averages()``) as text."""
    by_name = {event.key: event for event in events}
    steps = by_name["step"]
    rows = []
    matmul_us = sum(by_name[name].self_cpu_time_total for name in _PRODUCTS if name in by_name)
    if matmul_us:
        rows.append(("matrix products", matmul_us, sum(by_name[n].count for n in _PRODUCTS if n in by_name)))
    rows += [(event.key, event.self_cpu_time_total, event.count) for event in events if event.key not in _PRODUCTS]
    rows.sort(key=lambda row: -row[1])
    lines = [
        (name, f"{time / steps.count / 1e6:.4f}", f"{time / steps.cpu_time_total:.1%}", f"{count / steps.count:,.1f}")
        for name, time, count in rows[:30]
    ]
    step_s = steps.cpu_time_total / steps.count / 1e6
    head = f"{steps.count} steps of {step_s:.3f} s; self time of each kind of work"
    return f"{head}\n\n{table([('work', 's/step', 'share', 'calls/step'), *lines])}"


def _profiler() -> Any:
    """Return a profiler of all threads, and of the GPU if there is one."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return torch.profiler.profile(activities=activities, experimental_config=every)
