"""The documents agree with the code: links, names of files, command lines, snippets, and the words they use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo import train
from lapse_elmo.mpi.world import solo
from lapse_elmo.trained import SentenceScore
from tests.command_lines import called, fenced, known_options, strings_of
from tests.mpi import ROOT
from tests.training.corpora import TINY, prepare

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
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make train` leaves it, except that text and model are tiny."""
    folder = tmp_path_factory.mktemp("documents")
    prepare(folder / "data", SENTENCES, SENTENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(arguments_of_make_train(folder, *TINY, "--max-steps", "2"), solo)
    return folder


def arguments_of_make_train(folder: Path, *options: str) -> list[str]:
    """Return what `make train` in ``folder`` passes to bin/train, with ``options`` instead of a limit of minutes."""
    make = ["make", "--dry-run", "--old-file=.venv/.installed", f"--file={ROOT / 'Makefile'}"]
    command = [*make, "train", f"TRAIN_OPTIONS={' '.join(options)}"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "RUN_DIR"))}
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()[-1].partition(" bin/train ")[2].split()


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
def test_snippets_run_after_make_train(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python blocks, one after another in one namespace."""
    (made / "text.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(made)
    blocks = fenced((ROOT / name).read_text(encoding="utf-8"), "python")
    found: dict[str, Any] = {}
    exec(compile("".join(blocks), name, "exec"), found)
    vectors = found["vectors"][0] if name == "README.md" else found["vectors"]  # the guide ends in a loop over a text
    assert vectors.shape[::2] == (3, 32) and vectors.dtype == np.float32 and vectors.any()
    (score,) = found["scores"]
    assert isinstance(score, SentenceScore) and not score.unknown.any()
    assert (score.forward < 0).all() and (score.backward < 0).all()
    neighbours, cosines = zip(*found["neighbours"], strict=True)
    assert "words" not in neighbours and set(neighbours) < set(" ".join(SENTENCES).split())
    assert sorted(cosines, reverse=True) == list(cosines) and -1 <= cosines[-1] < cosines[0] <= 1


def test_make_train_leaves_an_earlier_run_alone(made: Path, tmp_path: Path) -> None:
    assert arguments_of_make_train(made, "--epochs", "1") == ["--epochs", "1"]
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)  # of a run that ended before its first save
    assert arguments_of_make_train(tmp_path, "--epochs", "1")[:2] == ["--run-dir", "runs/first"]


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
