"""The sentences of an epoch and those of them still to be trained, saved as two bit sets of the whole corpus.

The shares of the ranks ascend: every sentence of a rank has a smaller number than any of the next rank's. So two sets
serve all ranks of the job, and a rank that resumes, also one of another number of ranks, needs one range of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lapse_elmo.batches import EpochShare
from lapse_elmo.checkpoint.manifest import BY_RANK, SENTENCES, Manifest, rank_file
from lapse_elmo.corpus.files import H5_ERRORS
from lapse_elmo.corpus.shards import WorkerPart
from lapse_elmo.cursor import Position, SavedCursor
from lapse_elmo.errors import CheckpointError
from lapse_elmo.mpi.world import World

EPOCH, LEFT = "epoch", "left"  # the names of the sets in the file

Bits = tuple[int, np.ndarray]  # a number, and bits (numpy.packbits), the first of which stands for that number


@dataclass(frozen=True)
class _Range:
    """A range of a set: ``count`` members after the first ``skipped`` of ``bits``."""

    bits: Bits
    skipped: int
    count: int

    def members(self) -> np.ndarray:
        return _members(self.bits)[self.skipped : self.skipped + self.count]


class BitSet:
    """A set of numbers from 0, as bits.

    Args:
        packed: (bytes,) uint8 as of numpy.packbits; bit i stands for the number i.
    """

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = packed
        counts = np.unpackbits(packed[:, None], axis=1).sum(1, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(counts)])  # members before each byte

    def __len__(self) -> int:
        return int(self._before[-1])

    def largest(self) -> int:
        """Return the largest member; -1 if there is none."""
        return int(_members((0, self._packed[-1:]))[-1]) + 8 * (self._packed.size - 1) if len(self) else -1

    def by_order(self, first: int, end: int) -> _Range:
        """Return the members from the ``first`` to before the ``end``, counted from 0 in ascending order."""
        start = int(np.searchsorted(self._before, first, "right")) - 1
        stop = int(np.searchsorted(self._before, end, "left"))
        return _Range((8 * start, self._packed[start:stop]), first - int(self._before[start]), end - first)

    def between(self, low: int, high: int) -> _Range:
        """Return the members in [``low``, ``high``)."""
        bits = 8 * (low // 8), self._packed[low // 8 : -(-high // 8)]
        skipped, end = np.searchsorted(_members(bits), (low, high)).tolist()
        return _Range(bits, skipped, end - skipped)


@dataclass(frozen=True)
class _CursorShare:
    """What a rank needs to resume within an epoch, as it is sent to it."""

    position: Position
    num_epoch: int = 0
    own: _Range | None = None
    own_left: _Range | None = None
    num_left: int = 0
    rest: _Range | None = None

    def cursor(self, rank: int, size: int) -> SavedCursor:
        def share(num_all: int, members: _Range | None) -> EpochShare | None:
            if members is None:
                return None
            return EpochShare(num_all, WorkerPart.of(num_all, rank, size).first, members.members())

        own_left = self.own_left.members() if self.own_left is not None else None
        return SavedCursor(self.position, share(self.num_epoch, self.own), own_left, share(self.num_left, self.rest))


def gather_sentences(part: np.ndarray, left: np.ndarray, world: World) -> dict[str, np.ndarray]:
    """Unite the sentences of all ranks (collective).

    Args:
        part: This rank's sentences of the epoch, ascending.
        left: Those of them still to be trained, ascending.
        world: The ranks.

    Returns:
        On rank 0 the arrays of ``sentences.h5`` by name; nothing on other ranks.
    """
    gathered = world.gather((pack(part), pack(left)))
    return {name: unite([pair[i] for pair in gathered]) for i, name in enumerate((EPOCH, LEFT))} if gathered else {}


def read_cursor(path: Path, manifest: Manifest, num_sentences: int, world: World) -> SavedCursor:
    """Read this rank's position in the corpus from a verified checkpoint (collective). Rank 0 reads for all.

    Args:
        path: The checkpoint.
        manifest: Its manifest.
        num_sentences: Sentences of the corpus.
        world: The ranks.

    Raises:
        CheckpointError: On every rank, if the checkpoint cannot be read or is not of such a corpus.
    """

    def shares() -> list[_CursorShare]:
        try:
            epoch, left = (BitSet(packed) for packed in _read_sets(path, manifest))
        except H5_ERRORS as error:
            raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None
        if epoch.largest() >= num_sentences or left.largest() >= num_sentences:
            raise CheckpointError(
                f"{path} was saved with a larger corpus than these shards ({num_sentences:,} sentences); give its "
                "shards, or another checkpoint"
            )
        position = Position(*(int(manifest[name]) for name in ("step", "epoch", "step_in_epoch")))
        return deal_out(position, epoch, left, manifest["world_size"], world.size)

    return world.deal(shares).cursor(world.rank, world.size)


def deal_out(position: Position, epoch: BitSet, left: BitSet, saved_size: int, size: int) -> list[_CursorShare]:
    """Return what each of ``size`` ranks needs to resume a run of ``saved_size`` ranks."""
    if not len(epoch):
        return [_CursorShare(position)] * size
    found = []
    for rank in range(size):
        rest = WorkerPart.of(len(left), rank, size)
        share = _CursorShare(position, len(epoch), num_left=len(left), rest=left.by_order(rest.first, rest.end))
        if saved_size == size:
            part = WorkerPart.of(len(epoch), rank, size)
            own = epoch.by_order(part.first, part.end)
            members = own.members()
            low, high = (int(members[0]), int(members[-1]) + 1) if members.size else (0, 0)
            share = _CursorShare(position, len(epoch), own, left.between(low, high), share.num_left, share.rest)
        found.append(share)
    return found


def _read_sets(path: Path, manifest: Manifest) -> list[np.ndarray]:
    """Return the sentences of the epoch and those left of it, as bits; no bits between epochs."""
    if manifest["version"] != BY_RANK:
        if SENTENCES not in manifest["files"]:
            return [np.empty(0, np.uint8)] * 2
        with h5py.File(path / SENTENCES, "r") as file:
            return [_checked(file[name][:]) for name in (EPOCH, LEFT)]
    sets: tuple[list[Bits], list[Bits]] = [], []
    for rank in range(manifest["world_size"]):
        with h5py.File(path / rank_file(rank, manifest["world_size"]), "r") as file:
            for name, found in zip(("part", LEFT), sets, strict=True):
                if f"sentences/{name}" in file:
                    dataset = file[f"sentences/{name}"]
                    found.append((int(dataset.attrs["first"]), _checked(dataset[:])))
    return [unite(found) for found in sets]


def _checked(packed: np.ndarray) -> np.ndarray:
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise ValueError(f"sentences are {packed.dtype} of shape {packed.shape}, expected bytes")
    return packed


def unite(sets: Sequence[Bits]) -> np.ndarray:
    """Return the union of sets as bits, (bytes,) uint8, of which the first stands for 0."""
    sets = [(first, packed) for first, packed in sets if packed.size]
    out = np.zeros(max((first // 8 + 1 + packed.size for first, packed in sets), default=0), np.uint8)
    for first, packed in sets:
        shifted = np.packbits(np.concatenate([np.zeros(first % 8, np.uint8), np.unpackbits(packed)]))
        out[first // 8 : first // 8 + shifted.size] |= shifted
    return out[: int(np.flatnonzero(out).max(initial=-1)) + 1]


def pack(numbers: np.ndarray) -> Bits:
    """Return a set of ``numbers``, which ascend and are at least 0."""
    if not numbers.size:
        return 0, np.empty(0, np.uint8)
    bits = np.zeros(int(numbers[-1] - numbers[0]) + 1, bool)
    bits[numbers - numbers[0]] = True
    return int(numbers[0]), np.packbits(bits)


def _members(bits: Bits) -> np.ndarray:
    """Return the members of a set, (n,) int64, ascending."""
    return np.flatnonzero(np.unpackbits(bits[1])) + bits[0]
