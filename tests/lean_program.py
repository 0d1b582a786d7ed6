"""Runs the programs where what only the tests require is absent: ``python -m tests.lean_program FOLDER PACKAGE...``.

The packages named are hidden from the start, as if they were not installed. All programs print their help, and those
that need no network run on a tiny corpus in FOLDER, once with AllenNLP's LSTM. ``done.json`` says what ran.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def hide(packages: set[str]) -> None:
    """Let Python find none of ``packages``."""
    find: Any = PathFinder.find_spec

    def visible(name: str, *rest: Any) -> ModuleSpec | None:
        return None if name.split(".")[0] in packages else find(name, *rest)

    setattr(PathFinder, "find_spec", visible)  # noqa: B010 (mypy allows no assignment to a method)
    shown = [name for name in packages if name in sys.modules or find_spec(name) is not None]
    assert not shown, f"{shown} can still be imported"


def commands_on_a_corpus(folder: Path) -> list[list[str]]:
    """Write a text into ``folder``; return command lines that make a corpus of it, train on it and use the models."""
    text, heldout, vocab, shards = (str(folder / name) for name in ("text.txt", "heldout.txt", "vocab.txt", "shards"))
    Path(text).write_text("the cat sat on the mat\na dog saw the cat\nthe dog sat\n" * 20)
    Path(heldout).write_text("the dog saw the mat\na cat sat\n" * 5)
    tiny = ["--projection-size", "8", "--cell-size", "16", "--epochs", "1", "--threads", "1", "--progress", "none"]
    train = ["train", "--shards", shards, "--vocab", vocab, "--device", "cpu", *tiny]
    run, allennlp = str(folder / "run"), str(folder / "allennlp")
    cpu = ["--threads", "1", "--device", "cpu"]
    return [
        ["preprocess", "vocab", text, "--output", vocab],
        ["preprocess", "shards", text, "--heldout", heldout, "--vocab", vocab, "--num-shards", "2", "--output", shards],
        ["preprocess", "inspect", shards],
        [*train, "--run-dir", run],
        [*train, "--run-dir", allennlp, "--lstm", "allennlp"],
        ["evaluate", allennlp, *cpu],
        ["score", run, heldout, "--output", str(folder / "scores.tsv"), *cpu],
        ["embed", run, heldout, "--output", str(folder / "vectors.hdf5"), *cpu],
        ["nearest", run, "cat"],
        ["export", run, "--output", str(folder / "elmo"), "--format", "elmo"],
        ["export", run, "--output", str(folder / "vectors.txt"), "--format", "word2vec"],
        ["export", run, "--output", str(folder / "hub"), "--format", "huggingface"],
        ["report", run, allennlp],
    ]


def main(folder: Path, packages: set[str]) -> None:
    """Run everything in this process, without MPI."""
    hide(packages)
    from lapse_elmo.commands import COMMANDS
    from lapse_elmo.mpi.world import solo
    from preprocess.cli import _COMMANDS as STEPS

    def run(name: str, *argv: str) -> None:
        importlib.import_module(COMMANDS[name].module).main(list(argv), solo)

    done = []
    for command in [*([name] for name in COMMANDS), *(["preprocess", step] for step in STEPS)]:
        try:
            run(*command, "--help")
        except SystemExit as stop:
            if stop.code:
                raise
            done.append([*command, "--help"])
    for command in commands_on_a_corpus(folder):
        run(*command)
        done.append(command[: 2 if command[0] == "preprocess" else 1])
    (folder / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), set(sys.argv[2:]))
