"""benchmarks/gpu.py, the program for a machine with a GPU, without one: its parts, their times, its report."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_packages import check_size
from benchmarks.gpu_report import PHASES, speed
from lapse_elmo.errors import ConfigError
from tests import fork_server
from tests.mpi import ROOT


def test_it_runs_without_a_gpu(tmp_path: Path) -> None:
    """All in one file: speed, where a step goes, and what each part said. Its programs start by the fork server."""
    options = (
        "--device cpu --sizes small --batches 2 --precisions fp32 --seconds 100 --steps 20 --words 50 --sentences 100 "
        f"--samples 20 --parts embed --output {tmp_path}"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {" ".join(fork_server.command())} "$@"\n')
    python.chmod(0o755)
    start = "import sys; sys.executable = sys.argv.pop(1); from benchmarks.gpu import main; main()"
    command = fork_server.command("-c", start, str(python), *options.split())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said, results = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert done.stdout.strip() == said.strip()
    assert list(results["parts"]) == ["device", "vocabulary", "shards", "embed"]
    run = results["runs"]["small-2-fp32"]
    assert 0 < run["tokens_per_s"] <= 1.5 * run["tokens_per_s_of_phases"]
    for text in (f"| small | 2 | fp32 | {run['tokens_per_s']:,.0f} |", "matrix products", "words/s", '"tokens_per_s"'):
        assert text in said
    assert not results["left_out"] and "Left out" not in said


def test_a_part_that_hangs_is_killed(tmp_path: Path) -> None:
    """With the processes that it started, also if it ignores the first signal; the next part runs."""
    options = gpu.GpuOptions(output=str(tmp_path), device="cpu")
    session = gpu.Session(options, tmp_path, time.monotonic() + 60)
    script = f"trap '' TERM; sleep 77 & echo $! >{tmp_path}/child; sleep 77"
    late = gpu.run_limited(["sh", "-c", script], 0.5, {}, grace_s=0.2)
    assert late["error"] == "killed after 0 s" and late["seconds"] < 30
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 20  # a killed process ends when it next gets a processor
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while child.read_text().split()[2] not in "ZX":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    fine, bad = (session.part(name, ["sh", "-c", f"echo {name}; exit {n}"], 9) for name, n in (("one", 0), ("two", 3)))
    assert fine and fine["error"] == "" and fine["said"] == "one"
    assert bad and bad["error"] == "status 3: two" and session.failed
    over = gpu.Session(options, tmp_path, time.monotonic())
    assert over.part("three", ["true"], 9) is None
    over.train("small-2-fp32")
    over.write()
    assert "Left out, as --minutes 8 were over: three, small-2-fp32." in (tmp_path / "report.md").read_text()


def entry(step: int, tokens_per_s: float, kind: str = "train") -> dict[str, Any]:
    phases = {f"step/{name}_s": seconds for name, seconds in zip(PHASES, (0.01, 0.06, 0.01, 0.02), strict=True)}
    return {"kind": kind, "step": step, "train/tokens_per_s": tokens_per_s, "train/global_batch_tokens": 50.0, **phases}


def test_speed_is_that_of_undisturbed_steps() -> None:
    """Not of the warm-up, of the profile and its export, or of an evaluation."""
    lines = [entry(5, 1.0), entry(10, 2.0), entry(15, 400.0), entry(15, 0.0, "epoch"), entry(20, 3.0), entry(25, 420.0)]
    found = speed(lines, profiled=True)
    assert found["tokens_per_s"] == 410.0
    assert found["tokens_per_s_of_phases"] == pytest.approx(500.0) and found["step/compute_s"] == 0.06
    assert speed(lines[:2], profiled=False)["tokens_per_s"] == 2.0
    assert speed(lines[:2], profiled=True) == {}


def test_what_travels_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "some.whl").write_bytes(b"x" * 1000)
    assert "0.0 MB of wheels" in check_size(tmp_path)
    with open(tmp_path / "mpich.whl", "wb") as file:
        file.truncate(65 * 10**6)
    with pytest.raises(ConfigError, match=r"has 65\.0 MB of wheels and .* expected at most 64 MB together"):
        check_size(tmp_path)
