"""The command ``lapse-elmo`` and its sub-commands, which are also the programs in ``bin/``.

Nothing heavy is imported before it is needed: the overview and ``--version`` load neither torch nor MPI, and a
sub-command parses its options before it loads torch, so that ``--help`` and mistakes are answered at once. MPI starts
when the sub-command calls ``enter``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lapse_elmo
from lapse_elmo.program import COMMAND, prepare_process

if TYPE_CHECKING:
    from lapse_elmo.mpi.world import World


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        summary: its line in the overview.
        module: the module with its ``main(argv, enter)``, which may import torch.
        parser: ``module:function`` that parses the same options without torch; empty if ``module`` is light itself.
    """

    summary: str
    module: str
    parser: str = ""


_TRAINED = "lapse_elmo.config.trained_model"
COMMANDS = {
    "preprocess": Command("make a vocabulary and shards from text", "preprocess.cli"),
    "train": Command("train a model on shards", "lapse_elmo.train", "lapse_elmo.config.training:parse_train"),
    "evaluate": Command("held-out perplexity of a saved model", "lapse_elmo.evaluate", f"{_TRAINED}:parse_evaluate"),
    "export": Command("write a model in the files of other programs", "lapse_elmo.export", f"{_TRAINED}:parse_export"),
    "embed": Command("contextual vectors of text", "lapse_elmo.embed", f"{_TRAINED}:parse_embed"),
    "score": Command("surprisal of words, perplexity of text", "lapse_elmo.score", f"{_TRAINED}:parse_score"),
    "nearest": Command("neighbours of words", "lapse_elmo.nearest", f"{_TRAINED}:parse_nearest"),
    "report": Command("an HTML page of runs: curves, speed, options", "lapse_elmo.report", f"{_TRAINED}:parse_report"),
}


def main() -> None:
    """Run ``lapse-elmo COMMAND [OPTION ...]``; the console script that ``pip install`` makes calls this."""
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS:
        run(argv[0], argv[1:])
        return
    prepare_process()
    from lapse_elmo.mpi.launch import launch

    launch(_overview, argv, prog=COMMAND)


def run(name: str, argv: list[str]) -> None:
    """Run one sub-command as a program, which ends with one of the statuses that signals.py lists."""
    prepare_process()
    from lapse_elmo.mpi.launch import launch

    launch(lambda argv, enter: _run(COMMANDS[name], argv, enter), argv, prog=f"bin/{name}")


def _run(command: Command, argv: list[str], enter: Callable[[], World]) -> int | None:
    from lapse_elmo.mpi.signals import interrupts_end_the_process

    if command.parser:
        module, _, function = command.parser.partition(":")
        getattr(importlib.import_module(module), function)(argv)  # main parses again, which takes milliseconds
    # A KeyboardInterrupt within torch's import may end in any error.
    with interrupts_end_the_process(), _kept_for_good():
        module_of_main = importlib.import_module(_installed(command.module))
    status: int | None = module_of_main.main(argv, enter)
    return status


@contextlib.contextmanager
def _kept_for_good() -> Iterator[None]:
    """Exempt what is made within from the search for cyclic garbage.

    torch makes some 170,000 objects that stay until the process ends. They would be searched three times while they are
    imported, again when Python ends, and during training, where all ranks wait for the one that searches.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _installed(module: str) -> str:
    """Return where ``module`` is: the wheel has the repository's directory preprocess/ as ``lapse_elmo.preprocess``."""
    package = module.partition(".")[0]
    within = importlib.util.find_spec(f"lapse_elmo.{package}") if package != "lapse_elmo" else None
    return f"lapse_elmo.{module}" if within else module


def _overview(argv: list[str], enter: Callable[[], World]) -> int | None:
    from lapse_elmo.config.cli import unknown_name
    from lapse_elmo.errors import ConfigError
    from lapse_elmo.mpi.launcher import launcher_rank_and_size
    from lapse_elmo.mpi.signals import COMPLETE, USER_ERROR

    if argv and argv[0] not in ("-h", "--help", "--version"):
        raise ConfigError(f"{unknown_name('command', argv[0], list(COMMANDS))} (see {COMMAND} --help)")
    if launcher_rank_and_size()[0] == 0:
        print(f"{COMMAND} {lapse_elmo.__version__}" if argv == ["--version"] else _usage())
    return COMPLETE if argv else USER_ERROR


def _usage() -> str:
    lines = [
        f"usage: [mpirun -n RANKS] {COMMAND} COMMAND [OPTION ...]", "",
        "Train a sparse ELMo on many MPI ranks, and use it.", "", "commands:",
    ]
    lines += [f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{COMMAND} COMMAND --help shows the options of a command, {COMMAND} --version the version."]
    return "\n".join(lines)
