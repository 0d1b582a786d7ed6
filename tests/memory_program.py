"""A training run that compares its memory with the estimate: ``memory_program.py RESULTS OPTION ...`` of bin/train.

RESULTS gets, for every rank, what was estimated and what was taken at most, in bytes: ``shared`` of the node's memory
(on the first rank of a node, else 0) and ``private`` of the process, everything but shared memory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapse_elmo import memory, train
from lapse_elmo.mpi.launch import launch
from lapse_elmo.mpi.node_memory import NodeMemory
from lapse_elmo.mpi.world import World

_EVERY_S = 0.01


def private_bytes() -> int:
    """Return this process's memory without what it shares with others; Linux reports KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssFile:")))


def main(argv: list[str], join: Callable[[], World]) -> int:
    results, seen, over = argv[0], dict[str, Any](private=0, shared=0), threading.Event()
    estimate, make, close = memory.estimate, NodeMemory.__init__, NodeMemory.close
    worlds = []
    opened: list[NodeMemory] = []

    def enter() -> World:
        worlds.append(join())
        return worlds[0]

    def noted(*args: Any) -> memory.Estimate:
        own = estimate(*args)
        world = worlds[0]
        seen["estimated private"] = own.rank
        seen["parts"] = vars(own)
        # The estimate is for all nodes of a machine; here they are equal.
        seen["estimated shared"] = 0 if world.local_rank else own.shared * world.local_size // world.host_size
        return own

    def made(self: NodeMemory, *args: Any) -> None:
        make(self, *args)
        opened.append(self)

    def count(self: NodeMemory) -> None:
        opened.remove(self)
        if worlds[0].local_rank == 0:
            seen["shared"] += 512 * os.fstat(self.file).st_blocks  # pages are never given back before

    def closed(self: NodeMemory) -> None:
        count(self)
        close(self)

    def watch() -> None:
        while not over.wait(_EVERY_S):
            seen["private"] = max(seen["private"], private_bytes())

    memory.estimate, NodeMemory.close = noted, closed  # type: ignore[assignment, method-assign]
    NodeMemory.__init__ = made  # type: ignore[assignment, method-assign]
    threading.Thread(target=watch, daemon=True).start()
    status = train.main(argv[1:], enter)
    over.set()
    for left in list(opened):  # that of gradients is open to the end
        count(left)
    everyone = worlds[0].gather(seen)
    if worlds[0].rank == 0:
        Path(results).write_text(json.dumps(everyone), encoding="utf-8")
    return status


if __name__ == "__main__":
    launch(main, sys.argv[1:], prog="memory_program.py")
