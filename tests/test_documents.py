"""The documents agree with the code: links, names of files, command lines, snippets, and the words they use."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.command_lines import called, fenced, known_options, strings_of
from tests.mpi import ROOT
from tests.training.corpora import prepare, train_alone

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
_PATH = re.compile(r"(?<![\w/.*-])(?:lapse_elmo|preprocess|tests|benchmarks|docs|slurm|bin)/[\w./-]*\w")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
SENTENCES = ["the words of a sentence", "and of another", "a word list", "time people the list", "words and people"] * 4


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose vocabulary has the words of the snippets."""
    folder = tmp_path_factory.mktemp("documents")
    return train_alone(prepare(folder, SENTENCES, SENTENCES), folder / "run", "--max-steps", "2")


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_named_files_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = {name for name in _PATH.findall(text) if not (ROOT / name).exists() and not stands_for_others(name)}
    assert sorted(missing) == []


def stands_for_others(name: str) -> bool:
    """Whether it is a module without its suffix, or has a placeholder in capitals: bin/PROGRAM."""
    return (ROOT / f"{name}.py").exists() or name.rpartition("/")[2].isupper()


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


@pytest.mark.parametrize("name", ["README.md", "docs/using-a-model.md"])
def test_snippets_run(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python blocks, one after another in one namespace, with a tiny model as runs/first."""
    shutil.copytree(model, tmp_path / "runs" / "first", symlinks=True)
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    blocks = fenced((ROOT / name).read_text(encoding="utf-8"), "python")
    assert blocks
    namespace: dict[str, object] = {}
    exec(compile("".join(blocks), name, "exec"), namespace)
    vectors = namespace["vectors"]
    assert isinstance(vectors, list | np.ndarray) and vectors[0].dtype == np.float32


def phrases() -> list[str]:
    lines = (ROOT / "tests" / "forbidden_phrases.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition(" = ")[0] for line in lines if line and not line.startswith("#")]


def pieces_of_text() -> Iterator[tuple[str, str]]:
    """(place, text) of all that people read: documents, docstrings, help texts and messages."""
    for path in DOCUMENTS:
        for number, paragraph in enumerate(path.read_text(encoding="utf-8").split("\n\n"), 1):
            yield f"{label(path)}, paragraph {number}", paragraph
    for folder in ("lapse_elmo", "preprocess", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in strings_of(path):
                yield f"{label(path)}:{line}", text


def test_no_forbidden_phrases() -> None:
    """The phrases of tests/forbidden_phrases.txt have plainer equivalents, which the file names."""
    search = re.compile(r"\b(?:" + "|".join(re.escape(phrase) for phrase in phrases()) + r")\b", re.I)
    found = [
        f"{place}: {match.group()}" for place, text in pieces_of_text()
        for match in search.finditer(" ".join(text.split()))
    ]
    assert found == []
