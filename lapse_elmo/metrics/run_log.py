"""The log of a run, written by rank 0: progress on stderr, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lapse_elmo.config.training import RunConfig
from lapse_elmo.corpus.files import atomic_output, flush_file, write_failed
from lapse_elmo.errors import log_line
from lapse_elmo.metrics.terminal import stderr_is_terminal
from lapse_elmo.step_report import StepResult

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
_STRAGGLER = 1.5  # progress lines name the slowest rank if its compute time is this many times the median
_SUMS = (
    "nll", "num_targets", "num_tokens", "num_cut", "num_sentences", "num_steps", "norm", "learning_rate", "dense_rate",
    "signal", "noise", "sums_bytes",
)


@dataclass
class Meter:
    """Sums over the steps since the last report.

    Attributes:
        seconds: Seconds per phase, on rank 0.
        start: ``time.perf_counter()`` at the last report.
        compute_s: (ranks,) seconds of computing of each rank. Unlike the other sums, it is reset when a run resumes.
        num_timed: Number of steps in ``compute_s``.
    """

    nll: float = 0.0
    num_targets: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    num_sentences: int = 0
    num_steps: int = 0
    norm: float = 0.0
    learning_rate: float = 0.0
    dense_rate: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    sums_bytes: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)
    compute_s: np.ndarray | None = None
    num_timed: int = 0

    def add(self, result: StepResult) -> None:
        """Add one step."""
        self.nll += result.nll
        self.num_targets += result.num_targets
        self.num_tokens += result.num_tokens
        self.num_cut += result.num_cut
        self.num_sentences += result.num_sentences
        self.num_steps += 1
        self.norm += result.gradient_norm
        self.learning_rate += result.learning_rate
        self.dense_rate += result.dense_rate
        self.signal += result.signal
        self.noise += result.noise
        self.sums_bytes += result.sums_bytes
        for name, seconds in result.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.compute_s = result.compute_s if self.compute_s is None else self.compute_s + result.compute_s
        self.num_timed += 1

    def state(self) -> dict[str, Any]:
        """Return the sums as plain values for a checkpoint; :meth:`of` is the inverse."""
        plain = {name: getattr(self, name) for name in _SUMS}
        return {**plain, "seconds": dict(self.seconds), "elapsed_s": time.perf_counter() - self.start}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Meter:
        """Return the meter with a given :meth:`state`."""
        meter = cls(**{name: state.get(name, 0) for name in _SUMS}, seconds=dict(state["seconds"]))
        meter.start -= state["elapsed_s"]
        return meter

    @property
    def loss(self) -> float:
        """Mean nll per target, in nats."""
        return self.nll / self.num_targets if self.num_targets else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks per second of wall time since the last report."""
        return self.num_tokens / max(time.perf_counter() - self.start, 1e-9)

    def slowest(self) -> tuple[int, float, float] | None:
        """Return the slowest rank, its compute seconds per step and the median rank's; None before the first step."""
        if self.compute_s is None:
            return None
        rank = int(self.compute_s.argmax())
        return rank, float(self.compute_s[rank]) / self.num_timed, float(np.median(self.compute_s)) / self.num_timed

    @property
    def noise_scale_tokens(self) -> float:
        """The gradient noise scale: the batch size, in tokens, at which noise makes up half of the squared norm.

        NaN if it is unknown.
        """
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else math.nan

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name, with units; phase times are those of rank 0, per step."""
        steps = max(self.num_steps, 1)
        return {
            "train/loss_nats": self.loss,
            "train/gradient_norm": self.norm / steps,
            "train/tokens_per_s": self.tokens_per_s,
            "train/learning_rate": self.learning_rate / steps,
            "train/dense_learning_rate": self.dense_rate / steps,
            "train/global_batch_sentences": self.num_sentences / steps,
            "train/global_batch_tokens": self.num_tokens / steps,
            "train/noise_scale_tokens": self.noise_scale_tokens,
            "train/sums_bytes": self.sums_bytes / steps,
            **{f"step/{name}_s": seconds / steps for name, seconds in self.seconds.items()},
        }


class RunLog:
    """Writes the log of a run; does nothing on ranks other than 0.

    Args:
        run_dir: The run's directory, which must exist.
        config: The options for reports and progress.
        num_steps: The run's last step.
        active: Whether this rank writes.
        max_s: What is left of the time limit, in seconds, for the ETA.
        first_step: The step from which the run resumes; logged metrics of later steps are removed.
        hosts: The host name of each rank.

    Attributes:
        epoch: The epoch to show, counted from 1.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        num_steps: int,
        active: bool,
        max_s: float = math.inf,
        first_step: int = 0,
        hosts: Sequence[str] = (),
    ) -> None:
        self.active = active
        self.epoch = 1
        self._report_every = config.report_every
        self._bar: tqdm | None = None
        self._lines = False
        self._num_steps = num_steps
        self._first_step = first_step
        self._hosts = hosts
        self._max_s = max_s
        self._since_start = Meter()
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            if first_step:
                truncate_after(run_dir / METRICS, first_step)
            mode = "a" if first_step else "w"
            self._file = open(run_dir / METRICS, mode, encoding="utf-8")  # noqa: SIM115 (open for as long as the run)
            self._writer = SummaryWriter(str(run_dir / EVENTS), purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            raise write_failed(error.filename or run_dir, error) from None
        kind = config.progress
        if kind == "auto":
            kind = "bar" if stderr_is_terminal() else "lines"
        self._lines = kind == "lines"
        if kind == "bar":
            tqdm.monitor_interval = 0  # no thread of its own, which would end the run if stderr cannot be written
            self._bar = tqdm(
                total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.05,
                file=sys.stderr,
            )

    def step(self, step: int, meter: Meter) -> None:
        """Update the progress bar; to be called after every step, with the steps since the last report."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.set_description(f"epoch {self.epoch}", refresh=False)
            self._bar.set_postfix_str(f"{meter.tokens_per_s:,.0f} tokens/s, loss {meter.loss:.3f}", refresh=False)
            with _without_reader():
                self._bar.update(1)

    def report(
        self, step: int, meter: Meter, server: dict[str, float], placement: dict[str, Any],
        slowest_s: dict[str, float] | None = None,
    ) -> None:
        """Write the metrics of the steps since the last report, and a progress line if there is no bar.

        Args:
            step: The last step.
            meter: Sums over the steps.
            server: Metrics of the parameter server.
            placement: Where the server's rows are; empty if unknown.
            slowest_s: The slowest rank's seconds per phase, summed over the steps.
        """
        if not self.active:
            return
        phases = {name: seconds / max(meter.num_steps, 1) for name, seconds in (slowest_s or {}).items()}
        self.write("train", step, meter.metrics() | server | self._slowest(meter, phases))
        if placement:
            self.write("placement", step, placement)
        if self._lines:
            elapsed = time.perf_counter() - self._since_start.start
            done = max(step - self._first_step, 1)
            left = min(elapsed / done * (self._num_steps - step), max(self._max_s - elapsed, 0.0))
            self.log_line(
                f"epoch {self.epoch}  step {step:,}/{self._num_steps:,}  "
                f"{meter.tokens_per_s:,.0f} tokens/s  loss {meter.loss:.3f}  ETA {_clock(left)}"
                f"{self._straggler(meter, phases)}"
            )

    def _slowest(self, meter: Meter, phases: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of the rank that computed longest, if there are several ranks."""
        slowest = meter.slowest()
        if slowest is None or len(self._hosts) < 2:
            return {}
        rank, slowest_s, median_s = slowest
        return {
            **{f"ranks/slowest_{name}_s": seconds for name, seconds in phases.items()},
            "ranks/slowest": rank, "ranks/slowest_host": self._hosts[rank], "ranks/slowest_compute_s": slowest_s,
            "ranks/median_compute_s": median_s,
        }

    def _straggler(self, meter: Meter, phases: dict[str, float]) -> str:
        """Return the end of a progress line that names a straggler, or an empty string."""
        slowest = meter.slowest()
        if slowest is None or len(self._hosts) < 2 or slowest[1] < _STRAGGLER * slowest[2]:
            return ""
        rank, slowest_s, median_s = slowest
        others = "".join(f", {name} {seconds:.3f}" for name, seconds in phases.items() if name != "compute")
        return (
            f"  slowest rank {rank} on {self._hosts[rank]}: computes {slowest_s:.3f} s/step, the median rank "
            f"{median_s:.3f}{others}"
        )

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and write a TensorBoard point for each number.

        Raises:
            OutputError: If the file cannot be written.
        """
        if not self.active:
            return
        # JSON has no NaN and no infinity: write null.
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "step": step, "time_s": time.time(), **valid}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_failed(self._file.name, error) from None
        for name, value in values.items():
            if "/" in name and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def log_line(self, line: str) -> None:
        """Print a line on stderr without breaking the progress bar."""
        if not self.active:
            return
        if self._bar is not None:
            with _without_reader():
                self._bar.write(f"{line}\n", file=sys.stderr, end="")
        else:
            log_line(line)

    def close(self) -> None:
        """Close the progress bar and the files."""
        if not self.active:
            return
        if self._bar is not None:
            with _without_reader():
                self._bar.close()
        self._file.close()
        self._writer.close()


def _without_reader() -> contextlib.suppress:
    """Let a terminal that is gone, whose user has logged out, or a full disk not end a run for its progress bar."""
    return contextlib.suppress(OSError, ValueError)


def truncate_after(path: Path, last_step: int) -> None:
    """Remove the lines of metrics.jsonl for steps after ``last_step``, and a partial last line.

    The file is read line by line: after weeks it may be larger than the memory that the run has left.
    """
    if not path.exists():
        return
    with atomic_output(path, overwrite=True) as hidden, open(path, "rb") as lines, open(hidden, "wb") as kept:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= last_step:
                    kept.write(line.rstrip(b"\n") + b"\n")
        flush_file(kept)


def table(rows: list[tuple[str, ...]]) -> str:
    """Format rows as aligned columns of text with the first row as header; numbers are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
