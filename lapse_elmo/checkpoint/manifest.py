"""The manifest of a checkpoint: what it holds, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from lapse_elmo.config.training import Config, from_tables
from lapse_elmo.corpus.vocabulary import Vocabulary, VocabularyFile
from lapse_elmo.errors import CheckpointError, ConfigError

Manifest: TypeAlias = "dict[str, Any]"

FORMAT, VERSION = "lapse-elmo checkpoint", 2
MANIFEST = "manifest.json"
_NEEDED = (
    "step", "epoch", "step_in_epoch", "world_size", "vocabulary_sha256", "num_classes", "config", "corpus", "results",
    "state", "files",
)
_BLOCK_BYTES = 1 << 22


def encode(manifest: Manifest) -> bytes:
    """The manifest's file, with its own checksum."""
    return json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there and of the right size.

    :raises CheckpointError: otherwise, or if the manifest is damaged or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {manifest.get('version')}, this program reads {VERSION}")
    own = manifest.pop("sha256", None)
    missing = [key for key in _NEEDED if key not in manifest]
    if missing:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it has no {missing[0]!r}; use another checkpoint")
    if own != _own_sha256(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged (its own checksum); use another checkpoint")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file} is missing or damaged (its size in {MANIFEST}): use another checkpoint")
    return manifest


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
