"""What the MPI launcher tells a process through its environment, before MPI is initialised."""

from __future__ import annotations

import itertools
import os

from lapse_elmo.cores import LOCAL_SIZE_VARIABLES
from lapse_elmo.errors import LaunchError

# (rank, size) by launcher.
_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_MOST_DIGITS = 9


def launcher_rank_and_size() -> tuple[int, int]:
    """Rank and size as the launcher's environment tells them; (0, 1) without a launcher."""
    for names in _VARIABLES:
        rank, size = (os.environ.get(name, "") for name in names)
        if _is_number(rank) and _is_number(size):
            return int(rank), int(size)
    return 0, 1


def check_launcher() -> None:
    """Refuse an environment that no launcher has made. :raises LaunchError: naming the variable."""
    for name in (*itertools.chain.from_iterable(_VARIABLES), *LOCAL_SIZE_VARIABLES):
        value = os.environ.get(name, "0")
        if not _is_number(value):
            raise LaunchError(
                f"the environment variable {name} is {value[:40]!r}, where a launcher puts a number: unset it, or "
                "start the program by mpirun or srun"
            )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def below_srun() -> bool:
    """Whether srun itself started this rank, not an mpirun (which may have used srun for its own processes)."""
    return "SLURM_PROCID" in os.environ and not any(name in os.environ for name in LOCAL_SIZE_VARIABLES)
