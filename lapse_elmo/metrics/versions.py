"""Versions of the software that produced a result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

from lapse_elmo import __version__
from lapse_elmo.config.training import ROOT
from lapse_elmo.subprocesses import output_of

_GIT_TIME_S = 10  # a file system that hangs may keep git longer
_PACKAGES = ("torch", "allennlp", "numpy", "h5py", "mpi4py", "mpich")


def versions() -> dict[str, str]:
    """Return the versions of this program (with the git commit of a checkout), of Python and of the main packages.

    ``mpi_library`` is there if MPI is loaded: a site's library may be used in the place of the package ``mpich``.
    """
    found = {"lapse_elmo": __version__, "git_commit": git_commit(), "python": platform.python_version()}
    if mpi := sys.modules.get("mpi4py.MPI"):
        found["mpi_library"] = " ".join(mpi.Get_library_version().strip("\0 \n").split("\n")[0].split())
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """Return the commit of the checkout, with ``-dirty`` if it has local changes; "unknown" outside a checkout."""
    if not (ROOT / ".git").exists():  # else git could find an unrelated repository further up
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return output_of(command, _GIT_TIME_S).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
