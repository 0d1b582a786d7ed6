"""MPI: the ranks of a job and their nodes, collective calls, start-up, and an orderly end of every job.

Only this package and the MPI transport of the parameter server (``ps.mpi_transport``) import mpi4py.

===============  ====================================================================================
module           contents
===============  ====================================================================================
``world``        :class:`~lapse_elmo.mpi.world.World`: ranks, nodes, leaders
``collectives``  what ranks do together: broadcast, gather, sum, agree on a result or on an error
``launch``       run a program of ``bin/`` on every rank, and report its errors
``exit``         end all ranks of the job with one exit status
``start``        load and initialise the MPI library
``left_files``   remove MPICH's files of an earlier start of the job
``node_memory``  named arrays that the ranks of a node share
``family``       which MPI library it is, and whether a launcher fits it
``launcher``     what mpirun or srun put into the environment
``host``         this machine: its usable CPU cores and GPUs, its address
``signals``      requests to stop, and the exit statuses of all programs
``stdio``        the standard streams
===============  ====================================================================================
"""
