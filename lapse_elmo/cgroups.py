"""The control groups of this process, of version 1 or 2, by which containers, batch systems and systemd limit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = "/sys/fs/cgroup"


def groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folder of each group that this process is in, from the root on, and the version of cgroups: 1 or 2.

    In version 2 the groups are the same for all controllers, and a group may lack the files of one.

    Args:
        controller: "memory" or "cpu".
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = Path(ROOT), 2
        elif controller in controllers.split(","):
            root, version = Path(ROOT, controller), 1
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth]), version


def numbers(path: Path) -> list[int | None]:
    """Return the numbers in a file of a group, None in the place of other words; empty if there is no such file."""
    try:
        words = path.read_text(encoding="ascii").split()
    except OSError:
        return []
    return [int(word) if word.isdigit() else None for word in words]
