# Your site's settings, sourced by the batch scripts here before they start anything. None are needed on a plain cluster.
# Account, partition and the like belong to sbatch's options or to its variables: SBATCH_ACCOUNT, SBATCH_PARTITION.
# What may stand here, for instance:
#   module load openmpi && export MPI4PY_MPIABI=openmpi    # the site's MPI in place of the installed MPICH
#   launcher=(srun --mpi=pmix --kill-on-bad-exit=1)        # how to start the ranks, where the choice in launch.sh fails
#   export FI_PROVIDER=verbs                               # the network for MPICH, by libfabric's name
# shellcheck shell=bash
