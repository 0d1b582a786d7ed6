"""Checks that all ranks of one job run together, each reported by name: starting a job for every check would be slow.

A program calls :func:`run` with its checks; the test module starts it once (:func:`report_of`) and asserts on each.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lapse_elmo.mpi.exit import abort
from lapse_elmo.mpi.world import World
from tests.mpi import mpirun


def run(
    checks: Mapping[str, Callable[[], None]], world: World, folder: Path, local: Callable[[str], bool] = lambda _: False
) -> None:
    """Call every check on this rank, writing down how each ended before the next one starts.

    A check that fails ends the job, since the other ranks may wait in it for this one.

    Args:
        checks: The checks by name.
        world: The ranks.
        folder: Where each rank writes its results.
        local: Returns whether the check of a name waits for no other rank; if it fails, the job continues.
    """
    with open(folder / f"{world.rank}.jsonl", "w", encoding="utf-8") as file:
        for name, check in checks.items():
            error, start = None, time.perf_counter()
            try:
                check()
            except Exception:  # (anything that a check raises is its result)
                error = traceback.format_exc()
            file.write(json.dumps([name, error, round(time.perf_counter() - start, 3)]) + "\n")
            file.flush()
            if error and not local(name):
                abort(world, 1)
            world.barrier()


def run_on_nodes(
    argv: Sequence[str], enter: Callable[[], World], make: Callable[[World], object], names: Sequence[str]
) -> None:
    """Run the methods ``names`` of ``make(world)`` as checks, in a program that is started as ``NODES FOLDER``."""
    world = enter()
    torch.set_num_threads(1)
    if int(argv[0]) > 1:
        world.split(int(argv[0]))
    checks = make(world)
    run({name: getattr(checks, name) for name in names}, world, Path(argv[1]))


def report_on_nodes(program: Path, ranks_and_nodes: Sequence[tuple[int, int]]) -> Any:
    """Return a fixture with the report of a program that calls :func:`run_on_nodes`, for each (ranks, nodes)."""
    ids = [f"{ranks} ranks, {nodes} nodes" for ranks, nodes in ranks_and_nodes]

    @pytest.fixture(scope="module", params=ranks_and_nodes, ids=ids)
    def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        ranks, nodes = request.param
        return report_of(program, [str(nodes)], ranks, tmp_path_factory.mktemp(program.stem), timeout=120)

    return report


def report_of(
    program: Path, arguments: Sequence[str], num_ranks: int, folder: Path, timeout: float,
    env: Mapping[str, str] | None = None, launcher: bool | Sequence[str] = True,
) -> dict[str, str]:
    """Run ``program *arguments FOLDER``; return the failures of each check, with their ranks.

    A check that passed on every rank maps to "", one that did not end on every rank to the job's output.
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
    """Fail if the check failed; skip if it did not run because another one had failed."""
    if name not in report and any(problem for check, problem in report.items() if check):
        pytest.skip("not reached: another check ended the job")
    problem = report.get(name, f"not reached; the job: {report['']}")
    assert not problem, problem
