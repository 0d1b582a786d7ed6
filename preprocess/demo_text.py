"""``demo-text``: make a small corpus of real English from the documentation of the installed Python.

The sources are the docstrings and longer comments of the standard library and of the installed packages (read from the
source files; nothing is imported), their text files, the service descriptions of botocore if it is installed, and the
language reference of :mod:`pydoc`. :mod:`preprocess.prose` extracts sentences from them. If sentences differ only in
names and numbers, one of them is kept. Sentences are ordered by a hash, so the same installation always gives the same
text.
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
from lapse_elmo.corpus.files import atomic_write, refuse_existing
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World, solo

from .progress import print_once, progress_bar
from .prose import deduplication_key, sentences
from .staging import Staging

_MAX_HELDOUT = 2_500
_HELDOUT_FRACTION = 0.02
_MAX_FILE_BYTES = 4 << 20
#: A triple-quoted string in the position of a docstring. A regular expression, since parsing all files with ast takes
#: minutes.
_DOCSTRING = re.compile(r'(?:\A|:[^\n]*\n|\n\n)\s*[rRuU]?("""|\'\'\')(.*?)\1', re.DOTALL)
_COMMENT = re.compile(r"(?:^[ \t]*# [^\n]*\n){2,}", re.MULTILINE)
_SERVICE = "service-2.json.gz"
_SERVICE_TEXT = re.compile(r'"documentation":("(?:[^"\\]|\\.)*")')
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "licenses", "node_modules"}


def make_demo_text(options: DemoTextOptions, world: World) -> None:
    """Run the command (collective); each rank reads a part of the files.

    Raises:
        OutputError: The output exists or cannot be written.
        CorpusError: This machine has too little documentation.
    """
    started = time.perf_counter()
    world.agree(lambda: refuse_existing(options.output, options.overwrite))
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    found = collect(dict.fromkeys(path.resolve() for path in roots), world)
    train, heldout = world.agree(lambda: _write(options, found, roots[0]))
    print_once(
        world,
        f"{options.output}: {len(train):,} training sentences, {_num_tokens(train):,} tokens; {len(heldout):,} "
        f"held-out sentences, {_num_tokens(heldout):,} tokens; {time.perf_counter() - started:.0f} s",
    )


def _write(options: DemoTextOptions, found: Sequence[str], library: Path) -> tuple[list[str], list[str]]:
    """Write the files, on one rank; returns the training and the held-out sentences."""
    with Staging(solo(), options.output, options.overwrite) as staging:
        train, heldout = split(found, options.max_tokens)
        if len(train) < options.num_files:
            raise CorpusError(
                f"{len(train)} training sentences found in the documentation of the Python at {library}, expected "
                f"{options.num_files} or more; install its complete standard library"
            )
        directory = staging.directory / "new"
        files = {f"train-{n:05d}-of-{options.num_files:05d}.txt": train[n :: options.num_files]
                 for n in range(options.num_files)}
        files["heldout-00000-of-00001.txt"] = heldout
        for name, content in files.items():
            atomic_write(directory / name, "".join(f"{sentence}\n" for sentence in content).encode())
        atomic_write(directory / "SOURCES.txt", _sources().encode())
        staging.publish("new")
    return train, heldout


def collect(roots: Iterable[Path], world: World) -> list[str]:
    """Collect the sentences of all files below ``roots``, without near-duplicates (collective).

    Of near-duplicates the one with the lowest hash is kept, so the result does not depend on the number of ranks.

    Returns:
        On rank 0 the sentences, ordered by hash; on other ranks an empty list.
    """
    seen_documents: set[bytes] = set()
    found: dict[str, str] = {}
    paths = [path for root in roots for path in _files(root)][world.rank :: world.size]
    with progress_bar(world, len(paths), "file", "reading") as progress:
        for path in paths:
            for document in documents(path):
                # Whole documents first: many packages bring copies of the same text, and extraction is slow.
                key = _hash(document)
                if key not in seen_documents:
                    seen_documents.add(key)
                    _keep_lowest_hash(found, sentences(document))
            progress.update(1)
    # The ranks have read different files, which may hold near-duplicates of each other.
    for part in world.allgather(list(found.values()) if world.size > 1 else []):
        if world.rank == 0:
            _keep_lowest_hash(found, part)
    return sorted(found.values(), key=_hash) if world.rank == 0 else []


def _keep_lowest_hash(found: dict[str, str], more: Iterable[str]) -> None:
    for sentence in more:
        kept = found.setdefault(deduplication_key(sentence), sentence)
        if kept != sentence and _hash(sentence) < _hash(kept):
            found[deduplication_key(sentence)] = sentence


def split(found: Sequence[str], max_tokens: int | None) -> tuple[list[str], list[str]]:
    """Split sentences into training and held-out ones.

    The held-out sentences are the first, so that they hardly depend on ``max_tokens``.

    Args:
        found: The sentences.
        max_tokens: Maximum number of tokens of both together; None for no limit.

    Returns:
        The training and the held-out sentences.
    """
    total = len(found)
    if max_tokens is not None:
        ends = itertools.accumulate(sentence.count(" ") + 1 for sentence in found)
        total = sum(end <= max_tokens for end in ends)
    num_heldout = min(_MAX_HELDOUT, int(_HELDOUT_FRACTION * total))
    return list(found[num_heldout:total]), list(found[:num_heldout])


def _files(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        # Sorted, so that ranks agree on whose file is whose; in place, so that os.walk skips what is left out.
        names[:] = sorted(name for name in names if name not in _SKIPPED)
        for name in sorted(files):
            path = Path(directory, name)
            if path.suffix in (".py", ".rst", ".md") or (name == _SERVICE and _is_taken(path)):
                yield path


def _is_taken(service: Path) -> bool:
    """Return whether a service of botocore is used: half of them are, since all would be more than half of the text."""
    return _hash(service.parent.parent.name)[0] % 2 == 0


def _hash(text: str) -> bytes:
    # Not Python's hash, which differs from process to process.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _num_tokens(content: Sequence[str]) -> int:
    return sum(sentence.count(" ") + 1 for sentence in content)


def _sources() -> str:
    """List the packages that the text was taken from, whose licences apply to it."""
    names = {(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}
    lines = [f"{name} {version}" for name, version in sorted(names, key=lambda n: (n[0].lower(), n[1])) if name]
    head = "Sentences from the documentation in these packages, each under its own licence:"
    return "\n".join([head, f"Python {platform.python_version()}", *lines]) + "\n"


def documents(path: Path) -> Iterator[str]:
    """Yield the documentation in one file, text by text; nothing for a file that cannot be read as text."""
    try:
        if path.suffix == ".gz":
            for found in _SERVICE_TEXT.findall(gzip.decompress(path.read_bytes()).decode("utf-8")):
                yield json.loads(found)
            return
        if path.stat().st_size > _MAX_FILE_BYTES:
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
    """Yield the values of the dictionary in ``pydoc_data/topics.py``."""
    try:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Dict):
                yield from (v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str))
    except SyntaxError:
        return
