"""Several runs in one MPI job, since starting a job costs more than a tiny run: ``driver.py CASES RESULTS``.

CASES is JSON: a list of ``{"program": a name of PROGRAMS, "argv": [...]}``. RESULTS gets, for each case, what every
rank made of it: ``{"error": class name or null, "message", "everywhere"}``.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lapse_elmo import embed, evaluate, export, perplexity, score, train
from lapse_elmo.config.training import Config
from lapse_elmo.errors import UserError
from lapse_elmo.mpi.exit import abort
from lapse_elmo.mpi.launch import enter
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters


def train_with_a_poisoned_gradient(argv: list[str], enter: Callable[[], World]) -> None:
    """Training whose dense gradients are infinite on the last rank, while the loss and all other gradients are not."""

    class Poisoned(Parameters):
        def __init__(
            self, config: Config, num_classes: int, world: World, device: torch.device, first_sample: int = 0
        ) -> None:
            super().__init__(config, num_classes, world, device, first_sample)
            if world.rank == world.size - 1:
                for parameter in self.model.parameters():
                    parameter.register_hook(lambda gradient: gradient * math.inf)

    train.Parameters = Poisoned  # type: ignore[misc]
    try:
        train.main(argv, enter)
    finally:
        train.Parameters = Parameters  # type: ignore[misc]


def train_with_unequal_clocks(argv: list[str], enter: Callable[[], World]) -> None:
    """A resumed run whose minute of training is over by the clock of the last rank alone."""
    world, restored = enter(), train.RunState.of

    def shifted(plain: dict[str, Any]) -> train.RunState:
        state = restored({**plain, "trained_s": 30.0})
        state.start -= 40.0 * (world.rank == world.size - 1)
        return state

    train.RunState.of = shifted  # type: ignore[method-assign]
    try:
        train.main(argv, enter)
    finally:
        train.RunState.of = restored  # type: ignore[method-assign]


def train_with_a_signal_in_the_evaluation(argv: list[str], enter: Callable[[], World]) -> None:
    """A run of which the last rank is asked to stop when an evaluation begins."""
    world, held = enter(), perplexity._held

    def interrupted(*arguments: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if world.rank == world.size - 1:
            signal.raise_signal(signal.SIGUSR1)
        yield from held(*arguments)

    perplexity._held = interrupted  # type: ignore[assignment]
    try:
        train.main(argv, enter)
    finally:
        perplexity._held = held


PROGRAMS = {
    "train": train.main, "evaluate": evaluate.main, "export": export.main, "embed": embed.main,
    "score": score.main, "poisoned": train_with_a_poisoned_gradient, "unequal clocks": train_with_unequal_clocks,
    "signal in evaluation": train_with_a_signal_in_the_evaluation,
}


def run_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    try:
        PROGRAMS[case["program"]](case["argv"], lambda: world)
    except UserError as error:
        return {"error": type(error).__name__, "message": str(error), "everywhere": error.everywhere}
    return {"error": None, "message": "", "everywhere": True}


def write_results(work: Callable[[World], object], output: str) -> None:
    """Call ``work`` on every rank, and let rank 0 write what it returns there; end the job if it raises."""
    world = enter()
    try:
        results = work(world)
    except BaseException:
        traceback.print_exc()
        abort(world, 1)
    if world.rank == 0:
        Path(output).write_text(json.dumps(results))


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    write_results(lambda world: [world.allgather(run_case(case, world)) for case in cases], sys.argv[2])


if __name__ == "__main__":
    main()
