"""Shards are read back as they were written, and damaged files are reported by name."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapse_elmo.corpus import shard_file
from lapse_elmo.corpus import shards as shards_module
from lapse_elmo.corpus.shards import Header, KeptSentences, ShardFile, ShardSet, ShardWriter, shard_name
from lapse_elmo.corpus.vocabulary import Vocabulary
from lapse_elmo.errors import CorpusError
from lapse_elmo.mpi.world import World, solo

VOCABULARY = Vocabulary.from_words(["a", "b", "c", "d"])


def write_set(
    directory: Path, sentences: list[list[int]], num_shards: int = 2, split: str = "train", name: str = "set"
) -> list[list[int]]:
    """Write shards of ``sentences``; returns the sentences in the order of their global numbers."""
    directory.mkdir(exist_ok=True)
    ordered = []
    for index in range(num_shards):
        mine = sentences[index::num_shards]
        ordered += mine
        tokens = np.array([token for sentence in mine for token in sentence], np.int32)
        header = Header(
            split, index, num_shards, len(mine), len(tokens), int((tokens == 3).sum()), VOCABULARY.sha256,
            VOCABULARY.size, name, "{}",
        )
        writer = ShardWriter(directory / shard_name(split, index, num_shards), header, ["text"])
        for sentence in mine:
            writer.append(np.array(sentence, np.int32), np.array([len(sentence)]))
        writer.close()
    return ordered


corpora = st.lists(st.lists(st.integers(3, VOCABULARY.size), min_size=1, max_size=9), min_size=3, max_size=40)


@given(corpora, st.integers(1, 3), st.data())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[int]], num_shards: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "CHUNK", 8)
        patch.setattr(shard_file, "_BUFFER_VALUES", 16)
        patch.setattr(shard_file, "_MAX_GAP", data.draw(st.integers(1, 5)))
        patch.setattr(shard_file, "_MAX_SPAN", 7)
        directory = tmp_path_factory.mktemp("shards")
        ordered = write_set(directory, sentences, num_shards)
        wanted = sorted(data.draw(st.lists(st.integers(0, len(ordered) - 1), max_size=30)))
        with ShardSet.open(directory, vocabulary=VOCABULARY) as shards:
            tokens, offsets = shards.read(np.array(wanted, np.int64))
            assert (tokens.dtype, offsets.dtype) == (np.int32, np.int64)
            assert [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [
                ordered[n] for n in wanted
            ]
            assert shards.num_sentences == len(ordered)
            assert shards.num_tokens == sum(map(len, ordered))
            assert shards.num_unknown == sum(sentence.count(3) for sentence in ordered)
            expected = Counter(token for sentence in ordered for token in sentence)
            assert dict(enumerate(shards.unigram_counts(solo()).tolist())) == {n: expected[n] for n in range(8)}
            for path in shards.paths:
                ShardFile(path).verify()
            first = data.draw(st.integers(0, len(ordered) - 1))
            end = data.draw(st.integers(first, len(ordered)))
            shards.kept = KeptSentences(first, *shards.read(np.arange(first, end)))
            again = shards.read(np.array(wanted, np.int64))
            assert [array.tolist() for array in again] == [tokens.tolist(), offsets.tolist()]
            assert [array.dtype for array in again] == [np.int32, np.int64]
            kept = Counter(token for sentence in ordered[first:end] for token in sentence)
            assert dict(enumerate(shards.unigram_counts(solo()).tolist())) == {n: kept[n] for n in range(8)}


def test_same_calls_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, [[4, 5], [6], [3]])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_set_by_directory_pattern_and_files(tmp_path: Path) -> None:
    write_set(tmp_path, [[4], [5], [6]])
    write_set(tmp_path, [[7]], 1, "heldout")
    files = sorted(tmp_path.glob("train-*"), reverse=True)
    for given_paths in (tmp_path, str(tmp_path), f"{tmp_path}/train-*", files, [*files, tmp_path]):
        assert ShardSet.open(given_paths).num_sentences == 3
    assert ShardSet.open(tmp_path, "heldout").read(np.array([0]))[0].tolist() == [7]
    with pytest.raises(CorpusError, match="heldout text; expected shards of train"):
        ShardSet.open(f"{tmp_path}/*.h5")


def test_incomplete_and_mixed_sets(tmp_path: Path) -> None:
    write_set(tmp_path / "s", [[4], [5], [6]], 3)
    with pytest.raises(CorpusError, match="holds no heldout shards"):
        ShardSet.open(tmp_path / "s", "heldout")
    with pytest.raises(CorpusError, match="do not exist"):
        ShardSet.open(tmp_path / "none")
    with pytest.raises(CorpusError, match="matches no train shards"):
        ShardSet.open(f"{tmp_path}/*.none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no train shards"):
        ShardSet.open(tmp_path / "empty")
    shutil.copy(tmp_path / "s" / shard_name("train", 1, 3), tmp_path / "s" / "train-00001-of-copy.h5")
    with pytest.raises(CorpusError, match="are the same shard"):
        ShardSet.open(tmp_path / "s")
    (tmp_path / "s" / "train-00001-of-copy.h5").unlink()
    (tmp_path / "s" / shard_name("train", 1, 3)).unlink()
    with pytest.raises(CorpusError, match=r"1 of the 3 train shards .*are missing, the first is shard 1;"):
        ShardSet.open(tmp_path / "s")
    write_set(tmp_path / "t", [[4], [5], [6]], 3, name="other")
    shutil.copy(tmp_path / "t" / shard_name("train", 1, 3), tmp_path / "s")
    with pytest.raises(CorpusError, match="belong to different sets"):
        ShardSet.open(tmp_path / "s")
    other = Vocabulary.from_words(["z"])
    with pytest.raises(CorpusError, match=f"{VOCABULARY.sha256[:16]}.*{other.sha256[:16]}"):
        ShardSet.open(tmp_path / "t", vocabulary=other)


def test_an_empty_set(tmp_path: Path) -> None:
    write_set(tmp_path, [], 1, "heldout")
    with pytest.raises(CorpusError, match="hold no sentence"):
        ShardSet.open(tmp_path, "heldout")


def test_foreign_and_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / shard_name("train", 0, 1)
    path.write_bytes(b"some text, no HDF5 at all\n" * 10)
    with pytest.raises(CorpusError, match="is not an HDF5 file"):
        ShardSet.open(tmp_path)
    with h5py.File(path, "w") as file:
        file["tokens"] = [1, 2]
    with pytest.raises(CorpusError, match="not a shard of lapse-elmo"):
        ShardSet.open(tmp_path)
    write_set(tmp_path, [[4, 5]] * 20_000, 1)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=r"is damaged|is not an HDF5"):
            ShardSet.open(tmp_path)
    path.write_bytes(whole)
    for name, value, message in (("version", 2, "format version 2"), ("num_tokens", 7, "is damaged"),
                                 ("split", "other", "is damaged"), ("options", 3, "is damaged")):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value
        with pytest.raises(CorpusError, match=message):
            ShardSet.open(tmp_path)


def test_damage_in_the_data_is_found_by_reading(tmp_path: Path) -> None:
    write_set(tmp_path, [[4, 5, 6, 7]] * 40_000, 1)
    path = tmp_path / shard_name("train", 0, 1)
    whole = path.read_bytes()
    at = whole.index(np.array([4, 5, 6, 7] * 100, np.int32).tobytes())
    path.write_bytes(whole[: at + 40] + b"\xff" + whole[at + 41 :])
    with ShardSet.open(tmp_path) as shards:
        with pytest.raises(CorpusError, match=f"{path} is damaged"):
            for n in range(0, 40_000, 4096):
                shards.read(np.arange(n, min(n + 4096, 40_000)))
        with pytest.raises(CorpusError, match=f"{path} is damaged"):
            shards.unigram_counts(solo())
    with pytest.raises(CorpusError, match="is damaged"):
        ShardFile(path).verify()


def test_wrong_ids_and_offsets_behind_good_checksums(tmp_path: Path) -> None:
    path = tmp_path / shard_name("train", 0, 1)
    for name, place, value in (("tokens", 1, 99), ("tokens", 1, 0), ("offsets", 1, 99), ("offsets", 1, -1)):
        write_set(tmp_path, [[4, 5], [6]], 1)
        with h5py.File(path, "r+") as file:
            file[name][place] = value
        shards = ShardSet.open(tmp_path)
        with pytest.raises(CorpusError, match="is damaged"):
            shards.read(np.array([0, 1]))
        shards.close()
    for name, place, value in (("tokens", 1, 3), ("offsets", 0, 1), ("offsets", 2, 2)):
        write_set(tmp_path, [[4, 5], [6]], 1)
        with h5py.File(path, "r+") as file:
            file[name][place] = value
        with pytest.raises(CorpusError, match="is damaged"):
            ShardFile(path).verify()


def _read_in_child(shards: ShardSet, queue: multiprocessing.Queue) -> None:
    queue.put(shards.read(np.array([1]))[0].tolist())


def test_reading_on_both_sides_of_a_fork(tmp_path: Path) -> None:
    ordered = write_set(tmp_path, [[4, 5], [6]], 1)
    shards = ShardSet.open(tmp_path)
    shards.read(np.array([0]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(shards, queue))
    child.start()
    assert queue.get(timeout=30) == ordered[1]
    child.join(30)
    assert shards.read(np.array([1]))[0].tolist() == ordered[1]
    shards.close()


def test_few_ranks_read_many_shards_with_few_open_files(tmp_path: Path) -> None:
    ordered = write_set(tmp_path, [[4], [5]] * 50, num_shards=100)
    with ShardSet.open(tmp_path) as shards:
        for _ in range(2):
            assert [shards.read(np.array([n]))[0].tolist() for n in range(100)] == ordered
        assert 1 < len(_open_files_in(tmp_path)) <= 64
        shards.close()
        assert shards.unigram_counts(solo())[4:6].tolist() == [50, 50]
        assert 1 < len(_open_files_in(tmp_path)) <= 64
    assert not _open_files_in(tmp_path)


def _open_files_in(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(link))
    return [path for path in found if path.startswith(str(folder))]


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Unable to synchronously open file")

    write_set(tmp_path, [[4]], 1)
    with ShardSet.open(tmp_path) as shards:
        monkeypatch.setattr(shard_file.h5py, "File", refuse)
        with pytest.raises(CorpusError, match=r"cannot read shard .*: Too many open files; raise ulimit -n$"):
            shards.read(np.array([0]))


def test_header_lists_every_attribute(tmp_path: Path) -> None:
    write_set(tmp_path, [[4]], 1)
    with h5py.File(tmp_path / shard_name("train", 0, 1)) as file:
        names = {field.name for field in dataclasses.fields(Header)}
        assert set(file.attrs) == names | {"format", "version"}
        assert all(file[name].fletcher32 for name in ("tokens", "offsets", "sources"))


class Seventh(World):
    """A stand-in for the World of rank 7 of 8, which receives ``told`` from rank 0."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.rank, self.size, self._told = 7, 8, told

    def agree(self, function: Callable[[], Any]) -> Any:
        return self._told


def test_a_rank_that_is_told_the_headers_opens_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set", [[4], [5], [6], [7]], num_shards=4)
    told = [(file.path, file.header) for file in ShardSet.open(tmp_path / "set")._files]
    opened: list[str] = []
    open_file = h5py.File

    def counted(path: str, *arguments: Any, **options: Any) -> h5py.File:
        opened.append(path)
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(shard_file.h5py, "File", counted)
    with ShardSet.open_on_all(Seventh(told), tmp_path / "set", "train", VOCABULARY) as shards:
        assert shards.num_sentences == 4 and not opened
        for _ in range(2):
            assert shards.read(np.array([3]))[0].tolist() == [7]
        assert opened == [shards.paths[3]]
        shards.kept = KeptSentences(2, *shards.read(np.array([2, 3])))
        assert opened == [shards.paths[3], shards.paths[2]]
        shards.close()
        for _ in range(2):
            assert shards.read(np.array([2, 3]))[0].tolist() == [6, 7]
        assert len(opened) == 2, "sentences in memory were read from a file"
        monkeypatch.setattr(shards_module, "_MOST_KEPT_BYTES", 5)
        assert shards.kept_bytes(8) == 0 < shards.kept_bytes(16)
    write_set(tmp_path / "set", [[4], [4], [4], [4]], num_shards=4, name="another")
    with pytest.raises(CorpusError, match=r"train-00001-of-00004.h5 has been replaced by a shard of another set"):
        shards.read(np.array([1]))
    (tmp_path / "set" / shard_name("train", 3, 4)).unlink()
    with pytest.raises(CorpusError, match=r"cannot read shard .*train-00003-of-00004.h5 on "):
        ShardSet.open_on_all(Seventh(told), tmp_path / "set", "train", VOCABULARY)
