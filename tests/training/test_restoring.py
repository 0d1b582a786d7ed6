"""A checkpoint restores the same bits on any number of ranks and nodes, and a rank reads no more of it than it must."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo.checkpoint.checksums import OpenFiles, check_pieces, divide, shares_of_pieces
from lapse_elmo.checkpoint.sentences import BitSet, pack, unite
from tests import mpi
from tests.training.corpora import checkpoints, saved_arrays
from tests.training.restoring import EPOCH, LEFT, known_rows

PROGRAM = Path(__file__).with_name("restoring.py")
LIMIT_S = 240
#: For each saved run the ranks and nodes that saved it.
SAVED = {"solo": (1, 1), "one": (4, 1), "two": (4, 2)}
#: For each restored run, the run, and the ranks and nodes that restored it.
RESTORED = {
    "solo by 1": ("solo", 1, 1), "solo by 3": ("solo", 3, 1), "solo by 4 on 2": ("solo", 4, 2),
    "one by 1": ("one", 1, 1), "one by 4 on 2": ("one", 4, 2),
    "two by 1": ("two", 1, 1), "two by 3 on 3": ("two", 3, 3), "two by 4 on 2": ("two", 4, 2),
}
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restoring")


@pytest.fixture(scope="module")
def reports(folder: Path) -> Reports:
    """Return what each rank read, by restored run; three jobs restore all, since starting jobs is slow."""
    found: Reports = {}

    def job(num_ranks: int, *words: str) -> None:
        """``name@run`` restores the run."""
        names = [word.split("@")[0] for word in words if "@" in word]
        arguments = []
        for word in words:
            name, at, run = word.partition("@")
            if at:  # under a name of its own, since the restored run is saved again next to it
                (folder / name).symlink_to(folder / run, target_is_directory=True)
            kind = "restore=" if at else "save=" if word in SAVED else ""
            arguments.append(f"{kind}{folder / name}" if kind else word)
        ended = mpi.mpirun(num_ranks, [PROGRAM, folder / "report.json", *arguments], timeout=LIMIT_S)
        assert ended.returncode == 0, ended.output
        found.update(zip(names, json.loads((folder / "report.json").read_text()), strict=True))

    job(1, "solo", "solo by 1@solo")
    job(4, "one", "nodes=2", "two", "solo by 4 on 2@solo", "one by 4 on 2@one", "two by 4 on 2@two")
    job(1, "one by 1@one", "two by 1@two")
    job(3, "solo by 3@solo", "nodes=3", "two by 3 on 3@two")
    return found


def test_every_table_has_a_file_per_node(folder: Path, reports: Reports) -> None:
    for name, (_, nodes) in SAVED.items():
        names = ("embedding", "softmax")
        tables = {f"table-{table}-{node:05d}-of-{nodes:05d}.h5" for table in names for node in range(nodes)}
        (saved,) = checkpoints(folder / name)
        assert {path.name for path in saved.iterdir()} == {*tables, "dense.h5", "sentences.h5", "manifest.json"}
    sizes = [path.stat().st_size for path in sorted(checkpoints(folder / "two")[0].glob("table-softmax-*"))]
    assert sizes[1] > 1.8 * sizes[0]  # rows had moved


@pytest.mark.parametrize("name", RESTORED)
def test_the_bits_are_those_that_were_saved(folder: Path, reports: Reports, name: str) -> None:
    first, again = (saved_arrays(checkpoints(folder / run)[0]) for run in (name, f"{name}.again"))
    assert first.keys() == again.keys() and len(first) > 10
    for array in first:
        np.testing.assert_array_equal(first[array], again[array], err_msg=array)
    for number, table in enumerate(("embedding", "softmax")):
        np.testing.assert_array_equal(again[table], known_rows(number, *again[table].shape))


@pytest.mark.parametrize("name", RESTORED)
def test_every_sentence_that_is_left_is_of_one_rank(reports: Reports, name: str) -> None:
    run, num_ranks, _ = RESTORED[name]
    ranks = reports[name]
    assert len(ranks) == num_ranks
    assert [number for rank in ranks for number in rank["rest"]] == LEFT.tolist()
    sizes = [len(rank["rest"]) for rank in ranks]
    assert max(sizes) - min(sizes) <= 1
    if num_ranks != SAVED[run][0]:
        assert all(rank["own"] is None for rank in ranks)
    else:  # these may resume as if they had not stopped
        assert [number for rank in ranks for number in rank["own"]] == EPOCH.tolist()
        assert all(rank["own_left"] == sorted({*rank["own"]} & {*LEFT.tolist()}) for rank in ranks)


@pytest.mark.parametrize("name", RESTORED)
def test_what_is_read(folder: Path, reports: Reports, name: str) -> None:
    """The files are read once to verify them and once for their content, by all ranks together."""
    run, num_ranks, _ = RESTORED[name]
    saved = {path.name: path.stat().st_size for path in checkpoints(folder / run)[0].iterdir()}
    once = {"manifest.json"}
    read = sum(rank["bytes"] for rank in reports[name])
    assert read < 1.01 * sum(size * (2 - (name in once)) for name, size in saved.items()) + 20_000 * num_ranks
    for number, rank in enumerate(reports[name]):
        of_job = {"manifest.json", "sentences.h5", "dense.h5"} if number == 0 else set()
        tables = [name for name in rank["opens"] if name not in of_job]
        if num_ranks >= len(saved) - 1:  # as many ranks as files
            assert len(tables) <= 1, rank["opens"]
        assert len(tables) == len(set(tables)), "a file was opened once more to restore from it"
    opens = sum(len(rank["opens"]) for rank in reports[name])
    assert opens <= len(saved) + num_ranks + 1  # rank 0 opens the sentences, which another rank has verified


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 6, 7, 64, 2048])
@pytest.mark.parametrize("sizes", [[7], [5, 5], [1, 1000, 1], [0, 9, 0, 3], [10**12 + n for n in range(5)], [0, 0]])
def test_files_are_divided_among_readers(sizes: list[int], num_parts: int) -> None:
    shares = divide(sizes, num_parts)
    assert len(shares) == num_parts
    parts: dict[int, list[tuple[int, int]]] = {}
    for share in shares:
        for file, start, end in share:
            parts.setdefault(file, []).append((start, end))
    for file, size in enumerate(sizes):  # every byte has one reader
        ends = [0, *(end for _, end in parts.get(file, []))]
        assert [start for start, _ in parts.get(file, [])] == ends[:-1] and ends[-1] == size
    if num_parts >= len(sizes) and any(sizes):
        assert all(len(share) == 1 for share in shares)
    loads = [sum(end - start for _, start, end in share) for share in shares]
    if num_parts < len(sizes):
        assert max(loads) - min(loads) <= 1 and sum(map(len, shares)) < len(sizes) + num_parts
    if num_parts >= 10 * len(sizes):
        assert max(loads) <= 1.25 * sum(sizes) / num_parts + 1


@pytest.mark.parametrize("numbers", [[], [0], [7], [8], [0, 1, 2, 63, 64, 4000], list(range(100, 1000, 3))])
def test_ranges_of_a_set(numbers: list[int]) -> None:
    kept = BitSet(unite([pack(np.array(numbers, np.int64))]))
    assert len(kept) == len(numbers) and kept.largest() == max(numbers, default=-1)
    for first in range(0, len(numbers) + 1, 3):
        for end in range(first, len(numbers) + 1, 2):
            assert kept.by_order(first, end).members().tolist() == numbers[first:end]
    for low in (0, 1, 7, 8, 100, 101, 999, 5000):
        for high in (low, low + 1, low + 9, low + 2000):
            assert kept.between(low, high).members().tolist() == [n for n in numbers if low <= n < high]


def test_the_union_of_sets() -> None:
    rng = np.random.default_rng(1)
    numbers = np.unique(rng.integers(0, 3000, 900))
    united = BitSet(unite([pack(part) for part in np.array_split(numbers, 13)]))
    assert united.by_order(0, numbers.size).members().tolist() == numbers.tolist()
    assert unite([]).size == 0


def test_few_ranks_verify_many_files_with_few_of_them_open(tmp_path: Path) -> None:
    """As those of hundreds of nodes, or of all ranks in version 2."""
    names = [f"table-{number}.h5" for number in range(300)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    entry = {"bytes": 1, "pieces": [[1, hashlib.sha256(b"x").hexdigest()]]}
    (pieces,) = shares_of_pieces({"files": dict.fromkeys(names, entry)}, 1)
    before, opened = len(os.listdir("/proc/self/fd")), []
    with OpenFiles(tmp_path) as files:
        for _ in range(2):
            check_pieces(files, pieces, lambda: opened.append(len(os.listdir("/proc/self/fd")) - before))
    assert len(opened) == 600 and max(opened) == 256
    assert len(os.listdir("/proc/self/fd")) == before
