# HPE Cray with Slingshot and Slurm: cp slurm/sites/cray.sh slurm/site.sh, then adapt it. Written from documents, not run:
# the developers have no Cray. Module names and versions are your site's.
# shellcheck shell=bash

# Cray MPICH has the ABI of MPICH: mpi4py for MPICH loads it in the place of the installed MPICH. The log's first line must
# then say "MPI family: cray".
module load cray-mpich-abi
export MPI4PY_MPIABI=mpich
export LD_LIBRARY_PATH=${CRAY_LD_LIBRARY_PATH:-}:${LD_LIBRARY_PATH:-}

# The launcher is found out: srun --mpi=cray_shasta first. Set it only to override that:
# launcher=(srun --mpi=cray_shasta --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})

# Older versions of Cray MPICH give full thread support only on request; bin/train says so if it is missing.
# export MPICH_MAX_THREAD_SAFETY=multiple

# Compute nodes often have no compiler: run `make native` on the login node, with the cache where all nodes see it.
# export LAPSE_ELMO_CACHE=$HOME/lapse-elmo-cache
