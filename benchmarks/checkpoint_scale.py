"""Count what a checkpoint costs a large job: files, opens, bytes read, bytes sent, memory.

``python -m benchmarks.checkpoint_scale [NODES RANKS]`` (64 nodes of 32 ranks by default) writes checkpoints and plays
all ranks of a resume one after another. Files are laid out, written, divided, verified and read by the functions that a
job calls, and opens and bytes are counted as they happen. The first checkpoint is of the whole job, but its rows are
narrow. The second has the files of two of its nodes with rows of full width, of which the bytes are counted.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import h5py
import numpy as np

from lapse_elmo.checkpoint import restoring
from lapse_elmo.checkpoint.checksums import OpenFiles, Piece, check_pieces, entries_of, shares_of_pieces
from lapse_elmo.checkpoint.files import TableShare, lay_out, read_gaps, table_arrays, write_file, write_table_share
from lapse_elmo.checkpoint.manifest import (
    DENSE,
    FORMAT,
    MANIFEST,
    SENTENCES,
    VERSION,
    encode,
    read_manifest,
    table_file,
)
from lapse_elmo.checkpoint.sentences import BitSet, deal_out, pack, unite
from lapse_elmo.cursor import Position
from lapse_elmo.memory import dense_size
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters

NUM_CLASSES, NUM_SENTENCES = 793_471, 30_301_028  # of the 1 Billion Word Benchmark
PROJECTION_SIZE, CELL_SIZE, NUM_LAYERS = 512, 4096, 2  # the original sizes
WIDTHS = {"embedding": 2 * PROJECTION_SIZE, "softmax": 2 * (PROJECTION_SIZE + 1)}  # with --row-accumulators element
NARROW = 1 / 256


class Job(NamedTuple):
    """A job of the `original` sizes: its nodes, the ranks of a node, and its tables."""

    num_nodes: int
    num_ranks: int
    num_classes: int
    widths: dict[str, int]
    dense: int  # dense parameters and accumulators
    num_sentences: int


class Counter:
    """Counts the files that Python and HDF5 open in a directory, within the context."""

    def __init__(self, folder: Path) -> None:
        self.opens = 0
        self._folder, self._active = folder, False
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._active and event == "open" and isinstance(arguments[0], str | os.PathLike):
            self.opens += Path(arguments[0]).parent == self._folder

    def __enter__(self) -> Counter:
        self._active, self._file = True, h5py.File
        counter = self

        class File(h5py.File):
            def __init__(self, name: Any, *arguments: Any, **options: Any) -> None:
                counter.opens += isinstance(name, str | os.PathLike)  # not a file that is open already
                super().__init__(name, *arguments, **options)

        h5py.File = File
        return self

    def __exit__(self, *_: object) -> None:
        self._active, h5py.File = False, self._file


def never() -> bool:
    """Return False: no save is cancelled."""
    return False


def write(folder: Path, job: Job) -> None:
    """Write a checkpoint within an epoch, as the ranks of ``job`` would."""
    pieces: list[Piece] = []
    for name, width in job.widths.items():
        for node in range(job.num_nodes):
            rows = np.arange(node, job.num_classes, job.num_nodes)
            path = folder / table_file(name, node, job.num_nodes)
            layout = lay_out(path, table_arrays(rows.size, width))
            pieces += read_gaps(path, layout)
            for rank in range(job.num_ranks):
                first, end = rows.size * rank // job.num_ranks, rows.size * (rank + 1) // job.num_ranks
                values = np.zeros((end - first, width), np.float32)
                pieces += write_table_share(path, TableShare(rows[first:end], values, first, rows.size), layout, never)
    pieces += write_file(folder / DENSE, {"parameters/all": np.zeros(job.dense, np.float32)}, never)
    bits = np.full(-(-job.num_sentences // 8), 255, np.uint8)
    pieces += write_file(folder / SENTENCES, {"epoch": bits, "left": bits}, never)
    manifest = {
        "format": FORMAT, "version": VERSION, "step": 1, "epoch": 0, "step_in_epoch": 1, "num_nodes": job.num_nodes,
        "world_size": job.num_nodes * job.num_ranks, "vocabulary_sha256": "", "num_classes": job.num_classes,
        "config": {}, "corpus": {"training": "", "held-out": ""}, "results": {}, "state": {},
        "files": entries_of(pieces),
    }
    (folder / MANIFEST).write_bytes(encode(manifest))


def stand_in(job: Job, rank: int, size: int) -> tuple[World, Parameters]:
    """Return as much of a rank and of its parameters as reading rows needs."""
    progress = SimpleNamespace(work_done=lambda: None)
    tables = []
    for name in job.widths:
        segment = SimpleNamespace(name=name, num_rows=job.num_classes, keys=lambda rows: rows)
        server = SimpleNamespace(set=lambda *_: None)
        tables.append(SimpleNamespace(segment=segment, server=server, restored=lambda values: values))
    world = SimpleNamespace(rank=rank, size=size, progress=progress)
    return cast("World", world), cast("Parameters", SimpleNamespace(tables=tables))


def read_bytes() -> int:
    """Return the bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def counted(folder: Path, calls: Iterable[Callable[[], object]]) -> tuple[list[int], int]:
    """Return how many files each call opens, and the bytes that all of them read."""
    counter, opens, start = Counter(folder), [], read_bytes()
    with counter:
        for call in calls:
            before = counter.opens
            call()
            opens.append(counter.opens - before)
    return opens, read_bytes() - start


def resume(folder: Path, job: Job, size: int) -> None:
    """Play ``size`` ranks that verify the checkpoint and read their rows, and print what they do."""
    manifest = read_manifest(folder)
    files = manifest["files"]
    total = sum(entry["bytes"] for entry in files.values())
    rows = sum(entry["bytes"] for name, entry in files.items() if name.startswith("table-"))
    counts = np.zeros(len(job.widths), np.int64)

    read_bytes_of = {"verify": 0, "restore": 0}

    def rank_resumes(rank: int, share: list[Piece]) -> None:
        world, parameters = stand_in(job, rank, size)
        with OpenFiles(folder) as opened:
            start = read_bytes()
            check_pieces(opened, share, lambda: None)
            read_bytes_of["verify"] += read_bytes() - start
            counts[:] += restoring._restore_rows(opened, manifest, parameters, world)
            read_bytes_of["restore"] += read_bytes() - start

    shares = enumerate(shares_of_pieces(manifest, size))
    per_rank, _ = counted(folder, (functools.partial(rank_resumes, rank, share) for rank, share in shares))
    verified = read_bytes_of["verify"]
    restored = read_bytes_of["restore"] - verified
    assert counts.tolist() == [job.num_classes] * len(job.widths)
    print(
        f"  resume by {size} ranks: {np.mean(per_rank):.2f} opens per rank, {max(per_rank)} at most, "
        f"{sum(per_rank):,} in all, without manifest, sentences and dense parameters, which rank 0 opens"
    )
    if job.widths == WIDTHS:  # of narrow rows HDF5 reads more than it is asked for
        print(f"  bytes verified {verified / total:.2f} x the checkpoint, read {restored / rows:.2f} x the tables")


def sentences(size: int) -> None:
    """Print what saving and sharing out the sentences of the 1 Billion Word Benchmark takes rank 0."""
    left = np.flatnonzero(np.random.default_rng(0).random(NUM_SENTENCES) < 0.5)
    bounds = [NUM_SENTENCES * rank // size for rank in range(size + 1)]
    cuts = np.searchsorted(left, bounds).tolist()
    start = time.process_time()
    epoch_set = BitSet(unite([pack(np.arange(a, b)) for a, b in itertools.pairwise(bounds)]))
    left_set = BitSet(unite([pack(left[a:b]) for a, b in itertools.pairwise(cuts)]))
    print(f"sentences: packed and united in {time.process_time() - start:.1f} s of processor time")
    for resumed in (size, size + 1):
        start = time.process_time()
        sizes = [len(pickle.dumps(share)) for share in deal_out(Position(1, 0, 1), epoch_set, left_set, size, resumed)]
        print(
            f"  resume by {resumed} ranks: at most {max(sizes) / 1e3:.1f} kB sent to a rank, {sum(sizes) / 1e6:.1f} MB "
            f"in all, shared out in {time.process_time() - start:.1f} s of processor time"
        )


def main(num_nodes: int, num_ranks: int) -> None:
    """Print the counts for a job of ``num_nodes`` nodes of ``num_ranks`` ranks."""
    size = num_nodes * num_ranks
    dense = 2 * dense_size(PROJECTION_SIZE, CELL_SIZE, NUM_LAYERS)
    table_bytes = NUM_CLASSES * sum(4 * width + 8 for width in WIDTHS.values())
    print(
        f"{num_nodes} nodes of {num_ranks} ranks: tables of {table_bytes / 1e9:.2f} GB, dense parameters of "
        f"{4 * dense / 1e9:.2f} GB; the copy of a node's rows during a save has {table_bytes / num_nodes / 1e6:.0f} MB"
    )
    narrow = {name: int(width * NARROW) for name, width in WIDTHS.items()}
    every_node = Job(num_nodes, num_ranks, NUM_CLASSES, narrow, int(dense * NARROW), NUM_SENTENCES)
    num_classes, num_dense, num_sentences = (2 * number // num_nodes for number in (NUM_CLASSES, dense, NUM_SENTENCES))
    two = Job(2, num_ranks, num_classes, WIDTHS, num_dense, num_sentences)
    for job, readers in ((every_node, (size, size // 2, 2 * size)), (two, (2 * num_ranks,))):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, job)
            manifest_bytes = (folder / MANIFEST).stat().st_size
            widths = "narrow rows" if job is every_node else f"rows of full width, 2 of the {num_nodes} nodes"
            print(f"{len(list(folder.iterdir()))} files, {widths}; the manifest has {manifest_bytes / 1e6:.2f} MB")
            for count in readers:
                resume(folder, job, count)
    sentences(size)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:] or (64, 32)))
