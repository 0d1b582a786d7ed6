"""The packages that travel to a machine with a GPU and no network, for ``benchmarks/gpu.py``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lapse_elmo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# What bin/train and the tests import in addition to torch and its own requirements: (module, distribution).
PACKAGES = (
    ("mpich", "mpich"), ("mpi4py", "mpi4py"), ("h5py", "h5py"), ("safetensors", "safetensors"), ("tqdm", "tqdm"),
    ("tomli_w", "tomli-w"), ("backports.zstd", "backports.zstd"), ("pytest", "pytest"), ("pluggy", "pluggy"),
    ("iniconfig", "iniconfig"), ("hypothesis", "hypothesis"), ("sortedcontainers", "sortedcontainers"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 64 * 10**6  # of wheels and repository together


def collect(folder: str, python: str) -> None:
    """Download the wheels of PACKAGES, with the versions of this environment, for another machine.

    Raises:
        ConfigError: If they and the repository are larger than what may travel.
    """
    from importlib.metadata import version

    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    names = [f"{name}=={version(name)}" for _, name in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--python-version", python, *platforms, "-d", folder, *names], check=True)
    print(check_size(Path(folder)))


def check_size(folder: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return a line on the size of what travels: the wheels in ``folder`` and the tracked files of the repository.

    Raises:
        ConfigError: If it is above ``most_bytes``.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name]
    wheels, repository = (
        sum(path.stat().st_size for path in paths if path.is_file()) for paths in (folder.iterdir(), tracked)
    )
    sizes = f"{wheels / 1e6:.1f} MB of wheels and {repository / 1e6:.1f} MB of repository"
    if wheels + repository > most_bytes:
        raise ConfigError(
            f"{folder} has {sizes}, expected at most {most_bytes / 1e6:g} MB together: remove wheels that the GPU "
            "machine has"
        )
    return f"{sizes}, of {most_bytes / 1e6:g} MB that may travel"


def missing(modules: tuple[tuple[str, str], ...] = PACKAGES) -> list[str]:
    """Return the distributions whose modules cannot be found."""

    def found(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    # The wheel of MPICH has no module: it brings libmpi and mpirun.
    return [name for module, name in modules if not (launcher() if module == "mpich" else found(module))]


def launcher() -> str | None:
    """Return the mpirun next to this Python or on the PATH, None without one."""
    return shutil.which("mpirun", path=f"{sys.prefix}/bin:{os.environ.get('PATH', '')}")


def install(wheels: str, site: Path) -> dict[str, str]:
    """Install missing packages into ``site``; return the environment in which programs find them."""
    names = missing()
    if names:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", wheels]
        subprocess.run([*command, "--target", str(site), *names], check=True)
    return {
        "PYTHONPATH": f"{site}:{ROOT}",
        "PATH": f"{site}/bin:{sys.prefix}/bin:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": f"{site}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }
