# InfiniBand and Slurm: cp slurm/sites/infiniband.sh slurm/site.sh, then adapt it. Written from documents, not run: the
# developers have no InfiniBand. Module names and versions are your site's. Use one of the two blocks.
# shellcheck shell=bash

# Open MPI, which takes InfiniBand through UCX. The launcher is found out: srun --mpi=pmix, else mpirun.
module load openmpi
export MPI4PY_MPIABI=openmpi
# export OMPI_MCA_pml=ucx               # fail instead of falling back to TCP
# export UCX_NET_DEVICES=mlx5_0:1       # one of several adapters; `ibv_devices` lists them

# Intel MPI has the ABI of MPICH. srun starts it only if I_MPI_PMI_LIBRARY names Slurm's own library; else mpirun is used.
# module load intelmpi
# export MPI4PY_MPIABI=mpich
# export I_MPI_PMI_LIBRARY=/usr/lib64/libpmi2.so
# export FI_PROVIDER=mlx
