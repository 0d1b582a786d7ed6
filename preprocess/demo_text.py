"""``demo-text``: a corpus of real English that every machine has, the documentation of its Python.

Taken are the docstrings and longer comments of the standard library and of the installed packages (found in the source
files, nothing is imported), their text files, the service descriptions that botocore brings where it is installed, and
the language reference that :mod:`pydoc` shows. See :mod:`preprocess.prose` for how they become sentences. Sentences
that differ only in names and numbers are taken once, in the order of a hash, so an installation gives the same text.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lapse_elmo.config.preprocessing import DemoTextOptions
from lapse_elmo.corpus.files import refuse_existing, write_whole
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World, solo

from .progress import bar, say
from .prose import near_key, sentences
from .staging import Staging

_MAX_HELDOUT = 2_500
_HELDOUT_SHARE = 0.02
_LONGEST_FILE = 4 << 20
#: A triple-quoted string where a docstring can stand. Parsing every file with ast took minutes.
_DOCSTRING = re.compile(r'(?:\A|:[^\n]*\n|\n\n)\s*[rRuU]?("""|\'\'\')(.*?)\1', re.DOTALL)
_COMMENT = re.compile(r"(?:^[ \t]*# [^\n]*\n){2,}", re.MULTILINE)
_SERVICE = "service-2.json.gz"
_SERVICE_TEXT = re.compile(r'"documentation":("(?:[^"\\]|\\.)*")')
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "licenses", "node_modules"}


def make_demo_text(options: DemoTextOptions, world: World) -> None:
    """Run the command, on every rank; they share the reading. :raises OutputError: if the output exists or cannot be
    written. :raises CorpusError: if this machine has next to no documentation.
    """
    started = time.perf_counter()
    world.agree(lambda: refuse_existing(options.output, options.overwrite))
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    found = collect(dict.fromkeys(path.resolve() for path in roots), world)
    train, heldout = world.agree(lambda: _write(options, found, roots[0]))
    say(world, f"{options.output}: {len(train):,} training sentences, {_num_tokens(train):,} tokens; {len(heldout):,} "
               f"held-out sentences, {_num_tokens(heldout):,} tokens; {time.perf_counter() - started:.0f} s")


def _write(options: DemoTextOptions, found: Sequence[str], library: Path) -> tuple[list[str], list[str]]:
    """Write the files, on one rank; (training, held-out) sentences."""
    with Staging(solo(), options.output, options.overwrite) as staging:
        train, heldout = split(found, options.max_tokens)
        if len(train) < options.num_files:
            raise CorpusError(f"the Python at {library} brings no documentation; install its standard library in full")
        directory = staging.directory / "new"
        files = {f"train-{n:05d}-of-{options.num_files:05d}.txt": train[n :: options.num_files]
                 for n in range(options.num_files)}
        files["heldout-00000-of-00001.txt"] = heldout
        for name, content in files.items():
            write_whole(directory / name, "".join(f"{sentence}\n" for sentence in content).encode())
        write_whole(directory / "SOURCES.txt", _sources().encode())
        staging.publish("new")
    return train, heldout


def collect(roots: Iterable[Path], world: World) -> list[str]:
    """All sentences below ``roots``, near-duplicates once, in the order of their hashes; on rank 0.

    Of near-duplicates the one with the least hash stays, so that the ranks may share the files in any way.
    """
    seen_documents: set[bytes] = set()
    found: dict[str, str] = {}
    paths = [path for root in roots for path in _files(root)][world.rank :: world.size]
    with bar(world, len(paths), "file", "reading") as progress:
        for path in paths:
            for document in documents(path):
                key = _hash(document)
                if key not in seen_documents:
                    seen_documents.add(key)
                    _keep_least(found, sentences(document))
            progress.update(1)
    for part in world.allgather(list(found.values()) if world.size > 1 else []):
        if world.rank == 0:
            _keep_least(found, part)
    return sorted(found.values(), key=_hash) if world.rank == 0 else []


def _keep_least(found: dict[str, str], more: Iterable[str]) -> None:
    for sentence in more:
        kept = found.setdefault(near_key(sentence), sentence)
        if kept != sentence and _hash(sentence) < _hash(kept):
            found[near_key(sentence)] = sentence


def split(found: Sequence[str], max_tokens: int | None) -> tuple[list[str], list[str]]:
    """(training, held-out) sentences; the held-out ones are the first, so they do not depend on much else."""
    total = len(found)
    if max_tokens is not None:
        ends = itertools.accumulate(sentence.count(" ") + 1 for sentence in found)
        total = sum(end <= max_tokens for end in ends)
    num_heldout = min(_MAX_HELDOUT, int(_HELDOUT_SHARE * total))
    return list(found[num_heldout:total]), list(found[:num_heldout])


def _files(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _SKIPPED)
        for name in sorted(files):
            path = Path(directory, name)
            if path.suffix in (".py", ".rst", ".md") or (name == _SERVICE and _is_taken(path)):
                yield path


def _is_taken(service: Path) -> bool:
    """Half of botocore's services: all of them would be more than half of the text."""
    return _hash(service.parent.parent.name)[0] % 2 == 0


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _num_tokens(content: Sequence[str]) -> int:
    return sum(sentence.count(" ") + 1 for sentence in content)


def _sources() -> str:
    """What the text was taken from: it stays under the licences of these packages."""
    names = {(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}
    lines = [f"{name} {version}" for name, version in sorted(names, key=lambda n: (n[0].lower(), n[1])) if name]
    head = "Sentences from the documentation in these packages, each under its own licence:"
    return "\n".join([head, f"Python {platform.python_version()}", *lines]) + "\n"


def documents(path: Path) -> Iterator[str]:
    """The pieces of documentation in one file; nothing for a file that cannot be read as text."""
    try:
        if path.suffix == ".gz":
            for found in _SERVICE_TEXT.findall(gzip.decompress(path.read_bytes()).decode("utf-8")):
                yield json.loads(found)
            return
        if path.stat().st_size > _LONGEST_FILE:
            return
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError):
        return
    if path.name == "topics.py" and path.parent.name == "pydoc_data":
        yield from _topics(text)
    elif path.suffix == ".py":
        yield from (match.group(2) for match in _DOCSTRING.finditer(text))
        for match in _COMMENT.finditer(text):
            yield "\n".join(line.strip()[2:] for line in match.group().splitlines())
    else:
        yield text


def _topics(source: str) -> Iterator[str]:
    """The values of the one dictionary of ``pydoc_data/topics.py``."""
    try:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Dict):
                yield from (v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str))
    except SyntaxError:
        return
