"""How many cores and GPUs the ranks of a machine have: by affinity, cgroup, Slurm, the launcher and nvidia-smi."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lapse_elmo import cgroups
from lapse_elmo.mpi import host
from lapse_elmo.mpi.host import ranks_for_training, usable_cores, usable_gpus
from lapse_elmo.mpi.launcher import oversubscribed
from tests.mpi import LAUNCHER_PREFIXES, ROOT, mpirun


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        monkeypatch.delenv(name)


def test_usable_cores_follow_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from lapse_elmo.mpi.host import *; print(usable_cores())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


def use_groups(monkeypatch: pytest.MonkeyPatch, root: Path, line: str) -> None:
    """Make ``line`` what /proc/self/cgroup has, for groups below ``root``."""
    read_text = Path.read_text

    def fake(self: Path, *rest: str, **more: str) -> str:
        return f"{line}\n" if str(self) == "/proc/self/cgroup" else read_text(self, *rest, **more)

    monkeypatch.setattr(Path, "read_text", fake)
    monkeypatch.setattr(cgroups, "ROOT", str(root))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize(
    ("quota", "expected"), [("max", 64), ("200000", 2), ("50000", 1), ("6400000", 64), ("9900000", 64)]
)
def test_usable_cores_follow_the_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, where: int, quota: str, expected: int
) -> None:
    """A quota of the process's own group, or of one around it, as a login node's of all that a user runs.

    In a container the root is its own group. What a group of another controller has does not count.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    lines = {1: "4:cpu,cpuacct:/user/session\n5:cpuset:/other", 2: "0::/user/session"}
    use_groups(monkeypatch, tmp_path, lines[version])
    own = tmp_path / ("cpu" if version == 1 else "") / "user" / "session"
    own.mkdir(parents=True)
    (other := own.parents[1] / "other").mkdir()
    groups = {own: "max", own.parent: "max", own.parents[1]: "max", other: "100000"}
    groups[list(groups)[where]] = quota
    for folder, number in groups.items():
        if version == 2:
            (folder / "cpu.max").write_text(f"{number} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{number.replace('max', '-1')}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == expected


def test_usable_cores_without_a_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_groups(monkeypatch, tmp_path, "0::/")
    assert usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("allotted", "expected"), [("3", 3), ("64", 8), ("", 8)])
def test_usable_cores_follow_the_allocation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allotted: str, expected: int
) -> None:
    use_groups(monkeypatch, tmp_path, "0::/")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", allotted)
    assert usable_cores(range(8)) == expected


FOUR_GPUS = "".join(f"GPU {number}: NVIDIA H200 (UUID: GPU-{number}{number}aa)\n" for number in range(4))
MIG = "GPU 0: NVIDIA H200 (UUID: GPU-00aa)\n  MIG 1g.18gb     Device  0: (UUID: MIG-00bb)\n"


def fake_gpus(folder: Path, listed: str | None, torch: str = "2.13.0") -> dict[str, str]:
    """Return an environment with an nvidia-smi that lists GPUs (fails if None), and with a version of torch."""
    said = f"printf '{listed}'" if listed is not None else "echo 'no devices were found' >&2; exit 9"
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = -L ] || exit 5\n{said}\n")
    program.chmod(0o755)
    about = folder / f"torch-{torch}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    ("listed", "visible", "expected"),
    [
        (FOUR_GPUS, None, 4), (FOUR_GPUS, "2,0", 2), (FOUR_GPUS, "GPU-11aa, GPU-33aa", 2), (FOUR_GPUS, "", 0),
        (FOUR_GPUS, "-1", 0), (FOUR_GPUS, "0,7,1", 1), (MIG, None, 1), (MIG, "MIG-00bb", 1), ("", None, 0),
        (None, None, 0),
    ],
)
def test_usable_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, visible: str | None, expected: int
) -> None:
    monkeypatch.setenv("PATH", fake_gpus(tmp_path, listed)["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus() == expected


def test_an_nvidia_smi_that_cannot_be_killed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a broken driver holds it in the kernel."""
    (program := tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 10\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(host, "_NVIDIA_SMI_TIME_S", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert usable_gpus() == 0
    os.kill(int(Path(f"{program}.pid").read_text()), signal.SIGKILL)  # fails if it has been waited for


def test_without_nvidia_smi_there_is_a_rank_per_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert usable_gpus() == 0
    assert ranks_for_training() == usable_cores()


@pytest.mark.parametrize(
    ("listed", "torch", "options", "expected"),
    [
        (FOUR_GPUS, "2.13.0", "", 4), (FOUR_GPUS, "2.13.0", "TRAIN_OPTIONS=--device cpu", None),
        (FOUR_GPUS, "2.13.0", "RANKS=3", 3), (FOUR_GPUS, "2.13.0+cpu", "", None), (None, "2.13.0", "", None),
    ],
)
def test_make_train_starts_a_rank_per_gpu(
    tmp_path: Path, listed: str | None, torch: str, options: str, expected: int | None
) -> None:
    """None stands for one rank per core."""
    if shutil.which("make") is None or not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("make or .venv is missing")
    environment = fake_gpus(tmp_path, listed, torch)
    for name in ("CUDA_VISIBLE_DEVICES", "RANKS", "PREPROCESS_RANKS", "TRAIN_OPTIONS", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    # All targets are out of date, so that the recipes of preprocessing are printed, too; nothing runs.
    command = ["make", "--dry-run", "--always-make", "train", *filter(None, [options])]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for number, name in re.findall(r"-n (\d+) (bin/train|bin/preprocess shards)", said)}
    assert found == {"bin/train": expected or usable_cores(), "bin/preprocess shards": usable_cores()}


def slurm(cores: int, node: int, tasks: str) -> dict[str, str]:
    return {"SLURM_CPUS_ON_NODE": str(cores), "SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": tasks}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"MPI_LOCALNRANKS": "4"}, False),
        ({"MPI_LOCALNRANKS": "5"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, True),
        (slurm(6, 1, "6(x2),7"), False),
        (slurm(6, 2, "6(x2),7"), True),
        (slurm(99, 0, "9"), True),
        ({**slurm(6, 0, "1"), "MPI_LOCALNRANKS": "7"}, True),
    ],
)
def test_oversubscribed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], expected: bool
) -> None:
    """Ranks are oversubscribed if they outnumber the cores that they may use: here 4 of a machine's 8."""
    use_groups(monkeypatch, tmp_path, "0::/")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert oversubscribed() == expected


def test_ranks_bound_to_cores_of_their_own_have_all_of_them(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))[:2]
    program = tmp_path / "program.py"
    program.write_text(
        "import os\nfrom lapse_elmo.mpi.launch import enter\n"
        f"cores = {mine}\nos.sched_setaffinity(0, [cores[int(os.environ['PMI_RANK']) % len(cores)]])\n"
        f"world = enter()\nassert world.cores == {min(len(mine), usable_cores())}, world.cores\n"
        "assert world.oversubscribed == (world.cores < 2)\n"
    )
    job = mpirun(2, program, timeout=60)
    assert job.returncode == 0, job.output
