# Settings of your site, sourced by the batch scripts before they start a program. Many clusters need none.
# Account, partition and the like are options of sbatch, or its variables SBATCH_ACCOUNT and SBATCH_PARTITION.
# Examples:
#   module load openmpi && export MPI4PY_MPIABI=openmpi    # the site's MPI instead of the installed MPICH
#   launcher=(srun --mpi=pmix --kill-on-bad-exit=1)        # how to start the ranks, instead of finding out
#   export FI_PROVIDER=verbs                               # MPICH's network, as libfabric calls it
# shellcheck shell=bash
