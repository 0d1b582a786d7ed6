"""Peaks of memory while text of growing length goes through a model: ``streaming_program.py RESULT RUN TEXT ...``.

Every rank sends each TEXT through ``bin/embed``, ``bin/embed --words words`` and ``bin/score``, in the current
folder. RESULT gets, for each rank, ``peaks``: its largest resident memory up to the end of each TEXT, in bytes, and
``most_held``: the largest number of other ranks' results that it held at a time in ``bin/embed``.
"""

from __future__ import annotations

import pickle
import resource
import sys
import weakref
from types import SimpleNamespace
from typing import Any

from lapse_elmo import embed, handover, score
from lapse_elmo.mpi.world import World
from lapse_elmo.trained import targets
from tests.training.driver import write_results


class Counted:
    """The ``pickle`` of ``handover``, counting the arrays that were received and are still in memory."""

    def __init__(self) -> None:
        self.held = self.most_held = 0

    def loads(self, data: bytearray) -> Any:
        array = pickle.loads(data)
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        weakref.finalize(array, self.released)
        return array

    def released(self) -> None:
        self.held -= 1


def run(world: World, model: str, texts: list[str]) -> dict[str, Any]:
    targets._PENDING_BYTES = 1 << 20  # the buffer of 32 MB would hide what grows
    counted, peaks = Counted(), []
    for number, text in enumerate(texts):
        common = [model, text, "--threads", "1", "--device", "cpu", "--batch-size", "4", "--output"]
        handover.pickle = SimpleNamespace(  # type: ignore[assignment]
            loads=counted.loads, dumps=pickle.dumps, HIGHEST_PROTOCOL=pickle.HIGHEST_PROTOCOL
        )
        embed.main([*common, f"{number}.hdf5"], lambda: world)
        handover.pickle = pickle
        embed.main([*common, f"{number}.npz", "--words", "words"], lambda: world)
        score.main([*common, f"{number}.tsv"], lambda: world)
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"peaks": peaks, "most_held": counted.most_held}


if __name__ == "__main__":
    write_results(lambda world: world.allgather(run(world, sys.argv[2], sys.argv[3:])), sys.argv[1])
