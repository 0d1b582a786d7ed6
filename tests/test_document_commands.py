"""Every command and every Python block of the documents runs here, on a tiny corpus and a tiny model.

A shell block is run by bash as it is written, in a folder in which ``mpirun`` and the programs of ``bin/`` are small
scripts: a program starts by the fork server, at most two ranks take part, and training gets options that make it tiny.
What still has to be replaced, and what cannot run here, is in two tables.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import fork_server
from tests.command_lines import SCHEMAS, fenced, known_options
from tests.mpi import LAUNCHER_PREFIXES, MPIRUN, ROOT, RunningJob, mpirun
from tests.test_documents import DOCUMENTS, label
from tests.training.corpora import prepare, train_alone

# In place of what stands for something of the reader's, or takes too long: (expression, what is run).
REPLACED = [
    (r"--heldout TEXT\.\.\.", "--heldout text/heldout.txt"),
    (r"TEXT\.\.\.", "text/train.txt"),
    (r"--words FILE", "--words words.txt"),
    (r"--schedules 5000", "--schedules 3"),
    (r"--trace-rows 300 5000-5009 random:100", "--trace-rows 3 4-5 random:2"),
]
# Lines that do not run here, by their start, and why.
NOT_RUN = {
    "git clone ": "there is no network",
    "pip install ": "there is no network; set-up runs in CI",
    "bin/preprocess download": "there is no network; tests/preprocess/test_download.py has a server of its own",
    "sacremoses ": "a tokeniser that users install",
    "apptainer ": "not installed; tests/test_container.py checks the definition",
    "git archive ": "the tests may run from an archive without .git",
    "sbatch ": "tests/slurm submits the scripts to a cluster of its own",
    "srun ": "tests/slurm starts it on a cluster of its own",
    "bsub ": "no LSF; tests/slurm/test_others.py runs the script",
    "qsub ": "no PBS; tests/slurm/test_others.py runs the script",
    "flux ": "no Flux; tests/slurm/test_others.py runs the script",
    "module load ": "there are no environment modules",
    "MPI4PY_MPIABI=openmpi mpirun ": "Open MPI is not always installed; `make transports` uses it",
    "mpirun -launcher ssh ": "there are no other hosts",
    "for i in 1 2; do ip netns add ": "network namespaces need root: tests/hosts.py makes them for the benchmarks",
    "mpirun -n 2 bin/train --ps ": "needs native packages; tests/ps/test_native_start.py has fakes of them",
    "make ": "takes minutes: only that its targets exist is tested here; CI runs make dev, lint, docs and test",
    ".venv/bin/python -m pytest ": "the tests in the tests",
    "python -m benchmarks.": "benchmarks take minutes",
    ".venv/bin/python -m benchmarks.": "they need a treebank; tests/training/test_downstream.py has a small one",
}
PYTHON_NOT_RUN = {
    "BidirectionalLanguageModel(": "a class of bilm-tf, which needs TensorFlow 1",
    "from pathlib import Path\nfrom lapse_elmo.ps.trace import read_trace": "needs the trace of the page's command",
}
TINY = (
    "--projection-size 8 --cell-size 12 --num-layers 1 --num-samples 8 --batch-size 4 --first-batch 0 --threads 1 "
    "--max-steps 2 --progress none --device cpu --overwrite"
)
SENTENCES = ["the words of a sentence", "and of another", "a word list", "time people the list", "words and people"]
TIMEOUT_S = 300.0  # of a block; it takes seconds on an idle machine


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has a corpus, a model, and an installation; each test gets a copy."""
    folder = tmp_path_factory.mktemp("reader")
    corpus = prepare(folder / "text", 40 * SENTENCES, SENTENCES)
    train_alone(corpus, folder / "runs" / "first", *TINY.split())
    for original, copy in (
        ("text", "data"), ("text", "other"), ("text/shards", "shards"), ("runs/first", "runs/second"),
    ):
        shutil.copytree(folder / original, folder / copy, symlinks=True)
    shutil.copy(corpus.vocab, folder)
    for name in ("text.txt", "all.tok"):
        shutil.copy(folder / "text" / "train.txt", folder / name)
    (folder / "words.txt").write_text("time\nlist\n", encoding="utf-8")
    install(folder)
    return folder


@pytest.fixture
def place(reader: Path, tmp_path: Path) -> Path:
    """A copy of the reader's folder."""
    return shutil.copytree(reader, tmp_path / "reader", symlinks=True)


def install(folder: Path) -> None:
    """Write the programs that the commands start."""
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    (folder / "bin").mkdir()
    client = f"exec {' '.join(fork_server.command())}"
    scripts = {
        tools / "activate": 'PATH="$PWD/.venv/bin:$PATH"',
        tools / "python": f'{client} "$@"',
        tools / "mpirun": f'test "$1" = -n || exit 99\nn=$2; shift 2\nexec {MPIRUN} -n $((n < 2 ? n : 2)) "$@"',
    }
    for program in (path for path in (ROOT / "bin").iterdir() if not path.suffix):
        known = known_options(program.name) if program.name in SCHEMAS else set()
        more = TINY if program.name == "train" else "--overwrite" if "--overwrite" in known else ""
        if program.name == "preprocess":
            more = "$(case $1 in vocab|shards) echo --overwrite; esac)"
        scripts[folder / "bin" / program.name] = f'{client} {program} "$@" {more}'
    for path, script in scripts.items():
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    for name in ("python", "mpirun"):
        shutil.copy(tools / name, folder / "bin" / name)
    (folder / "bin" / "python3").symlink_to("python")


def blocks(path: Path, *languages: str) -> list[str]:
    return fenced(path.read_text(encoding="utf-8"), *languages)


def lines_of(block: str) -> Iterator[str]:
    """The block's lines, with those that a backslash continues in one."""
    yield from block.replace("\\\n", " ").splitlines()


def shell(path: Path) -> list[str]:
    return blocks(path, "sh", "console", "bash")


def why_not(line: str) -> str:
    """Why a line does not run here; "" if it does."""
    return next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), "")


def to_run(block: str) -> str:
    """The block as it is run here."""
    if why_not(block):  # one program over many lines
        return ""
    script = "\n".join("" if why_not(line) else line for line in lines_of(block))
    for expression, instead in REPLACED:
        script = re.sub(expression, instead, script)
    return script


WITH_SHELL = [path for path in DOCUMENTS if any(to_run(block).strip() for block in shell(path))]


@pytest.mark.parametrize("path", WITH_SHELL, ids=label)
def test_commands_run(path: Path, place: Path) -> None:
    """Each block by itself; a line that fails ends it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHER_PREFIXES, "PYTEST_", "VIRTUAL_ENV"))}
    paths = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in shell(path):
        script = to_run(block)
        if script.strip():
            traced = f"set -euo pipefail; trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n{script}"
            with RunningJob(["bash", "-c", traced], {**clean, **paths, "OMP_NUM_THREADS": "1"}, place) as job:
                ended = job.wait(TIMEOUT_S)
            assert ended.returncode == 0, f"{script}\n{ended.output}"


def test_nothing_is_listed_in_vain() -> None:
    """Every entry of the tables stands for something in a document."""
    commands = "\n".join(line for path in DOCUMENTS for block in shell(path) for line in lines_of(block))
    python = "\n".join(block for path in DOCUMENTS for block in blocks(path, "python"))
    assert [start for start in NOT_RUN if f"\n{start}" not in f"\n{commands}"] == []
    assert [expression for expression, _ in REPLACED if not re.search(expression, commands)] == []
    assert [start for start in PYTHON_NOT_RUN if f"\n{start}" not in f"\n{python}"] == []


def test_targets_of_make_exist() -> None:
    lines = [line for path in DOCUMENTS for block in shell(path) for line in lines_of(block)]
    targets = {match.group(1) for line in lines if (match := re.match(r"make (\w+)", line))}
    known = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert known is not None and targets and targets <= set(known.group(1).split())


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=label)
def test_snippets_run(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python blocks, one after another in one namespace; those that are programs by four ranks."""
    monkeypatch.chdir(place)
    namespace: dict[str, object] = {"rows": np.arange(4)}
    for number, block in enumerate(blocks(path, "python")):
        if any(block.startswith(start) for start in PYTHON_NOT_RUN):
            continue
        if "enter()" in block:
            program = place / f"{path.stem}_{number}.py"
            program.write_text(block, encoding="utf-8")
            job = mpirun(4, program, cwd=place)
            assert job.returncode == 0 and job.stdout, job.output
        else:
            exec(compile(block, label(path), "exec"), namespace)
    vectors = namespace.get("vectors", np.zeros(1, np.float32))
    assert isinstance(vectors, list | np.ndarray) and vectors[0].dtype == np.float32
