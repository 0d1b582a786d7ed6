# Ethernet and Slurm: cp slurm/sites/ethernet.sh slurm/site.sh, then adapt it. The tests' own Slurm runs both libraries this
# way, over the loopback interface.
# shellcheck shell=bash

# The MPICH that `make setup` installs needs nothing. With several interfaces, name the one between the nodes:
export FI_PROVIDER=tcp
# export FI_TCP_IFACE=eth1

# Or the distribution's Open MPI (Debian: openmpi-bin on every node):
# export MPI4PY_MPIABI=openmpi
# export OMPI_MCA_btl_tcp_if_include=eth1 OMPI_MCA_oob_tcp_if_include=eth1
