"""Read and check the manifest of a checkpoint, which lists its content, and the checksums of its files."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from lapse_elmo.config.training import Config, from_tables
from lapse_elmo.corpus.vocabulary import Vocabulary, VocabularyFile
from lapse_elmo.errors import CheckpointError, ConfigError, UnreadableError
from lapse_elmo.inputs import MOST_JSON_BYTES, read_small

Manifest: TypeAlias = "dict[str, Any]"

FORMAT, VERSION = "lapse-elmo checkpoint", 3
BY_RANK = 2  # the version with a file per rank, which is still read
MANIFEST = "manifest.json"
DENSE, SENTENCES = "dense.h5", "sentences.h5"
_MAX_SHOWN = 60  # characters of a wrong value in an error message
_MAX_COUNT = 1 << 53  # for any count; exact in a float64
_MAX_RANKS = 1 << 24  # more in a manifest are taken for damage
# No file, or none that this program wrote. Any other error, as of a file server or of permissions, may be over later.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG}
#: Required entries: for numbers the smallest and the largest value, for others the type.
_REQUIRED: dict[str, type | tuple[int, int]] = {
    "step": (0, _MAX_COUNT), "epoch": (0, _MAX_COUNT), "step_in_epoch": (0, _MAX_COUNT), "world_size": (1, _MAX_RANKS),
    "num_nodes": (1, _MAX_RANKS), "vocabulary_sha256": str, "num_classes": (1, _MAX_COUNT), "config": dict,
    "corpus": dict, "results": dict, "state": dict, "files": dict,
}


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of the manifest's file, with its own checksum added."""
    return json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint, and check that all files exist and have the right size.

    Raises:
        CheckpointError: The manifest is damaged or of another format, or a file is missing or of the wrong size.
    """
    try:
        manifest = json.loads(read_small(path / MANIFEST, MOST_JSON_BYTES))
    except OSError as error:
        raise cannot_read(path / MANIFEST, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path / MANIFEST}: {error}; use another checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} is not the manifest of a {FORMAT}")
    if manifest.get("version") not in (BY_RANK, VERSION):
        raise CheckpointError(
            f"{path} has format version {_short(manifest.get('version'))}, expected version {BY_RANK} or {VERSION}; "
            "use the version of lapse-elmo that wrote it"
        )
    own = manifest.pop("sha256", None)
    wrong = _find_defect(manifest)
    if wrong:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {wrong}; use another checkpoint")
    if own != _own_sha256(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged (its own checksum is wrong); use another checkpoint")
    for name, entry in manifest["files"].items():
        file = path / name
        if not _has_size(file, entry["bytes"]):
            raise CheckpointError(
                f"{file} is missing or damaged (its size differs from that in {MANIFEST}); use another checkpoint"
            )
    return manifest


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """Return the error to raise for a file of a checkpoint: an UnreadableError, unless the file is not what it was."""
    reason = f"cannot read {path}: {error.strerror}"
    if error.errno in _NOT_THERE:
        return CheckpointError(f"{reason}; use another checkpoint")
    return UnreadableError(f"{reason}; try again, or use another checkpoint")


def _has_size(file: Path, num_bytes: int) -> bool:
    try:
        return file.is_file() and file.stat().st_size == num_bytes
    except OSError as error:
        raise cannot_read(file, error) from None


def _find_defect(manifest: Manifest) -> str:
    """Return what is wrong with a manifest's entries, or ``""``."""
    for name, wanted in _REQUIRED.items():
        if name == "num_nodes" and manifest["version"] == BY_RANK:
            continue
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
        isinstance(best, dict) and _is_number(best.get("step"), 0, _MAX_COUNT)
        and isinstance(best.get("perplexity"), int | float)
    ):
        return f"best is {_short(best)}, expected a step and a perplexity"
    if milestones is not None and not _is_milestones(milestones):
        return f"milestones is {_short(milestones)}, expected a number of tokens and steps"
    return _find_defect_of_files(manifest)


def _find_defect_of_files(manifest: Manifest) -> str:
    by_rank = manifest["version"] == BY_RANK
    files, count = manifest["files"], manifest["world_size" if by_rank else "num_nodes"]
    for name, entry in files.items():
        if not isinstance(entry, dict) or not _is_number(entry.get("bytes"), 0, _MAX_COUNT):
            return f"the entry of file {_short(name)} is {_short(entry)}, expected its bytes"
        if by_rank and not isinstance(entry.get("sha256"), str):
            return f"the entry of file {_short(name)} has no sha256"
        if not by_rank and not _are_pieces(entry.get("pieces"), entry["bytes"]):
            return f"the entry of file {_short(name)} has no pieces with checksums, which add up to its bytes"
        if Path(name).name != name:
            return f"file {_short(name)} is not in the checkpoint's directory"
    # Few files are seen at once not to be enough: names are not made for as many nodes as a number pretends.
    if len(files) < count or not files.keys() >= {
        DENSE, *row_files(manifest, "embedding"), *row_files(manifest, "softmax")
    }:
        return f"it does not name the files of the {count} {'ranks' if by_rank else 'nodes'}"
    return ""


def _are_pieces(value: object, num_bytes: int) -> bool:
    """Whether ``value`` is a list of [bytes, checksum] for a file of ``num_bytes``."""
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) for pair in value
    ):
        return False
    return all(_is_number(size, 1, _MAX_COUNT) for size, _ in value) and sum(size for size, _ in value) == num_bytes


def _is_number(value: object, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_milestones(value: object) -> bool:
    if not isinstance(value, dict) or not _is_number(value.get("num_tokens"), 0, _MAX_COUNT):
        return False
    pairs = value.get("reached")
    return isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_number(number, 0, _MAX_COUNT) for number in pair)
        for pair in pairs
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def table_file(name: str, node: int, num_nodes: int) -> str:
    """Return the name of the file with a node's rows of the table ``name``."""
    return f"table-{name}-{node:05d}-of-{num_nodes:05d}.h5"


def rank_file(rank: int, size: int) -> str:
    """Return the name of a rank's file in a checkpoint of version 2."""
    return f"rank-{rank:05d}-of-{size:05d}.h5"


def row_files(manifest: Manifest, name: str) -> dict[str, str]:
    """Return the files that have rows of the table ``name``, each with the HDF5 group in which they are."""
    if manifest["version"] == BY_RANK:
        size = manifest["world_size"]
        return {rank_file(rank, size): f"tables/{name}" for rank in range(size)}
    return {table_file(name, node, manifest["num_nodes"]): "/" for node in range(manifest["num_nodes"])}


def config_of(manifest: Manifest, path: Path) -> Config:
    """Return the config that a checkpoint was trained with.

    Raises:
        CheckpointError: The config is damaged, or has options that this version does not know.
    """
    tables = manifest["config"]
    if not all(isinstance(group, dict) for group in tables.values()):
        raise CheckpointError(f"{path / MANIFEST} is damaged: config is not a table of groups; use another checkpoint")
    given = tables.get("optimizer", {})
    # What the options meant before they existed.
    before = {"row_accumulators": "element", "dense_optimizer": given.get("optimizer", "adagrad")}
    tables = {**tables, "optimizer": {**before, **given}}
    try:
        return from_tables(tables)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} has a config that this version of lapse-elmo cannot read: {error}; use the "
            "version that wrote it"
        ) from None


def vocabulary_path(path: Path, config: Config) -> Path:
    """Return the run's copy of the vocabulary or, if it is missing, the file that the run was trained with.

    Raises:
        CheckpointError: Both are missing.
    """
    copy, original = path.parent.parent / "vocab.txt", Path(config.data.vocab)
    if not copy.exists() and not original.exists():
        raise CheckpointError(f"{path} has no vocabulary: neither {copy} nor {original} exists; give it (--vocab FILE)")
    return copy if copy.is_file() else original


def require_vocabulary(manifest: Manifest, vocabulary: Vocabulary | VocabularyFile, path: Path) -> None:
    """Check that ``vocabulary`` is the model's.

    Raises:
        CheckpointError: It is another one.
    """
    if vocabulary.sha256 != manifest["vocabulary_sha256"]:
        raise CheckpointError(
            f"the model {path} was trained with the vocabulary of SHA-256 {manifest['vocabulary_sha256'][:16]}... "
            f"({manifest['num_classes']} classes), but the one given has {vocabulary.sha256[:16]}... "
            f"({vocabulary.size} classes); give the model's vocabulary"
        )


def _own_sha256(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
