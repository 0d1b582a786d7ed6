"""The record of a run, and whether somebody is looking."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lapse_elmo.config.training import RunConfig
from lapse_elmo.divergence import MAX_BAD_STEPS
from lapse_elmo.errors import log_line
from lapse_elmo.metrics.run_log import EVENTS, METRICS, Meter, RunLog, table, truncate_after
from lapse_elmo.metrics.server_meter import ServerMeter
from lapse_elmo.metrics.versions import versions
from lapse_elmo.ps.api import ServerStats
from lapse_elmo.ps.layout import Layout
from lapse_elmo.run_state import RunState
from lapse_elmo.step_report import StepResult, Tally
from tests.mpi import MPIRUN, ROOT, mpirun

RESULT = StepResult(
    nll=200.0, num_targets=100, num_tokens=50, num_cut=1, num_sentences=4, gradient_norm=3.0, learning_rate=0.2,
    dense_rate=0.002, sums_bytes=1e6, settled=True,
    signal=2.0, noise=300.0, votes=Tally(1), seconds={"pull": 0.5, "compute": 1.0}, compute_s=np.array([1.0, 1.0, 2.5]),
)
IS_TERMINAL = "from lapse_elmo.metrics.terminal import stderr_is_terminal; print(stderr_is_terminal(), flush=True)"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run_log(folder: Path, *, active: bool = True) -> None:
    log = RunLog(folder, RunConfig(progress="none"), 4, active)
    meter = Meter()
    for _ in range(2):
        meter.add(RESULT)
    log.report(2, meter, {"server/softmax_wait_s": 0.25}, {"softmax": {"ends": [1], "main": [[1]], "replicas": [[0]]}})
    log.write("epoch", 2, {"heldout/mean_perplexity": 12.5, "note": "text", "train/loss_nats": float("nan")})
    log.close()


def four_steps(folder: Path) -> None:
    """Log four steps with a report at every second one, and with progress in the form that suits stderr."""
    log = RunLog(folder, RunConfig(report_every=2), 4, True)
    meter = Meter()
    for step in range(1, 5):
        log.epoch = 1 + step // 3
        meter.add(RESULT)
        log.step(step, meter)
        if step % 2 == 0:
            log.report(step, meter, {}, {})
            meter = Meter()
    log.log_line("said in between")
    log.close()


def under_terminal(command: list[str]) -> str:
    """Return what ``command`` writes to a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=ENVIRONMENT, cwd=ROOT)
    os.close(slave)
    chunks, deadline = [], time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.5)[0]:
                try:
                    chunks.append(os.read(master, 65536))
                except OSError:  # how Linux says that nobody holds the other end any more
                    break
        assert process.wait(10) == 0, b"".join(chunks).decode()
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return b"".join(chunks).decode()


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    run_log(tmp_path)
    train, placement, epoch = (json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())
    assert train["server/softmax_wait_s"] == 0.25
    assert (placement["kind"], placement["softmax"]["main"]) == ("placement", [[1]])
    assert (train["kind"], train["step"]) == ("train", 2)
    assert train["train/loss_nats"] == 2.0
    assert train["train/gradient_norm"] == 3.0
    assert train["step/pull_s"] == 0.5
    assert train["step/compute_s"] == 1.0
    assert train["train/tokens_per_s"] > 0
    assert train["train/learning_rate"] == pytest.approx(0.2)
    assert (train["train/global_batch_sentences"], train["train/global_batch_tokens"]) == (4, 50)
    assert train["train/noise_scale_tokens"] == 150
    assert abs(train["time_s"] - time.time()) < 600
    assert (epoch["kind"], epoch["heldout/mean_perplexity"]) == ("epoch", 12.5)


def test_a_resume_drops_later_and_partial_lines_without_reading_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    lines = [json.dumps({"kind": "train", "step": step, "note": "x" * 1000}) + "\n" for step in range(4000)]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    tracemalloc.start()
    truncate_after(path, 3000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_text() == "".join(lines[:3001])
    assert peak < 1 << 20, "of a file of 4 MB"
    truncate_after(tmp_path / "missing", 3000)
    assert [*tmp_path.iterdir()] == [path]


def test_placements_take_the_same_bytes_per_report_on_any_number_of_nodes() -> None:
    class Server:
        layout, stats = Layout.of(("softmax", 4, 1)), ServerStats()

        def placement(self, name: str, ends: np.ndarray) -> np.ndarray:
            return np.ones((2, len(ends)), np.int64)

    class World:
        num_nodes = 64

        def gather(self, rows: np.ndarray) -> list[np.ndarray]:
            return [rows] * self.num_nodes

    meter = ServerMeter(cast(Any, Server()), cast(Any, World()))
    shown = [meter.placement(report) for report in range(130)]
    assert [number for number, placement in enumerate(shown) if placement] == [0, 64, 128]
    assert len(shown[64]["softmax"]["main"]) == 64


@pytest.mark.parametrize(("seconds", "named"), [([1.0, 1.0, 2.5], True), ([1.0, 1.0, 1.2], False)])
def test_the_slowest_rank_is_named(
    seconds: list[float], named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, RunConfig(progress="lines"), 4, True, hosts=["a", "a", "b"])
    meter = Meter()
    for factor in (1, 3):
        meter.add(dataclasses.replace(RESULT, compute_s=factor * np.array(seconds)))
    log.report(2, meter, {}, {}, {"pull": 0.5, "compute": 10.0})
    log.close()
    (train,) = (json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())
    assert (train["ranks/slowest"], train["ranks/slowest_host"]) == (2, "b")
    assert (train["ranks/slowest_compute_s"], train["ranks/median_compute_s"]) == (2 * seconds[2], 2.0)
    assert train["ranks/slowest_pull_s"] == 0.25
    text = "slowest rank 2 on b: computes 5.000 s/step, the median rank 2.000, pull 0.250"
    assert (text in capsys.readouterr().err) == named


def test_every_line_is_standard_json(tmp_path: Path) -> None:
    """No line contains NaN, which is not JSON and which readers in other languages refuse."""
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    run_log(tmp_path)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert all("step" in json.loads(line, parse_constant=refuse) for line in lines)


def test_metrics_have_units(tmp_path: Path) -> None:
    run_log(tmp_path)
    names = json.loads((tmp_path / METRICS).read_text().splitlines()[0]).keys() - {"kind", "step"}
    unit = re.compile(r"(_s|_per_s|_nats|_bytes|_perplexity|_norm|_rate|_tokens|_sentences)$")
    assert all(unit.search(name) for name in names), names


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    run_log(tmp_path)
    events = EventAccumulator(str(tmp_path / EVENTS))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_nats", "train/tokens_per_s", "step/pull_s", "heldout/mean_perplexity"} <= tags
    assert "note" not in tags
    (loss,) = events.Scalars("train/loss_nats")
    assert (loss.step, loss.value) == (2, 2.0)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_log(tmp_path, active=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_lines_where_nobody_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four_steps(tmp_path)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"epoch 1  step 2/4  [\d,]+ tokens/s  loss 2\.000  ETA \d\d:\d\d", lines[0])
    assert lines[1].startswith("epoch 2  step 4/4  ")
    assert lines[1].endswith("ETA 00:00")
    assert lines[2] == "said in between"
    assert "\r" not in err
    assert out == ""


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        four_steps(tmp_path)
        terminal.flush()
        text = ""
        while select.select([master], [], [], 0.2)[0]:
            text += os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\r" in text
    assert re.search(r"epoch \d: +\d+%", text)
    assert "4/4" in text
    assert "loss 2.000" in text
    assert "step 2/4" not in text
    assert "said in between" in text


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_terminal_that_is_gone_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As after ``bin/train &`` and a logout, or with a progress bar in a file on a disk that is full."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            if self.is_gone:
                raise OSError(number, os.strerror(number))
            return 0

        is_gone = False

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr := Gone())
        log = RunLog(tmp_path, RunConfig(progress="bar"), 2, True)
        stderr.is_gone = True
        for step in (1, 2):
            time.sleep(0.6)  # the bar writes twice a second
            log.step(step, Meter())
            log.log_line("a line")
            log.write("epoch", step, {})
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2]


def test_terminal_is_seen_through_the_launcher() -> None:
    """A rank knows that mpirun runs on a terminal although its own output is a pipe."""
    assert "True" in under_terminal([str(MPIRUN), "-n", "1", sys.executable, "-c", IS_TERMINAL])


def test_file_is_seen_through_the_launcher() -> None:
    assert mpirun(1, ["-c", IS_TERMINAL]).stdout.strip() == "False"


def test_a_step_without_sentences_is_no_evidence_of_divergence() -> None:
    """Where ranks take turns, an epoch may end with steps of which no rank has a sentence: their norm is 0."""
    state = RunState()
    for _ in range(MAX_BAD_STEPS):
        state.add(RESULT)
    before = state.watch.plain()
    for _ in range(100):
        state.add(dataclasses.replace(RESULT, nll=0.0, num_targets=0, gradient_norm=0.0))
    assert state.watch.plain() == before


def test_meter_without_targets() -> None:
    meter = Meter()
    assert str(meter.metrics()["train/loss_nats"]) == "nan"
    meter.add(RESULT)
    meter.add(RESULT)
    assert (meter.num_tokens, meter.num_cut, meter.num_steps, meter.loss) == (100, 2, 2, 2.0)
    assert meter.metrics()["step/pull_s"] == 0.5


def test_table() -> None:
    assert table([("rank", "host"), ("0", "a"), ("12", "bcdef")]).splitlines() == [
        "rank  host", "----  -----", "   0  a", "  12  bcdef",
    ]


def test_the_mpi_library_is_the_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's Open MPI, for instance, while the package mpich is installed."""
    loaded = SimpleNamespace(Get_library_version=lambda: "Open MPI v4.1.4,  ident: 4.1.4\nmore\n\0")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", loaded)
    assert versions()["mpi_library"] == "Open MPI v4.1.4, ident: 4.1.4"
    monkeypatch.delitem(sys.modules, "mpi4py.MPI")
    assert "mpi_library" not in versions()


def test_versions() -> None:
    found = versions()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert re.match(r"\d+\.\d+", found["torch"])
    assert all(isinstance(value, str) and value for value in found.values())


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is a single write: a launcher may insert another rank's output between two writes."""
    writes: list[bytes] = []

    class Raw(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            writes.append(bytes(data))
            return len(data)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Raw()), line_buffering=True))
        log_line("one\ntwo")
    assert writes == [b"one\ntwo\n"]
