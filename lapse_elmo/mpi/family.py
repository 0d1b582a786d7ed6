"""Which family of MPI libraries this process loads, and whether a launcher fits it.

The batch scripts ask both through ``bin/_probe`` before they choose a launcher. Slurm lists plugins that do not work:
one whose library is missing, and cray_shasta on any machine. So a launcher counts only once it has started ranks that
see each other.
"""

from __future__ import annotations

import sys

from lapse_elmo.errors import LaunchError, log_line
from lapse_elmo.mpi.signals import USER_ERROR

# The beginning of what MPI_Get_library_version says, in lower case. The first that occurs counts: Cray's and Intel's
# libraries descend from MPICH.
_FAMILIES = {
    "cray mpich": "cray", "intel(r) mpi": "intel", "mvapich": "mvapich", "open mpi": "openmpi", "mpich": "mpich",
}
_BEGINNING = 200  # characters; a library's list of configure options may name others


def family_of(version: str) -> str:
    """Return the family of an MPI library: "cray", "intel", "mvapich", "openmpi", "mpich" or "unknown".

    Args:
        version: The result of ``MPI_Get_library_version``.
    """
    beginning = version[:_BEGINNING].lower()
    return next((family for name, family in _FAMILIES.items() if name in beginning), "unknown")


def library_family() -> str:
    """Return the family of the MPI library that this process loads; MPI is not initialised.

    Raises:
        LaunchError: If no library can be loaded.
    """
    from lapse_elmo.mpi.start import load_mpi

    return family_of(load_mpi().Get_library_version())


def probe(arguments: list[str]) -> None:
    """Do what ``bin/_probe`` is for: ``family`` prints the family, ``world N`` checks that N ranks see each other.

    Raises:
        LaunchError: If no library can be loaded; or if the world has another number of ranks.
    """
    if arguments == ["family"]:
        print(library_family())
        return
    from lapse_elmo.mpi.start import start_mpi

    (_, expected), world = arguments, start_mpi()
    ranks = world.allgather(world.rank)
    if ranks != [*range(int(expected))]:
        raise LaunchError(f"the launcher started {expected} ranks, of which this one sees {len(ranks)}")


def main(arguments: list[str]) -> None:
    """Run :func:`probe`; an error becomes one line and status 2."""
    try:
        probe(arguments)
    except LaunchError as error:
        log_line(f"_probe: error: {error}")
        sys.exit(USER_ERROR)
