"""Which process of pytest-xdist gets which file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.distribution import WAITING, Distribution
from tests.mpi import ROOT

OTHERS = [f"tests/test_{number}.py" for number in range(20)]


class Node:
    """A process that runs what it is sent, test by test."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.to_run: list[int] = []
        self.files: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.to_run += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def files_of(num_nodes: int, seconds: dict[str, int]) -> list[list[str]]:
    """Run all files, of four tests each, which take a second, or ``seconds``; return the files of each process."""
    option = SimpleNamespace(loadscopereorder=False, verbose=0)
    config: Any = SimpleNamespace(getvalue=lambda _: ["popen"] * num_nodes, option=option)
    scheduling, nodes = Distribution(config), [Node(f"gw{number}") for number in range(num_nodes)]
    tests = [f"{file}::test_{number}" for file in (*OTHERS[:5], *WAITING, *OTHERS[5:]) for number in range(4)]
    for node in nodes:
        scheduling.add_node(node)
        scheduling.add_node_collection(node, tests)
    scheduling.schedule()
    busy = dict.fromkeys(nodes, 0)
    while any(node.to_run for node in nodes):
        node = min((node for node in nodes if node.to_run), key=lambda node: busy[node])
        index = node.to_run.pop(0)
        file = tests[index].partition("::")[0]
        busy[node] += seconds.get(file, 1)
        node.files += [] if file in node.files else [file]
        scheduling.mark_test_complete(node, index)
    assert scheduling.tests_finished and all(node.shutting_down for node in nodes)
    assert sorted(file for node in nodes for file in node.files) == sorted([*OTHERS, *WAITING]), "each in one process"
    return [node.files for node in nodes]


def test_one_of_three_processes_runs_what_waits() -> None:
    *workers, waiter = files_of(3, dict.fromkeys(WAITING, 2))
    assert waiter == list(WAITING)
    assert all(len(files) > 5 for files in workers)


def test_the_others_help_once_they_have_nothing_else_to_do() -> None:
    *workers, waiter = files_of(3, dict.fromkeys(WAITING, 100))
    assert 0 < len(waiter) < len(WAITING) and set(waiter) < set(WAITING)
    assert any(set(files) & set(WAITING) for files in workers)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_fewer_processes_share_all_files(num_nodes: int) -> None:
    assert all(set(files) & set(OTHERS) and set(files) & set(WAITING) for files in files_of(num_nodes, {}))


def test_files_that_wait_exist() -> None:
    assert all((ROOT / file).is_file() for file in WAITING)
