"""Parse the command line of ``bin/preprocess`` and run its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lapse_elmo.config.cli import parse_command
from lapse_elmo.config.preprocessing import (
    DemoTextOptions,
    DownloadOptions,
    InspectOptions,
    ShardsOptions,
    VocabOptions,
)
from lapse_elmo.mpi.world import World

from .demo_text import make_demo_text
from .download import download
from .inspect import inspect_shards
from .shards import make_shards
from .vocab import make_vocabulary

_COMMANDS: dict[str, tuple[type, str]] = {
    "vocab": (VocabOptions, "count the words of text and write a vocabulary"),
    "shards": (ShardsOptions, "encode training and held-out text into HDF5 shards"),
    "inspect": (InspectOptions, "describe shards and verify their checksums"),
    "demo-text": (DemoTextOptions, "make a small English corpus from the Python documentation on this machine"),
    "download": (DownloadOptions, "download the 1 Billion Word Benchmark and ELMo's vocabulary"),
}
_HANDLERS: dict[str, Callable[[Any, World], None]] = {
    "vocab": make_vocabulary,
    "shards": make_shards,
    "inspect": inspect_shards,
    "demo-text": make_demo_text,
    "download": download,
}


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run one command.

    Args:
        argv: The command and its options.
        enter: Starts MPI; called after the options have been checked.
    """
    name, options = parse_command(
        _COMMANDS, argv, prog="bin/preprocess", description="Turn text into a vocabulary and shards for bin/train."
    )
    world = enter()
    if name in ("vocab", "shards", "demo-text"):
        _HANDLERS[name](options, world)
        return

    world.agree(lambda: _HANDLERS[name](options, world))  # the other commands run on rank 0 alone
