"""What the MPI launcher tells a process through its environment, before MPI is initialised."""

from __future__ import annotations

import os

from lapse_elmo.cores import LOCAL_SIZE_VARIABLES

# (rank, size) by launcher.
_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def launcher_rank_and_size() -> tuple[int, int]:
    """Rank and size as the launcher's environment tells them; (0, 1) without a launcher."""
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def below_srun() -> bool:
    """Whether srun itself started this rank, not an mpirun (which may have used srun for its own processes)."""
    return "SLURM_PROCID" in os.environ and not any(name in os.environ for name in LOCAL_SIZE_VARIABLES)
