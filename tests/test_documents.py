"""The documents agree with the code: links, names of files and symbols, options, and the words they use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.command_lines import called, known_options
from tests.mpi import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
SOURCES = [
    str(path.relative_to(ROOT)) for folder in ("lapse_elmo", "preprocess", "tests", "benchmarks")
    for pattern in ("*.py", "*.c") for path in sorted((ROOT / folder).rglob(pattern))
]
OTHERS_FILES = {"train_elmo.py"}  # of bilm-tf
NEWLINE = "\n"
_WRITTEN = {".py", ".c", ".sh", ".sbatch", ".def", ".lsf", ".pbs", ".flux", ""}
_PATH = re.compile(r"(?<![\w/.*-])(?:lapse_elmo|preprocess|tests|benchmarks|docs|slurm|bin)/[\w./-]*\w")
# `Class.method` (`file.py`), or `Class` in `file.py`: what a document says to be in a file.
_PLACED = re.compile(r"(?:((?:`[\w.]+(?:\(\))?`(?:, | and )?)+) \(|(`[\w.]+`) in )`([\w/]+\.(?:py|c))`")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_named_files_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = {name for name in _PATH.findall(text) if not (ROOT / name).exists() and not stands_for_others(name)}
    assert sorted(missing) == []


def stands_for_others(name: str) -> bool:
    """Whether it is a module without its suffix, or has a placeholder in capitals: bin/PROGRAM."""
    return (ROOT / f"{name}.py").exists() or name.rpartition("/")[2].isupper()


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_named_symbols_are_in_their_files(path: Path) -> None:
    wrong = [
        f"{name} is not in {file}" for name, file in placed(path.read_text(encoding="utf-8"))
        if file not in OTHERS_FILES and not any(has(candidate, name) for candidate in candidates(file))
    ]
    assert wrong == []


def placed(text: str) -> list[tuple[str, str]]:
    """All pairs of a name and the file that a document says it is in."""
    pairs = _PLACED.findall(" ".join(text.split()))
    return [(name, file) for several, one, file in pairs for name in re.findall(r"`([\w.]+)", several or one)]


def candidates(file: str) -> list[str]:
    """The source files that a document can mean by ``file``."""
    return [path for path in SOURCES if f"/{path}".endswith(f"/{file}")]


def has(path: str, name: str) -> bool:
    """Whether the file defines the name, or begins a string with it; for Class.method both. An import is not enough."""
    text = (ROOT / path).read_text(encoding="utf-8")
    defined = r"(?:def|class) {0}\b|^\s*(?:self\.|[\w, ]*, )?{0}\b[\w, ]*[:=]|[\"']{0}\b|^\w[^=\n]* \*?{0}\("
    return all(re.search(defined.format(part), text, re.M) for part in name.split("."))


def test_symbols_are_found() -> None:
    text = "`Saver.start` (`saver.py`) calls `a` and\n`b` (`step.py`, `c.py`); `NodeMemory` in `mpi/node_memory.py`"
    memory = "mpi/node_memory.py"
    assert placed(text) == [("Saver.start", "saver.py"), ("a", "step.py"), ("b", "step.py"), ("NodeMemory", memory)]
    assert has("lapse_elmo/ahead.py", "announce_ahead") and not has("lapse_elmo/train.py", "announce_ahead")


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_links_resolve(path: Path) -> None:
    """Relative links lead to files, and their anchors to headings."""
    broken = []
    for target, anchor in _LINK.findall(path.read_text(encoding="utf-8")):
        linked = path.parent / target if target else path
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert broken == []


def anchors(path: Path) -> set[str]:
    """The anchors that headings get, on a code host and on the site."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in words} | set(re.findall(r'id="([^"]+)"', text))


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", index)
    assert listed == sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in listed] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_options_of_command_lines_exist(path: Path) -> None:
    unknown = [
        f"{program} {option}"
        for program, given in called(path.read_text(encoding="utf-8"))
        for option in given
        if option not in known_options(program)
    ]
    assert unknown == []


def test_command_lines_are_found() -> None:
    lines = "```sh\nmpirun -n 2 bin/train --lookahead 3 && ls -l\nlapse-elmo preprocess shards TEXT --no-such 1\n```\n"
    assert list(called(lines)) == [("train", ["--lookahead"]), ("preprocess shards", ["--no-such"])]
    assert "--lookahead" in known_options("train") and "--no-such" not in known_options("preprocess shards")


def forbidden(name: str) -> list[str]:
    lines = (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()
    return [line.partition(" = ")[0] for line in lines if line and not line.startswith("#")]


def texts() -> Iterator[tuple[Path, str]]:
    """All documents and sources that people write and read."""
    for path in (*DOCUMENTS, ROOT / "Makefile", ROOT / ".ci" / "run"):
        yield path, path.read_text(encoding="utf-8")
    for folder in ("lapse_elmo", "preprocess", "benchmarks", "tests", "bin", "slurm", "container"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _WRITTEN and path.is_file() and not path.name.startswith("forbidden_"):
                yield path, path.read_text(encoding="utf-8")


def phrase_pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    """Finds phrases also where they go over lines of a comment, or over two strings."""
    gap = r"[\s#\"'*/]+"
    words = "|".join(gap.join(map(re.escape, phrase.split())) for phrase in phrases)
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.I)


def test_no_forbidden_phrases() -> None:
    """The phrases of tests/forbidden_phrases.txt have plainer equivalents, which the file names."""
    search = phrase_pattern(forbidden("forbidden_phrases.txt"))
    found = [
        f"{label(path)}:{text.count(NEWLINE, 0, match.start()) + 1}: {match.group()}"
        for path, text in texts() for match in search.finditer(text)
    ]
    assert found == []


def test_forbidden_phrases_are_found() -> None:
    search = phrase_pattern(["two green apples"])
    assert search.search('after "two "\n    "green apples"') and search.search("# Two green\n    # apples")
    assert not search.search("two green apples-and-pears")


def identifiers_of(path: Path) -> set[str]:
    """All names that a Python file defines, with those of attributes and arguments."""
    return {
        name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, field, None) for field in ("id", "attr", "name", "arg")) if isinstance(name, str)
    }


def test_no_forbidden_identifiers() -> None:
    """The names of tests/forbidden_identifiers.txt have standard ones in their place, which the file names."""
    names = forbidden("forbidden_identifiers.txt")
    words = {name for name in names if name.islower()}
    # Most files need not be parsed.
    anywhere = re.compile("|".join(rf"(?<![a-z]){name}(?![a-z])|{name.capitalize()}|{name.upper()}" for name in names))
    found = [
        f"{label(path)}: {name}" for path, text in texts() if path.suffix == ".py" and anywhere.search(text)
        for name in identifiers_of(path)
        if name in names or words & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    ]
    assert found == []
