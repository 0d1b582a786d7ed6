"""The tests, a package so that they share ``tests.mpi`` and find the repository."""
