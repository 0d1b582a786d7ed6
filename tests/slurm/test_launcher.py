"""Which launcher the batch scripts choose, with stand-ins for srun, mpirun and bin/_probe: it needs no Slurm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lapse_elmo.mpi.family import family_of
from tests.mpi import ROOT

# As Slurm 22.05 writes it, to stderr.
LIST = "MPI plugin types are...\n\tnone\n{}specific pmix plugin versions available: pmix_v4\n"
PROBE = '#!/bin/bash\nif [[ $1 == family ]]; then echo "$FAMILY"; else [[ " $WORKS " == *" $VIA "* ]]; fi\n'
SRUN = """#!/bin/bash
if [[ $1 == --mpi=list ]]; then printf "$LIST" >&2; exit; fi
export VIA=${1#--mpi=}
while [[ $1 == --* ]]; do [[ $1 == --ntasks ]] && shift; shift; done
exec "$@"
"""
MPIRUN = '#!/bin/bash\nexport VIA=${0##*/}\nwhile [[ $1 != bin/* ]]; do shift; done\nexec "$@"\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name, text in (("srun", SRUN), ("mpirun", MPIRUN), ("_probe", PROBE)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for name in ("bash", "grep", "head", "timeout"):  # nothing else of this machine, above all no other mpirun
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def choose(root: Path, family: str, listed: str, works: str) -> subprocess.CompletedProcess[str]:
    text = LIST.format("".join(f"\t{plugin}\n" for plugin in listed.split()))
    env = {"FAMILY": family, "LIST": text, "WORKS": works, "PATH": f"{root}/bin", "SLURM_NTASKS": "8"}
    env |= {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3"}
    command = ["bash", "-c", 'source slurm/launch.sh && echo "chosen: ${launcher[*]}"']
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("family", "listed", "works", "chosen"),
    [
        ("mpich", "pmix cray_shasta pmi2", "pmi2", "srun --mpi=pmi2"),
        ("mpich", "pmix pmi2", "pmix mpirun", "srun --mpi=pmix"),
        ("mpich", "cray_shasta", "mpirun", "mpirun"),
        ("cray", "pmix cray_shasta pmi2", "cray_shasta pmi2", "srun --mpi=cray_shasta"),
        ("cray", "pmi2", "pmi2", "srun --mpi=pmi2"),
        ("openmpi", "pmix pmi2", "pmix mpirun", "srun --mpi=pmix"),
        ("openmpi", "pmix pmi2", "pmi2 mpirun", "mpirun --bind-to none"),  # pmix is listed, but cannot be loaded
        ("openmpi", "pmi2", "mpirun", "mpirun --bind-to none"),
        ("intel", "pmix pmi2", "pmi2 mpirun", "srun --mpi=pmi2"),
        ("intel", "pmix pmi2", "mpirun", "mpirun"),  # without I_MPI_PMI_LIBRARY
        ("unknown", "pmix pmi2", "pmi2", "srun --mpi=pmi2"),
    ],
)
def test_the_first_that_works(root: Path, family: str, listed: str, works: str, chosen: str) -> None:
    """The first launcher is chosen under which ranks see each other (``works``), of those ``listed`` by srun."""
    done = choose(root, family, listed, works)
    whole = f"{chosen} --kill-on-bad-exit=1 --cpus-per-task=3" if chosen.startswith("srun") else chosen
    assert done.stdout.splitlines()[-1:] == [f"chosen: {whole}"], done.stdout + done.stderr


def test_none_works(root: Path) -> None:
    done = choose(root, "mpich", "pmix pmi2", "")
    assert done.returncode == 2
    *tried, last = done.stderr.splitlines()
    assert [line.partition(" -")[0] for line in tried] == ["srun", "srun", "mpirun: "]
    assert "no launcher fits" in last and "slurm/site.sh" in last


def test_what_the_site_sets_is_not_tried(root: Path) -> None:
    (root / "slurm" / "site.sh").write_text("launcher=(own --way)\n")
    assert choose(root, "mpich", "pmi2", "").stdout == "chosen: own --way\n"


def test_what_the_site_sources_sees_no_options_and_may_change_them(root: Path) -> None:
    """Lmod 9.2 reads variables that are not set, and Intel's setvars.sh takes the options of its caller for its own."""
    site = 'launcher=(own)\n: "$NOT_SET"\nif (($#)); then exit 9; fi\nset -- latest mpi\n'
    (root / "slurm" / "site.sh").write_text(site)
    script = 'source slurm/launch.sh && printf "%s," "$@" && : "$NOT_SET"'
    env = {"PATH": f"{root}/bin", "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "1"}
    command = ["bash", "-c", script, "train.sbatch", "--config", "two words.toml", ""]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "--config,two words.toml,,", done.stderr
    assert done.returncode and "NOT_SET: unbound" in done.stderr, "our own scripts are still strict"


def test_a_warning_while_stalls_are_counted_is_seen(root: Path) -> None:
    """The count reads a file, for which it may wait; a job that was warned meanwhile must not start its program."""
    (root / "slurm" / "site.sh").write_text("launcher=(bash -c)\n")
    script = """
        source slurm/launch.sh
        stalls() { if [[ ! -e warned ]]; then : >warned; kill -USR1 $$; fi; echo 0; }
        launch 'exit 3'
    """
    env = {"PATH": f"{root}/bin", "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=root, env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 75, done.stderr


def test_each_hang_counts_once(root: Path) -> None:
    """However many nodes report it: the job is requeued five times."""
    report = 'for node in {1..64}; do echo "the job ends with status 76" >>"$LAPSE_ELMO_STALLS"; done; exit 137'
    (root / "slurm" / "site.sh").write_text(f"launcher=(bash -c '{report}')\n")
    scontrol = root / "bin" / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$*"\n')
    scontrol.chmod(0o755)
    env = {"PATH": f"{root}/bin", "SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "1"}
    said = []
    for _ in range(6):
        command = ["bash", "slurm/train.sbatch"]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 76, done.stderr
        said.append("requeue 1" in done.stdout.splitlines())
    assert said == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx,ofi\n", "mpich"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28.16 (ANL base 3.4a2)\n", "cray"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "intel"),
        ("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4", "openmpi"),
        ("MVAPICH2 Version      :\t2.3.7\n", "mvapich"),
        ("Another MPI 1.0\n", "unknown"),
    ],
)
def test_family(version: str, family: str) -> None:
    assert family_of(version) == family
