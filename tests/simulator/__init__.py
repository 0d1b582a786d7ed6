"""A deterministic simulator of the parameter server: the engine's own code, on a network that a seed controls.

``python -m tests.simulator --schedules 1000`` runs that many schedules, ``--seed N`` repeats one. Each schedule is a
job of a few nodes in one process: its managers and workers are greenlets, its time, delays, stalls and preemptions are
drawn from the seed, and all promises of the server are checked while it runs (see invariants.py and workload.py here).
"""
