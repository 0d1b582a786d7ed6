"""Checksums of the files of a checkpoint, by pieces, so that any number of ranks write and verify a file together."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from lapse_elmo.checkpoint.manifest import MANIFEST, Manifest, cannot_read, read_manifest
from lapse_elmo.errors import CheckpointError
from lapse_elmo.inputs import RecentFiles
from lapse_elmo.mpi.world import World

_BLOCK_BYTES = 1 << 22  # bytes per read
_MOST_OPEN = 256  # files of a checkpoint


class Piece(NamedTuple):
    """Consecutive bytes of a file, and their SHA-256 in hexadecimal."""

    file: str
    start: int
    size: int
    sha256: str


def entries_of(pieces: Iterable[Piece]) -> dict[str, dict[str, object]]:
    """Return the entries of files in the manifest, from the pieces that all ranks have written."""
    entries: dict[str, dict[str, object]] = {}
    for name, found in groupby(sorted(pieces), key=lambda piece: piece.file):
        end, listed = 0, []
        for _, start, size, sha256 in found:
            assert start == end, f"{name}: the pieces leave a gap, or overlap, at {end}"
            end = start + size
            listed.append([size, sha256])
        entries[name] = {"bytes": end, "pieces": listed}
    return entries


def pieces_of(manifest: Manifest, name: str) -> list[Piece]:
    """Return the pieces of the file ``name``, in order; in version 2 a file is one piece."""
    entry = manifest["files"][name]
    pieces, start = [], 0
    for size, sha256 in entry.get("pieces") or [(entry["bytes"], entry.get("sha256", ""))]:
        pieces.append(Piece(name, start, size, sha256))
        start += size
    return pieces


def divide(sizes: Sequence[int], num_parts: int) -> list[list[tuple[int, int, int]]]:
    """Divide files among ``num_parts`` readers such that none opens more of them than it must.

    With at least as many readers as files each reader opens one; a file has readers in proportion to its size. With
    fewer, each has as many bytes as any other, in files that follow each other.

    Args:
        sizes: Bytes of the files.
        num_parts: The number of readers.

    Returns:
        For each reader (file, start, end) for each file of its share, which is the bytes [start, end) of it.
    """
    count, total = len(sizes), sum(sizes)
    ends = list(accumulate(sizes, initial=0))
    if num_parts < count or not total:
        shares = []
        for first, end in pairwise([total * part // num_parts for part in range(num_parts + 1)]):
            files = range(bisect_right(ends, first) - 1, bisect_left(ends, end))
            shares.append([(n, max(first - ends[n], 0), min(end - ends[n], sizes[n])) for n in files if sizes[n]])
        return shares
    # Each file has one reader, and its part of the others.
    readers = pairwise([file + (num_parts - count) * before // total for file, before in enumerate(ends)])
    return [
        [(file, sizes[file] * i // (end - first), sizes[file] * (i + 1) // (end - first))]
        for file, (first, end) in enumerate(readers) for i in range(end - first)
    ]


class OpenFiles(RecentFiles[str, FileIO]):
    """The files of a checkpoint that this process has read from, still open for the next reader (the latest ones).

    A resume reads a file twice, to verify it and for its content. Thousands of ranks that open each file twice load a
    file server for nothing. A file is at an undefined position.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(lambda name: open(path / name, "rb", buffering=0), _MOST_OPEN)  # noqa: SIM115 (close() does)
        self.path = path

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shares(manifest: Manifest, num_parts: int) -> list[list[tuple[str, int, int]]]:
    """Return (file, start, end) for each reader's share of all files, see :func:`divide`.

    A reader has the same share when it verifies a checkpoint and when it restores from it. Rank 0 begins with the
    dense parameters, which it alone restores.
    """
    names = sorted(manifest["files"])
    sizes = [manifest["files"][name]["bytes"] for name in names]
    return [[(names[file], start, end) for file, start, end in share] for share in divide(sizes, num_parts)]


def shares_of_pieces(manifest: Manifest, num_parts: int) -> list[list[Piece]]:
    """Return each reader's share of the pieces of all files: those that begin in its bytes."""
    pieces = {name: pieces_of(manifest, name) for name in manifest["files"]}
    starts = {name: [piece.start for piece in found] for name, found in pieces.items()}
    return [
        [
            piece
            for name, start, end in share
            for piece in pieces[name][bisect_left(starts[name], start) : bisect_left(starts[name], end)]
        ]
        for share in shares(manifest, num_parts)
    ]


def verified(files: OpenFiles, world: World) -> Manifest:
    """Check all files of a checkpoint, which the ranks share, and return its manifest (collective).

    The manifest comes without the checksums: there are some for every rank that wrote, and no rank needs all of them.

    Args:
        files: The files of the checkpoint; those that this rank reads stay open.
        world: The ranks.

    Raises:
        CheckpointError: On every rank, if a file is missing or damaged.
    """
    known: list[Manifest] = []

    def pieces_by_rank() -> list[list[Piece]]:
        known.append(read_manifest(files.path))
        return shares_of_pieces(known[0], world.size)

    own = world.deal(pieces_by_rank)
    world.together(lambda: check_pieces(files, own, world.progress.work_done))

    def without_checksums() -> Manifest:
        sizes = {name: {"bytes": entry["bytes"]} for name, entry in known[0]["files"].items()}
        return {**known[0], "files": sizes}

    return world.agree(without_checksums)


def check_files(path: Path, manifest: Manifest) -> None:
    """Verify the checksums of all files.

    Args:
        path: The checkpoint.
        manifest: Its manifest, from :func:`~lapse_elmo.checkpoint.manifest.read_manifest`.

    Raises:
        CheckpointError: A file cannot be read, or its checksum differs.
    """
    (pieces,) = shares_of_pieces(manifest, 1)
    with OpenFiles(path) as files:
        check_pieces(files, pieces, lambda: None)


def check_pieces(files: OpenFiles, pieces: Sequence[Piece], done: Callable[[], None]) -> None:
    """Verify checksums.

    Args:
        files: The files of the checkpoint.
        pieces: What to verify.
        done: Called after each block.

    Raises:
        CheckpointError: A file cannot be read, or its checksum differs.
    """
    block = memoryview(bytearray(min(_BLOCK_BYTES, max((piece.size for piece in pieces), default=0))))
    for piece in pieces:
        path = files.path / piece.file
        try:
            file = files.get(piece.file)
            digest, left = hashlib.sha256(), piece.size
            file.seek(piece.start)
            while left and (size := file.readinto(block[: min(left, len(block))])):  # releases the GIL
                digest.update(block[:size])
                left -= size
                done()
        except OSError as error:
            raise cannot_read(path, error) from None
        if digest.hexdigest() != piece.sha256:
            raise CheckpointError(
                f"{path} is damaged (its checksum differs from that in {MANIFEST}); use another checkpoint"
            )
