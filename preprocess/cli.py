"""The commands of ``bin/preprocess``."""

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
    "vocab": (VocabOptions, "make a vocabulary from text"),
    "shards": (ShardsOptions, "encode training and held-out text into HDF5 shards"),
    "inspect": (InspectOptions, "describe and verify shards"),
    "demo-text": (DemoTextOptions, "collect English text from the documentation on this machine"),
    "download": (DownloadOptions, "fetch the 1 Billion Word Benchmark and ELMo's vocabulary"),
}
_VERBS: dict[str, Callable[[Any, World], None]] = {
    "vocab": make_vocabulary,
    "shards": make_shards,
    "inspect": inspect_shards,
    "demo-text": make_demo_text,
    "download": download,
}


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Run one command; ``enter`` joins the MPI world once the options are known to be good."""
    name, options = parse_command(
        _COMMANDS, argv, prog="bin/preprocess", description="From text to a vocabulary and shards."
    )
    world = enter()
    if name in ("vocab", "shards", "demo-text"):
        _VERBS[name](options, world)
        return

    world.agree(lambda: _VERBS[name](options, world))  # verbs for one process; further ranks only wait for it
