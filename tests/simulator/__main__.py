"""Run simulated schedules of consecutive seeds until one fails, or repeat the schedule of one seed."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

from tests.simulator.schedule import Schedule, failure, run, shrink

_BATCH = 50


def batch(first: int) -> tuple[int, int, int, int | None]:
    """Run ``_BATCH`` schedules; return (schedules, deliveries, checks, the seed that failed or None)."""
    deliveries = checks = 0
    for seed in range(first, first + _BATCH):
        try:
            result = run(Schedule.of(seed))
        except Exception:
            return seed - first, deliveries, checks, seed
        deliveries += result.deliveries
        checks += result.checks
    return _BATCH, deliveries, checks, None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0, help="run for so long instead")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, help="repeat this one, with a traceback")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the schedule")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for a simpler schedule that fails too")
    options = parser.parse_args()
    if options.seed is not None:
        try:
            schedule = changed(Schedule.of(options.seed), options.set)
        except ValueError as error:
            parser.error(f"--set: {error}")
        return repeat(schedule)
    return many(options)


def repeat(schedule: Schedule) -> int:
    """Run one schedule, with a traceback if it fails."""
    print(schedule)
    error = failure(schedule)
    if error is not None:
        traceback.print_exception(error)
        return 1
    print("ends well")
    return 0


def changed(schedule: Schedule, changes: list[str]) -> Schedule:
    """Return ``schedule`` with ``NAME=VALUE`` words applied; raise ValueError for a name or value it cannot have."""
    names = [field.name for field in dataclasses.fields(schedule)]
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in names or not equals:
            raise ValueError(f"got {change}, expected NAME=VALUE with a name of {', '.join(names)}")
        kind = type(getattr(schedule, name))
        value: Any = text == "True" if kind is bool else kind(text)
        schedule = dataclasses.replace(schedule, **{name: value})
    return schedule


def many(options: argparse.Namespace) -> int:
    """Run schedules of consecutive seeds until one fails."""
    start = time.monotonic()
    schedules = deliveries = checks = 0
    with multiprocessing.get_context("fork").Pool(options.jobs, _collect_rarely) as pool:
        for number, delivered, checked, failed in results(pool, firsts(options, start), 2 * options.jobs):
            schedules, deliveries, checks = schedules + number, deliveries + delivered, checks + checked
            if failed is not None:
                pool.terminate()
                smallest = Schedule.of(failed) if options.no_shrink else shrink(Schedule.of(failed))
                error = failure(smallest) or failure(Schedule.of(failed))
                what = (str(error).splitlines() or [""])[0]
                print(f"{type(error).__name__}: {what}: repeat it by python -m tests.simulator {smallest}")
                return 1
    seconds = time.monotonic() - start
    print(f"{schedules} schedules, {deliveries} deliveries, {checks} checks of all nodes: no failure; {seconds:.0f} s")
    return 0


def _collect_rarely() -> None:
    """Have the garbage collector ignore all that was imported, and run rarely: a schedule leaves it 600 objects."""
    gc.freeze()
    gc.set_threshold(50_000)


def firsts(options: argparse.Namespace, start: float) -> Iterator[int]:
    """Yield the first seed of each batch, until all schedules have been started or the time is over."""
    first = options.first
    while time.monotonic() - start < 60 * options.minutes or (
        not options.minutes and first < options.first + options.schedules
    ):
        yield first
        first += _BATCH


def results(pool: Pool, seeds: Iterator[int], ahead: int) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield the results of batches in order; submit at most ``ahead`` early, so that a time limit takes effect."""
    waiting = collections.deque(pool.apply_async(batch, (first,)) for first in itertools.islice(seeds, ahead))
    while waiting:
        yield waiting.popleft().get()
        waiting.extend(pool.apply_async(batch, (first,)) for first in itertools.islice(seeds, 1))


if __name__ == "__main__":
    sys.exit(main())
