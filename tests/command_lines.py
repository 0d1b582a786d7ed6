"""Command lines and snippets in Markdown documents, and the options that the programs know."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from lapse_elmo.config import trained_model, training
from lapse_elmo.config.cli import options_of
from preprocess import cli as preprocess_cli

SCHEMAS: dict[str, type] = {
    "train": training.Config,
    "evaluate": trained_model.EvaluateConfig,
    "export": trained_model.ExportConfig,
    "embed": trained_model.EmbedConfig,
    "score": trained_model.ScoreConfig,
    "nearest": trained_model.NearestConfig,
    "report": trained_model.ReportConfig,
    **{f"preprocess {name}": schema for name, (schema, _) in preprocess_cli._COMMANDS.items()},
}
# The batch scripts pass their arguments to a program; those before the script's name are sbatch's.
SCRIPTS = {"slurm/train.sbatch": "train", "slurm/preprocess.sbatch": "preprocess"}
_END = re.compile(r"(?:;|&&|\|\|?|>|2>|#)")


def fenced(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def known_options(program: str) -> set[str]:
    """All options of a program; ``preprocess shards`` is one."""
    known = {"--help", "-h"}
    for group, field, hint in options_of(SCHEMAS[program]):
        if group:
            known.add("--config")
        if not field.metadata["positional"]:
            name = field.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if hint is bool else {f"--{name}"}
    return known


def called(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, options given) of each command in the shell blocks of ``text``."""
    for block in fenced(text, "sh", "console", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = _words(line)
            for i, word in enumerate(words):
                program = _program(word, words[i + 1 :])
                if program:
                    rest = words[i + 1 :]
                    ends = [j for j, other in enumerate(rest) if _END.match(other)]
                    given = rest[: ends[0]] if ends else rest
                    yield program, [other.split("=")[0] for other in given if re.match(r"--?[A-Za-z]", other)]
                    break


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation over several lines, for instance a program for awk
        return line.split()


def _program(word: str, rest: list[str]) -> str:
    """The program that ``word`` starts, "" if it starts none that we know."""
    name = word.removeprefix("bin/") if word.startswith("bin/") else SCRIPTS.get(word, "")
    if word == "lapse-elmo" and rest:
        name, rest = rest[0], rest[1:]
    if name == "preprocess" and rest and not rest[0].startswith("-"):
        name = f"preprocess {rest[0]}"
    return name if name in SCHEMAS else ""
