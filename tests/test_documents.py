"""Files that CONTRIBUTING.md and the decisions name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mpi import ROOT

DOCUMENTS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
_PATH = re.compile(r"(?<![\w/.*-])(?:lapse_elmo|preprocess|tests|benchmarks|docs|slurm|bin)/[\w./-]*\w")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = {ROOT / name for name in _PATH.findall(text)}
    linked = {path.parent / name for name in re.findall(r"\]\(([\w./-]+)\)", text)}
    assert sorted(str(missing) for missing in named | linked if not missing.exists()) == []


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", index)
    assert listed == sorted(path.name for path in (ROOT / "docs" / "decisions").glob("0*.md"))
