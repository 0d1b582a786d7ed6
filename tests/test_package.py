"""``pip install .``: the source distribution, the wheel that is built from it, and the command ``lapse-elmo``.

The wheel is installed into an environment of its own, which finds the dependencies in this one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import lapse_elmo
from lapse_elmo import native
from lapse_elmo.commands import COMMANDS
from lapse_elmo.program import PROGRAMS, as_called
from tests import mpi

# What a checkout holds in addition to its sources.
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "data", "runs", "build", "dist", "site", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)
HEAVY = ("torch", "mpi4py", "h5py", "matplotlib")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build an ``sdist`` or a ``wheel`` as pip does without build isolation, from the files in ``source``."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)], cwd=source, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(mpi.ROOT, folder / "tree", ignore=NOT_SOURCES)
    with tarfile.open(build("sdist", folder / "tree", folder)) as archive:
        archive.extractall(folder, filter="data")
    (path,) = (path for path in folder.glob("lapse_elmo-*") if path.is_dir())
    return path


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Installed:
    """The installed package. ``run`` starts its command in an empty folder; ``env`` has no trace of the checkout."""

    prefix: Path
    folder: Path
    env: dict[str, str]

    def run(
        self, *words: str, python: tuple[str, ...] = (), ranks: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        launcher = [str(mpi.MPIRUN), "-n", str(ranks)] if ranks else []
        command = [*launcher, str(self.prefix / "bin" / "python"), *python, str(self.prefix / "bin" / "lapse-elmo")]
        return subprocess.run(
            [*command, *words], cwd=self.folder, env={**self.env, **(env or {})}, capture_output=True, text=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    prefix = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=60)
    python = str(prefix / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=60)
    paths = sysconfig.get_paths(vars={"base": str(prefix), "platbase": str(prefix)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (folder / "empty").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith((*mpi.LAUNCHER_PREFIXES, "PYTHON"))}
    env |= {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": f"{sys.prefix}/lib"}
    return Installed(prefix, folder / "empty", env)


def test_the_sdist_has_what_the_tests_and_programs_need(unpacked: Path) -> None:
    for name in ("bin/train", "preprocess/cli.py", "slurm/train.sbatch", "tests/conftest.py", "Makefile", "LICENSE"):
        assert (unpacked / name).is_file(), name


def test_the_wheel_has_one_package_with_everything_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names if ".dist-info/" not in name} == {"lapse_elmo"}
    wanted = {
        ("" if folder == "lapse_elmo" else "lapse_elmo/") + str(path.relative_to(mpi.ROOT))
        for folder in ("lapse_elmo", "preprocess") for path in (mpi.ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c", ".html", ".typed")
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"lapse_elmo/ps/rows.c", "lapse_elmo/report/page.html", "lapse_elmo/py.typed"} <= wanted


def test_the_overview_loads_neither_torch_nor_mpi(installed: Installed) -> None:
    for words, status in ((("--help",), 0), (("--version",), 0), (("tarin",), 2), (("score", "--help"), 0), ((), 2)):
        done = installed.run(*words, python=("-X", "importtime"))
        assert done.returncode == status, done.stderr
        modules = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
        assert "lapse_elmo" in modules and not modules & set(HEAVY), words
        assert words != ("--help",) or all(name in done.stdout for name in PROGRAMS)


def test_an_unknown_command_is_one_line(installed: Installed) -> None:
    for ranks in (0, 2):
        done = installed.run("tarin", ranks=ranks)
        assert done.returncode == 2 and not done.stdout
        ours = [line for line in done.stderr.splitlines() if line.startswith("lapse-elmo")]
        assert ours == ["lapse-elmo: error: unknown command 'tarin', did you mean 'train'? (see lapse-elmo --help)"]


def test_from_text_to_a_plan_of_training(installed: Installed, tmp_path: Path) -> None:
    for name in ("text", "heldout"):
        (installed.folder / name).write_text("the words of a sentence\n" * 40)
    for words in (
        ("vocab", "text", "--output", "vocab.txt"),
        ("shards", "text", "--heldout", "heldout", "--vocab", "vocab.txt", "--num-shards", "2", "--output", "shards"),
    ):
        done = installed.run("preprocess", *words, env={"LAPSE_ELMO_CACHE": str(tmp_path)})
        assert done.returncode == 0, done.stderr
    if native.find_compiler():
        assert list(tmp_path.glob("words-*.so")), "words.c of the installed package was not compiled"
    options = ("--shards", "shards", "--vocab", "vocab.txt", "--device", "cpu", "--num-samples", "2", "--dry-run")
    done = installed.run("train", *options, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (installed.folder / "runs").exists()
    done = installed.run("preprocess", "inspect", "nowhere.h5", "--vocab", "vocab.txt")
    assert done.returncode == 2 and "with lapse-elmo preprocess shards" in done.stderr, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_modules_of_commands_exist(name: str) -> None:
    """Every module that a command names exists; mypy does not check it, since the names are strings."""
    assert importlib.util.find_spec(COMMANDS[name].module) is not None
    module, _, function = COMMANDS[name].parser.partition(":")
    assert not module or callable(getattr(importlib.import_module(module), function))


def test_what_a_program_imports_is_not_searched_for_garbage(tmp_path: Path) -> None:
    (tmp_path / "imported.py").write_text(
        "import gc\nimported = gc.isenabled()\n"
        "def main(argv, enter): print(imported, gc.isenabled(), gc.get_freeze_count() > 1000)\n"
    )
    code = "from lapse_elmo import commands as c; c.COMMANDS['train'] = c.Command('', 'imported'); c.run('train', [])"
    found = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(mpi.ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **found})
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


def test_programs_and_commands_are_the_same(installed: Installed) -> None:
    assert tuple(COMMANDS) == PROGRAMS
    assert {path.name for path in (mpi.ROOT / "bin").iterdir() if path.is_file()} == {*COMMANDS, "_venv.py", "_probe"}
    for name in ("train", "preprocess"):
        here = mpi.mpirun(1, [mpi.ROOT / "bin" / name, "--help"], launcher=False)
        there = installed.run(name, "--help")
        assert here.returncode == there.returncode == 0
        assert f"usage: bin/{name}" in here.stdout and f"usage: lapse-elmo {name}" in there.stdout
        assert unwrapped(here.stdout.replace("bin/", "lapse-elmo ")) == unwrapped(there.stdout)


def test_the_version_is_the_same_everywhere() -> None:
    citation = (mpi.ROOT / "CITATION.cff").read_text()
    (date,) = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert f"\nversion: {lapse_elmo.__version__}\n" in citation
    assert f"\n## [{lapse_elmo.__version__}] - {date}\n" in (mpi.ROOT / "CHANGELOG.md").read_text()


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_names_of_programs_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "run bin/train, not /usr/bin/train, .venv/bin/mpirun or bin/python"
    assert as_called(text) == text
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lapse-elmo", "train"])
    assert as_called(text) == "run lapse-elmo train, not /usr/bin/train, .venv/bin/mpirun or bin/python"


@pytest.mark.parametrize("has_venv", [True, False])
def test_a_python_that_lacks_a_package_gives_way_to_that_of_make_setup(tmp_path: Path, has_venv: bool) -> None:
    """As that of a site's module, which has torch and mpi4py."""
    shutil.copytree(mpi.ROOT / "bin", tmp_path / "bin")
    for name in ("torch", "mpi4py", "numpy", "tqdm", "requests", "tensorboard", "tomli_w"):
        (tmp_path / "site" / name).mkdir(parents=True)
    own = tmp_path / ".venv" / "bin" / "python"
    if has_venv:
        own.parent.mkdir(parents=True)
        own.write_text('#!/bin/sh\necho "that of make setup: $2"\n')
        own.chmod(0o755)
    python = os.path.realpath(sys.executable)  # not that of a virtual environment
    done = subprocess.run(
        [python, "-S", str(tmp_path / "bin" / "train"), "--help"], env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, timeout=60,
    )
    if has_venv:
        assert done.stdout == "that of make setup: --help\n", done.stderr
    else:
        assert done.returncode and done.stderr == f"train: error: {python} has no h5py: run 'make setup' first\n"
