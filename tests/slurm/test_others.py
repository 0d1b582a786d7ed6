"""The batch scripts for LSF, PBS and Flux, with stand-ins for the schedulers; MPICH's mpirun is the real one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mpi import LAUNCHER_PREFIXES, MPIRUN, ROOT

# As first word of $DO: exit with a status, or wait for the warning, save (0.3 s) and exit with 75.
TRAIN = """#!/usr/bin/env python3
import os, signal, sys, time
what = os.environ["DO"]
open("jobs", "a").write(os.environ["LAPSE_ELMO_JOB"] + "\\n")
open(f"ranks-{os.environ.get('PMI_RANK', 0)}", "a").write(" ".join(sys.argv[1:]) + "\\n")
if what == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.3), sys.exit(75)))
    time.sleep(30)
sys.exit(int(what))
"""
MPIRUN_OF_TWO = f"#!/bin/bash\n[[ $1 == -n ]] || set -- -n 2 \"$@\"\nexec {MPIRUN} \"$@\"\n"
MPIRUN_OF_ANOTHER_MPI = "#!/bin/bash\nprintf '%s\\n' \"$*\" >> unfit\nexit 1\n"
PROBE = '#!/bin/bash\nif [[ $1 == family ]]; then echo mpich; else echo "$@" >> probed; fi\n'
QSUB = '#!/bin/bash\necho "$@" >> submitted\n'
FLUX = """#!/bin/bash
if [[ $1 == --parent ]]; then echo "$@" >> submitted; exit; fi
shift
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
NAMES = {
    "lsf": {"LSB_JOBNAME": "lapse-elmo", "LSB_JOBID": "7"},
    "pbs": {"PBS_JOBNAME": "lapse-elmo", "PBS_JOBID": "7"},
    "flux": {"RUN_DIR": "runs/lapse-elmo-7"},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name, text in (
        ("bin/train", TRAIN), ("bin/mpirun", MPIRUN_OF_TWO), ("bin/_probe", PROBE), ("bin/qsub", QSUB),
        ("bin/flux", FLUX), (".venv/bin/mpirun", MPIRUN_OF_ANOTHER_MPI),
    ):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True, parents=True)
        program.write_text(text)
        program.chmod(0o755)
    return tmp_path


def run(root: Path, scheduler: str, do: str, **variables: str) -> tuple[int, list[str]]:
    """Return the status of the batch script, and the lines with which it submitted itself."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    limit = "8s" if do == "wait" else "5m"  # after mpirun has started the ranks, on a loaded machine too
    env |= {"PATH": f"{root}/bin:{env['PATH']}", "DO": do, "LIMIT": limit}
    env |= {"PBS_O_WORKDIR": str(root), "PBS_NODEFILE": str(root / "nodes")}
    (root / "nodes").write_text("localhost\n" * 2)
    env |= NAMES[scheduler] | variables
    done = subprocess.run(
        ["bash", f"slurm/others/train.{scheduler}"], cwd=root, env=env, capture_output=True, text=True, timeout=60,
        check=False,
    )
    submitted = root / "submitted"
    return done.returncode, submitted.read_text().splitlines() if submitted.exists() else []


@pytest.mark.parametrize("scheduler", ["lsf", "pbs"])
def test_the_limit_makes_it_save(root: Path, scheduler: str) -> None:
    status, submitted = run(root, scheduler, "wait")
    assert status == 75
    assert len(submitted) == (scheduler == "pbs"), "LSF requeues by the status"
    for rank in range(2):
        assert (root / f"ranks-{rank}").read_text() == "--run-dir runs/lapse-elmo-7 --resume auto\n"
    # The first mpirun did not fit the MPI library, so two ranks tried the next one.
    assert (root / "unfit").read_text() == "-n 2 bin/_probe world 2\n"
    assert (root / "probed").read_text() == "world 2\n" * 2


@pytest.mark.parametrize("scheduler", ["lsf", "pbs"])
def test_the_site_may_name_its_launcher(root: Path, scheduler: str) -> None:
    (root / "slurm" / "site.sh").write_text("launcher=(mpirun -n 1)\n")
    assert run(root, scheduler, "2")[0] == 2
    assert (root / "jobs").read_text() == {"lsf": "lsf-7\n", "pbs": "pbs-runs/lapse-elmo-7\n"}[scheduler]
    assert (root / "ranks-0").exists() and not (root / "ranks-1").exists() and not (root / "probed").exists()


@pytest.mark.parametrize("scheduler", ["pbs", "flux"])
@pytest.mark.parametrize(
    ("status", "hangs", "again"), [(0, "", False), (2, "", False), (75, "3", True), (76, "", True), (76, "5", False)]
)
def test_what_is_submitted_again(root: Path, scheduler: str, status: int, hangs: str, again: bool) -> None:
    got, submitted = run(root, scheduler, str(status), **({"HANGS": hangs} if hangs else {}))
    assert got == status
    assert len(submitted) == again
    assert set((root / "jobs").read_text().split()) == {f"{scheduler}-runs/lapse-elmo-7"}
    if again:
        expected = "HANGS=1" if status == 76 else "HANGS=0"
        assert "RUN_DIR=runs/lapse-elmo-7" in submitted[0] and expected in submitted[0]


def test_lsf_requeues_what_can_be_resumed() -> None:
    text = (ROOT / "slurm" / "others" / "train.lsf").read_text()
    assert '#BSUB -Q "75 76"\n' in text
