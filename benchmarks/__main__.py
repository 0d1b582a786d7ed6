"""Run the benchmarks in a short form, one after another: ``python -m benchmarks [NAME ...]`` (``make bench``).

Prints the machine and the versions, the tables of each module, and the seconds that each took: by the clock, and of
processor time of all its processes. A module that runs alone (``python -m benchmarks.NAME``) measures more sizes and
repeats. Not here are those that need text or a model of the reader (``learning``, ``ranks_learning``, ``downstream``),
``plan``, which needs root for emulated hosts, and ``gpu`` with its parts ``gpu_device``, ``gpu_packages`` and
``gpu_report``, which takes eight minutes on a machine with a GPU.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DEFAULT_SHARDS
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.host import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "h5py", "mpi4py", "mpich")


@dataclass(frozen=True)
class Module:
    """A module and how it is run here.

    Attributes:
        name: Its name in ``benchmarks``.
        arguments: What makes it short; everything is measured without them.
        ranks: MPI ranks to start; 0 for no ``mpirun``.
        needs_shards: Whether it reads the default shards, which ``make bench`` makes.
    """

    name: str
    arguments: tuple[str, ...] = ()
    ranks: int = 0
    needs_shards: bool = False

    def command(self) -> list[str]:
        """Return the command line."""
        launcher = [f"{sys.prefix}/bin/mpirun", "-n", str(self.ranks)] if self.ranks else []
        return [*launcher, sys.executable, "-m", f"benchmarks.{self.name}", *self.arguments]


def _short(name: str, arguments: str = "", ranks: int = 0, needs_shards: bool = False) -> Module:
    return Module(name, tuple(arguments.split()), ranks, needs_shards)


MODULES = (
    _short("products", "--rows 1 8 32 128 512 --repeats 3"),
    _short("step", "--repeats 1"),
    _short("dense_update"),
    _short("full_softmax", "--num-classes 100000 --num-targets 8192 --threads 1 2"),
    _short("embed", "--words 50000 --sentences 128 --repeats 2 --megabytes 1"),
    _short("preprocess", "--short"),
    _short("start", needs_shards=True),
    _short("ranks", needs_shards=True),
    _short("server", "--repeats 3", 1),
    _short("server", "--repeats 3", 2),
    _short("server", "--repeats 3 --nodes 2", 2),
    _short("peer_servers", "lapse", 2),  # skipped, with a message, if the package is not installed
    _short("peer_servers", "adapm", 2),
    _short("nodes", "--ranks 2 --nodes 1 2 --rounds 1", needs_shards=True),
    _short("techniques", "--nodes 2 --max-steps 20 --techniques static adaptive --schemes preloc", needs_shards=True),
    _short("scale", "--nodes 4 --workers 8"),
    _short("checkpoint", "models"),
    _short("checkpoint_scale", "8 4"),
)


@dataclass(frozen=True)
class BenchOptions:
    """Which benchmarks to run."""

    names: tuple[str, ...] = option((), positional=True, metavar="NAME", help="modules to run (default: all)")

    def __post_init__(self) -> None:
        known = {module.name for module in MODULES}
        for name in self.names:
            if name not in known:
                raise ConfigError(f"{name} is not run here, expected one of {', '.join(sorted(known))}")


def machine() -> str:
    """Describe the machine, the versions and the moment, in two lines."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        fields = dict(line.split(":", 1) for line in info.read().split("\n\n")[0].splitlines() if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    processor = named.get("model name", platform.machine())
    family = f"family {named.get('cpu family', '?')}, model {named.get('model', '?')}"
    flags = named.get("flags", "").split()
    units = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if _installed(name)]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {usable_cores()} cores of {processor} ({family}; {units}), "
        f"load {os.getloadavg()[0]:.1f}\n"
        f"lapse-elmo {importlib.metadata.version('lapse-elmo') if _installed('lapse-elmo') else commit or '(no git)'}, "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(module: Module, environment: dict[str, str]) -> tuple[int, float, float]:
    """Run a module.

    Returns:
        Its exit status, and the seconds by the clock and of processor time.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run(module.command(), cwd=ROOT, check=False, env=environment).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return status, time.perf_counter() - start, used


def main(argv: list[str]) -> int:
    """Run the benchmarks.

    Returns:
        The exit status: 1 if a module failed.
    """
    options = parse(
        BenchOptions, argv, prog="python -m benchmarks", description="Run the benchmarks in a short form."
    )
    print(machine(), flush=True)
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as bin/train sets it
    taken, failed = [], []
    for module in MODULES:
        if options.names and module.name not in options.names:
            continue
        title = " ".join(part for part in (f"mpirun -n {module.ranks}" * bool(module.ranks), module.name,
                                           *module.arguments) if part)
        print(f"\n--- {title}", flush=True)
        if module.needs_shards and not (ROOT / DEFAULT_SHARDS).exists():
            print(f"skipped: it needs {DEFAULT_SHARDS} (make bench makes them, or make train)")
            continue
        status, wall_s, processor_s = run(module, environment)
        failed += [title] * bool(status)
        taken.append((title, wall_s, processor_s))
        print(f"--- {wall_s:.0f} s, {processor_s:.0f} s of processor time, status {status}", flush=True)
    print("\n| module | seconds | of processor time |\n|---|---|---|")
    for title, wall_s, processor_s in [*taken, ("all", sum(t[1] for t in taken), sum(t[2] for t in taken))]:
        print(f"| {title} | {wall_s:.0f} | {processor_s:.0f} |")
    print("".join(f"failed: {title}\n" for title in failed), end="")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
