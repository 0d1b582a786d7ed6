"""Run all benchmarks that take only minutes, one after another: ``python -m benchmarks`` (``make bench``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lapse_elmo.config.training import DEFAULT_SHARDS

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the benchmarks."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as bin/train sets it
    names = ("products", "step", "full_softmax", "preprocess", "checkpoint")
    programs = [[sys.executable, "-m", f"benchmarks.{name}"] for name in names]
    for ranks in (1, 2):
        programs.append([f"{sys.prefix}/bin/mpirun", "-n", str(ranks), sys.executable, "-m", "benchmarks.server"])
    programs.append([*programs[-1], "--nodes", "2"])
    for package in ("lapse", "adapm"):  # skipped, with a message, if the package is not installed
        command = [f"{sys.prefix}/bin/mpirun", "-n", "2", sys.executable, "-m", "benchmarks.peer_servers", package]
        programs.append(command)
    if (ROOT / DEFAULT_SHARDS).exists():
        programs += [[sys.executable, "-m", f"benchmarks.{name}"] for name in ("start", "ranks")]
    else:
        print(f"benchmarks.start and benchmarks.ranks are skipped: they need {DEFAULT_SHARDS} (run make train)")
    for program in programs:
        print(f"\n--- {' '.join(program[1:])}", flush=True)
        subprocess.run(program, cwd=ROOT, check=True, env=environment)


if __name__ == "__main__":
    main()
