"""The lists of required packages agree with each other, and name every imported package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from lapse_elmo.commands import COMMANDS
from tests.mpi import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Modules of packages with another name, and what is not required: optional, or for tests.
MODULES = {"tomli_w": "tomli-w", "backports": "backports.zstd"}
OPTIONAL = {"allennlp", "transformers", "triton", "lapse", "adapm"}
NOT_IMPORTED = {"mpich", "setuptools"}  # mpi4py loads the one, tensorboard imports the other's pkg_resources
# What a full import of AllenNLP needs and no program of ours: names of modules.
TESTS_ONLY = (
    "transformers", "huggingface_hub", "spacy", "cached_path", "dill", "base58", "lmdb", "more_itertools",
    "torchvision", "fairscale",
)


def names(lines: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines if line.strip() and not line.startswith("#"))
    return {match.group().lower() for match in found if match}


def required() -> set[str]:
    return names((ROOT / "requirements.txt").read_text().splitlines())


def test_pyproject_and_requirements_name_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) == required()


def test_extras_are_in_the_lists_for_tests() -> None:
    """The pinned lists say with which versions the extras were tested."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) >= {"allennlp", "test", "docs"}
    lists = (ROOT / "requirements-dev.txt", ROOT / "requirements-dev-nodeps.txt")
    tested = {name for path in lists for name in names(path.read_text().splitlines())}
    assert {name.replace("_", "-") for name in TESTS_ONLY} <= tested - required()
    assert names([*extras["allennlp"], *extras["test"]]) <= tested
    assert names(extras["docs"]) == names((ROOT / "requirements-docs.txt").read_text().splitlines())


def test_everything_imported_is_required_and_the_other_way_round() -> None:
    imported: set[str] = set()
    for folder in ("lapse_elmo", "preprocess"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"lapse_elmo", "preprocess"} - OPTIONAL
    packages = {MODULES.get(name, name) for name in foreign}
    assert packages <= required() | {"tomllib"}
    assert required() <= packages | NOT_IMPORTED | {"tensorboard", "tomli"}


def test_the_programs_run_without_the_packages_of_the_tests(tmp_path: Path) -> None:
    """All of them, also with AllenNLP's LSTM; the import of a package within a function counts, too."""
    command = [sys.executable, "-m", "tests.lean_program", str(tmp_path), *TESTS_ONLY]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    done = json.loads((tmp_path / "done.json").read_text())
    assert {command[0] for command in done if "--help" not in command} == set(COMMANDS)
    assert [command[0] for command in done if command[1:] == ["--help"]] == list(COMMANDS)
    assert 'lstm = "allennlp"' in (tmp_path / "allennlp" / "config.toml").read_text()


def test_the_document_names_what_is_required() -> None:
    document = (ROOT / "docs/getting-started.md").read_text()
    listed = re.search(r"Set-up installs these packages:(.*?)\.\n", document, re.DOTALL)
    assert listed
    assert set(re.findall(r"`(.*?)`", listed[1])) == required()
