"""Checks that all ranks of one job run together, each reported by name: starting a job for every check would be slow.

A program calls :func:`run` with its checks; the test module starts it once (:func:`report_of`) and asserts on each.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from lapse_elmo.mpi.exit import abort
from lapse_elmo.mpi.world import World
from tests.mpi import mpirun


def run(
    checks: Mapping[str, Callable[[], None]], world: World, folder: Path, local: Callable[[str], bool] = lambda _: False
) -> None:
    """Call every check on this rank, writing down how each ended before the next one starts.

    A check that fails ends the job, since the other ranks may wait in it for this one.

    :param local: of a check's name, whether it waits for no other rank: then the job goes on.
    """
    with open(folder / f"{world.rank}.jsonl", "w", encoding="utf-8") as file:
        for name, check in checks.items():
            error, start = None, time.perf_counter()
            try:
                check()
            except Exception:  # (whatever a check raises is its result)
                error = traceback.format_exc()
            file.write(json.dumps([name, error, round(time.perf_counter() - start, 3)]) + "\n")
            file.flush()
            if error and not local(name):
                abort(world, 1)
            world.barrier()


def report_of(
    program: Path, arguments: Sequence[str], num_ranks: int, folder: Path, timeout: float,
    env: Mapping[str, str] | None = None, launcher: bool | Sequence[str] = True,
) -> dict[str, str]:
    """What went wrong, by check and rank, in a job of ``program *arguments FOLDER``.

    A check that ended well on every rank maps to ""; one that not all ranks came through to the job's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        words = [str(program), *arguments, str(folder)]
        output = mpirun(num_ranks, words, timeout=timeout, env=env, launcher=launcher).output
    except TimeoutError as error:
        output = str(error)
    ended: dict[str, dict[int, str | None]] = {}
    for rank in range(num_ranks):
        path = folder / f"{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            name, error_text, _ = json.loads(line)
            ended.setdefault(name, {})[rank] = error_text
    report = {}
    for name, by_rank in ended.items():
        failed = [f"on rank {rank}:\n{text}" for rank, text in by_rank.items() if text]
        if len(by_rank) < num_ranks:
            failed.append(f"only ranks {sorted(by_rank)} of {num_ranks} came through; the job: {output}")
        report[name] = "\n".join(failed)
    report[""] = output
    return report


def expect(report: Mapping[str, str], name: str) -> None:
    """Fail if the check failed, skip if another one's failure kept it from running."""
    if name not in report and any(problem for check, problem in report.items() if check):
        pytest.skip("not reached: another check ended the job")
    problem = report.get(name, f"not reached; the job: {report['']}")
    assert not problem, problem
