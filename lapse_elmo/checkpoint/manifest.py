"""The manifest of a checkpoint: what it holds, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from lapse_elmo.config.training import Config, from_tables
from lapse_elmo.corpus.vocabulary import Vocabulary, VocabularyFile
from lapse_elmo.errors import CheckpointError, ConfigError
from lapse_elmo.inputs import MOST_JSON_BYTES, read_small

Manifest: TypeAlias = "dict[str, Any]"

FORMAT, VERSION = "lapse-elmo checkpoint", 2
MANIFEST = "manifest.json"
DENSE = "dense.h5"
_SHOWN = 60  # characters of a wrong value
_MOST = 1 << 53  # of any count
_MOST_RANKS = 1 << 24
#: What a manifest must hold: the least and the largest of a number, else the type.
_NEEDED: dict[str, type | tuple[int, int]] = {
    "step": (0, _MOST), "epoch": (0, _MOST), "step_in_epoch": (0, _MOST), "world_size": (1, _MOST_RANKS),
    "vocabulary_sha256": str, "num_classes": (1, _MOST), "config": dict, "corpus": dict, "results": dict, "state": dict,
    "files": dict,
}
_BLOCK_BYTES = 1 << 22


def encode(manifest: Manifest) -> bytes:
    """The manifest's file, with its own checksum."""
    return json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there and of the right size.

    :raises CheckpointError: otherwise, or if the manifest is damaged or of another format.
    """
    try:
        manifest = json.loads(read_small(path / MANIFEST, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {manifest.get('version')}, this program reads {VERSION}")
    own = manifest.pop("sha256", None)
    wrong = _what_is_wrong(manifest)
    if wrong:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {wrong}; use another checkpoint")
    if own != _own_sha256(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged (its own checksum); use another checkpoint")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file} is missing or damaged (its size in {MANIFEST}): use another checkpoint")
    return manifest


def _what_is_wrong(manifest: Manifest) -> str:
    """What a manifest lacks or has of another kind than it should; empty if it is all right."""
    for name, wanted in _NEEDED.items():
        if name not in manifest:
            return f"it has no {name!r}"
        value = manifest[name]
        if isinstance(wanted, tuple):
            if not _is_number(value, *wanted):
                return f"{name} is {_short(value)}, expected a whole number from {wanted[0]} to {wanted[1]}"
        elif not isinstance(value, wanted):
            return f"{name} is {_short(value)}, expected a {wanted.__name__}"
    for kind in ("training", "held-out"):
        if not isinstance(manifest["corpus"].get(kind), str):
            return f"corpus does not name the {kind} shards"
    best, milestones = manifest.get("best"), manifest.get("milestones")
    if best is not None and not (
        isinstance(best, dict) and _is_number(best.get("step"), 0, _MOST)
        and isinstance(best.get("perplexity"), int | float)
    ):
        return f"best is {_short(best)}, expected a step and a perplexity"
    if milestones is not None and not _is_milestones(milestones):
        return f"milestones is {_short(milestones)}, expected a number of tokens and steps"
    return _what_is_wrong_with_files(manifest)


def _what_is_wrong_with_files(manifest: Manifest) -> str:
    files, size = manifest["files"], manifest["world_size"]
    for name, entry in files.items():
        if not isinstance(entry, dict) or not _is_number(entry.get("bytes"), 0, _MOST):
            return f"the entry of file {_short(name)} is {_short(entry)}, expected its bytes and sha256"
        if not isinstance(entry.get("sha256"), str):
            return f"the entry of file {_short(name)} has no sha256"
    if len(files) < size or not {DENSE, rank_file(0, size), rank_file(size - 1, size)} <= files.keys():
        return f"it does not name the files of {size} ranks"
    for name in files:
        if Path(name).name != name:
            return f"file {_short(name)} is not in the checkpoint's folder"
    return ""


def _is_number(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_milestones(value: object) -> bool:
    if not isinstance(value, dict) or not _is_number(value.get("num_tokens"), 0, _MOST):
        return False
    pairs = value.get("reached")
    return isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_number(number, 0, _MOST) for number in pair)
        for pair in pairs
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def rank_file(rank: int, size: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}-of-{size:05d}.h5"


def check_files(path: Path, manifest: Manifest, part: int = 0, num_parts: int = 1) -> None:
    """Compare the checksums of every file, or of this of ``num_parts`` parts of them.

    :raises CheckpointError: if one differs.
    """
    for name, entry in sorted(manifest["files"].items())[part::num_parts]:
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"cannot read {path / name}: {error.strerror}: use another checkpoint") from None
        if found != entry["sha256"]:
            raise CheckpointError(f"{path / name} is damaged (its checksum in {MANIFEST}): use another checkpoint")


def config_of(manifest: Manifest, path: Path) -> Config:
    """The config that a checkpoint was trained with."""
    tables = manifest["config"]
    if not all(isinstance(group, dict) for group in tables.values()):
        raise CheckpointError(f"{path / MANIFEST} is damaged: config is not made of groups; use another checkpoint")
    if isinstance(tables.get("optimizer"), dict):  # the first checkpoints know no other accumulators
        tables = {**tables, "optimizer": {"row_accumulators": "element", **tables["optimizer"]}}
    try:
        return from_tables(tables)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{path / MANIFEST} has a config that this program does not read: {error}") from None


def vocabulary_path(path: Path, config: Config) -> Path:
    """The copy of the vocabulary that a run keeps, or the file that it was trained with."""
    copy = path.parent.parent / "vocab.txt"
    return copy if copy.is_file() else Path(config.data.vocab)


def require_vocabulary(manifest: Manifest, vocabulary: Vocabulary | VocabularyFile, path: Path) -> None:
    """Refuse a vocabulary that is not the model's."""
    if vocabulary.sha256 != manifest["vocabulary_sha256"]:
        raise CheckpointError(
            f"the model {path} was trained with the vocabulary of SHA-256 {manifest['vocabulary_sha256'][:16]}... "
            f"({manifest['num_classes']} classes), not with the one given, {vocabulary.sha256[:16]}... "
            f"({vocabulary.size} classes)"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. Other threads may run meanwhile."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _own_sha256(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
