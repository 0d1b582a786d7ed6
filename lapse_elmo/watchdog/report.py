"""Format the watchdog's report: which ranks are silent or busy, where the others wait, and their stacks."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import os
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lapse_elmo.progress import PID
from lapse_elmo.watchdog.view import View

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)[^\n]*\n", re.MULTILINE)
_PACKAGE = "/lapse_elmo/"
_SEPARATOR = "\n\n"  # between threads
_MAX_PHASES = 8  # lines about waiting ranks in a report
# By the state in /proc/PID/stat; an empty state means that the process does not exist.
_STATES = {
    "T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting in the kernel, often for a file system",
    "R": "running without letting its other threads run", "Z": "dead", "": "gone",
}


def own_stacks() -> bytes:
    """Return the stacks of the main thread and of other threads that run code of this package, except the caller.

    They are made by faulthandler, which does not read source files: the file system may be what hangs.

    Raises:
        OSError: If there is no descriptor left.
    """
    # Not os.memfd_create: conda's and uv's builds of Python lack it, because they were built for an older C library.
    file = ctypes.CDLL(None, use_errno=True).memfd_create(b"stacks", 0)
    if file < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        text = os.pread(file, 1 << 20, 0).decode(errors="replace")
    finally:
        os.close(file)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = _THREAD.split(text)[1:]
    threads = {int(ident, 16): body.rstrip() for ident, body in zip(parts[::2], parts[1::2], strict=True)}
    threads.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    order = sorted(threads, key=lambda ident: ident != main)
    lines = [
        f"{names.get(ident, 'a thread of a library')}:\n{threads[ident]}" for ident in order
        if ident == main or _PACKAGE in threads[ident]
    ]
    return _SEPARATOR.join(lines).encode(errors="replace")


def format_ranks(ranks: Iterable[int]) -> str:
    """Format ascending ranks as ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def describe(view: View, silent: np.ndarray, known: np.ndarray, hosts: Sequence[str], here: np.ndarray) -> list[str]:
    """Describe all ranks: the silent ones, the busy ones, and where the others wait.

    Args:
        view: The progress of the ranks.
        silent: (size,) bool, ranks without a heartbeat.
        known: (size,) bool, ranks to describe.
        hosts: The host of each rank.
        here: Ranks of this machine, whose processes can be inspected.

    Returns:
        The lines of the report.
    """
    lines = []
    for rank in np.flatnonzero(known & silent).tolist():
        label = f"rank {rank}/{len(hosts)} on {hosts[rank]}"
        if view.numbers[rank, PID] < 0:
            lines.append(f"  silent: {label}: its node has never reported")
            continue
        state = f", {_state(int(view.numbers[rank, PID]))}" if rank in here else ""
        lines.append(
            f"  silent: {label} (pid {view.numbers[rank, PID]}{state}): last seen in {_phase(view, rank)}, "
            f"{view.idle_s[rank]:.0f} s ago"
        )
    lines += [
        f"  busy: rank {rank}/{len(hosts)} on {hosts[rank]} (pid {view.numbers[rank, PID]}): in {_phase(view, rank)}, "
        f"without progress for {view.idle_s[rank]:.0f} s"
        for rank in np.flatnonzero(known & ~silent & ~view.waiting).tolist()
    ]
    waiting = np.flatnonzero(known & ~silent & view.waiting).tolist()
    by_phase = itertools.groupby(sorted(waiting, key=lambda rank: _phase(view, rank)), lambda r: _phase(view, r))
    groups = sorted(((phase, list(ranks)) for phase, ranks in by_phase), key=lambda group: -len(group[1]))
    for phase, ranks in groups[:_MAX_PHASES]:
        lines.append(f"  waiting for others in {phase}: {_count(len(ranks))}, {format_ranks(ranks)}")
    if len(groups) > _MAX_PHASES:
        lines.append(f"  waiting elsewhere: {_count(sum(len(ranks) for _, ranks in groups[_MAX_PHASES:]))}")
    return lines


def stack_lines(ranks: Sequence[int], stacks: Sequence[bytes]) -> list[str]:
    """Format the threads of ranks, innermost calls first; ranks with equal stacks are listed together."""
    groups: dict[str, list[int]] = {}
    for rank, stack in zip(ranks, stacks, strict=True):
        for thread in filter(None, stack.decode(errors="replace").split(_SEPARATOR)):
            groups.setdefault(thread, []).append(rank)
    lines = []
    for thread, alike in groups.items():
        name, *calls = thread.splitlines()
        lines.append(f"  rank{'s' if len(alike) > 1 else ''} {format_ranks(alike)}, {name}")
        lines += [f"    {call.strip()}" for call in calls]
    return lines


def _phase(view: View, rank: int) -> str:
    return bytes(view.phases[rank]).decode(errors="replace") or "the start"


def _count(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _state(pid: int) -> str:
    """Describe the state of a process of this machine."""
    state = ""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return _STATES.get(state, "asleep")
