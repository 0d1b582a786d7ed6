"""Which process of pytest-xdist runs which file: of three or more, one runs the files that mostly wait.

Their tests wait for time limits, for Slurm to look at its queue, for a rank that hangs. Run by a process of their own
they take hardly anything from the others, which share out the rest; without it, a core would be idle meanwhile.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

WAITING = (  # the longest first
    "tests/slurm/test_training.py", "tests/training/test_stalls.py", "tests/slurm/test_scripts.py",
    "tests/ps/test_native_start.py", "tests/slurm/test_others.py",
)


class Distribution(LoadFileScheduling):
    """Files in their order, but those that wait to the last process, which ends when none of them is left."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiter = f"gw{self.numnodes - 1}" if self.numnodes > 2 else ""

    def _next(self, node: WorkerController) -> str | None:
        """Return the file that the process is to run next; the others take files that wait if nothing else is left."""
        if not self._waiter:
            return next(iter(self.workqueue), None)
        waiting = next((scope for scope in WAITING if scope in self.workqueue), None)
        if node.gateway.id == self._waiter:
            return waiting
        return next((scope for scope in self.workqueue if scope not in WAITING), waiting)

    def _assign_work_unit(self, node: WorkerController) -> None:
        scope = self._next(node)
        if scope is not None:
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    def _reschedule(self, node: WorkerController) -> None:
        if self._next(node) is None and not node.shutting_down:
            node.shutdown()
        else:
            super()._reschedule(node)
