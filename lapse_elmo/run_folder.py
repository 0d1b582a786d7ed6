"""The directory of a run: created, replaced, or resumed from a compatible checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import tomli_w

from lapse_elmo import checkpoint
from lapse_elmo.checkpoint import Manifest
from lapse_elmo.config.cli import as_tables
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.files import atomic_write, lock_at_once
from lapse_elmo.corpus.vocabulary import VocabularyFile
from lapse_elmo.cursor import SavedCursor
from lapse_elmo.errors import CheckpointError, OutputError, UnreadableError
from lapse_elmo.inputs import read_small
from lapse_elmo.metrics.run_log import EVENTS, METRICS
from lapse_elmo.metrics.versions import versions
from lapse_elmo.mpi.world import World
from lapse_elmo.training_data import TrainingData

TRACE = "trace"  # the directory of --trace-rows
LOCK = ".lock"
# The batch scripts set this to a name that a job keeps when it is requeued or submits itself again; JOB holds the name.
JOB_VARIABLE, JOB, _MOST_JOB_BYTES = "LAPSE_ELMO_JOB", "job.txt", 4096
# Options that must not change when a run resumes: they determine the shapes or the meaning of the parameters.
_FIXED = {
    "data": ("boundaries",), "model": ("projection_size", "cell_size", "num_layers", "context"),
    "optimizer": ("optimizer",), "training": ("dense",),
}
# Options that may change without a notice: where files are, how long and how fast to train.
_FREE = {
    "data": ("shards", "vocab", "heldout"), "model": ("preset", "lstm"),
    "training": ("max_minutes", "evaluate_every", "patience"),
}


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: at a checkpoint, or (with the default values) at the beginning.

    Attributes:
        path: The checkpoint.
        manifest: Its manifest.
        cursor: This rank's position in the corpus.
        notes: Lines for the log.
        files: The files of the checkpoint that this rank has verified, still open.
    """

    path: Path | None = None
    manifest: Manifest = field(default_factory=dict)
    cursor: SavedCursor | None = None
    notes: tuple[str, ...] = ()
    files: checkpoint.OpenFiles | None = None

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self.cursor.position.step if self.cursor else 0


def name_run(config: Config, world: World) -> Config:
    """Return the config with a directory for the run: if none is given, that of --resume or one named by the time."""
    if config.run.run_dir:
        return config
    if config.run.resume in ("auto", "never"):
        folder = world.bcast(time.strftime("runs/%Y%m%d-%H%M%S"))
    else:
        folder = str(world.agree(lambda: checkpoint.find(Path(config.run.resume))).parent.parent)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=folder))


class RunLock:
    """Exclusive lock on the directory of a run, as a context (collective); removes an empty directory on exit.

    The directory and the file ``.lock`` in it are locked, and the locks end with the process in any case. NFS and
    Lustre lock a directory on one machine alone, a file on all. A file system without locks gives no protection.

    Args:
        run_dir: The directory, created if it is missing.
        world: The world; rank 0 holds the lock.
        active: False for a context that does nothing.

    Raises:
        OutputError: On entry, if another job holds the lock or the directory cannot be written.
    """

    def __init__(self, run_dir: Path, world: World, *, active: bool = True) -> None:
        self._run_dir = run_dir
        self._world = world
        self._active = active
        self._locks: contextlib.ExitStack | None = None

    def __enter__(self) -> RunLock:
        if self._active:
            self._world.agree(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._locks is not None:
            with contextlib.suppress(OSError):
                if not (self._run_dir / checkpoint.FOLDER).is_dir():  # no run has begun
                    (self._run_dir / LOCK).unlink()
                self._run_dir.rmdir()
            self._locks.close()

    def _take(self) -> None:
        with contextlib.ExitStack() as locks:
            try:
                self._run_dir.mkdir(parents=True, exist_ok=True)
                folder = os.open(self._run_dir, os.O_RDONLY)
                locks.callback(os.close, folder)
                lock_at_once(folder)
                self._lock_file(locks.enter_context(open(self._run_dir / LOCK, "ab")))
            except BlockingIOError:
                raise OutputError(
                    f"another job is training in {self._run_dir}: wait for it, or choose another --run-dir"
                ) from None
            except OSError as error:
                raise _cannot_write(self._run_dir, error) from None
            self._locks = locks.pop_all()  # held until the end

    def _lock_file(self, file: BinaryIO) -> None:
        try:
            lock_at_once(file)
        except BlockingIOError:
            # NFS 3 keeps the locks of a machine that has failed; the job that is requeued then must not wait for them.
            if not _begun_by_this_job(self._run_dir):
                raise


def _cannot_write(run_dir: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write to --run-dir {run_dir}: {error.strerror}; choose another")


def find_resume_point(config: Config, data: TrainingData, world: World) -> ResumePoint:
    """Find the checkpoint to resume from, according to --resume and --overwrite, and verify it (collective).

    Raises:
        CheckpointError: If the checkpoint that was asked for, or all that were found, are damaged or do not fit the
            options of this run; or if the newest one cannot be read and so may be intact.
    """
    run, run_dir = config.run, Path(config.run.run_dir)
    notes: list[str] = []
    if (run.overwrite or run.resume != "auto") and world.agree(lambda: _has_saved_before(run_dir)):
        run = dataclasses.replace(run, resume="auto", overwrite=False)
        notes.append("this job has begun the run already: --resume and --overwrite are not repeated")
    if run.resume == "never" or (run.resume == "auto" and run.overwrite):
        return ResumePoint()
    if run.resume == "auto":
        found = world.agree(lambda: [p for p in checkpoint.candidates(run_dir) if p.is_dir()])
        chosen = _newest_intact(found, notes, world)
        if found and chosen is None:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints of {run_dir} is intact ({'; '.join(notes)}): give --overwrite "
                "to start from scratch"
            ).on_every_rank()
    else:
        path = world.agree(lambda: checkpoint.find(Path(run.resume)))
        world.agree(lambda: _refuse_later(path, run_dir, run.overwrite))
        files = checkpoint.OpenFiles(path)
        chosen = files, checkpoint.verified(files, world)
    if chosen is None:
        return ResumePoint()
    files, manifest = chosen
    path = files.path
    changed = world.agree(lambda: require_same(path, manifest, config, data))
    notes += [f"options changed since the checkpoint: {', '.join(changed)}"] if changed else []
    if any(option.startswith("--row-accumulators") for option in changed):
        if config.optimizer.row_accumulators == "row":
            how = "one accumulator per row, initialised with the mean of its elements'"
        else:
            how = "one accumulator per element, each initialised from its row's"
        notes.append(f"the checkpoint's accumulators are converted: {how}")
    before = checkpoint.config_of(manifest, path).dense_optimizer
    if before != config.dense_optimizer:
        notes.append(
            f"the LSTM's optimizer is reset: it was {before}, now it is {config.dense_optimizer} (to continue as "
            f"before, give --dense-optimizer {before})"
        )
    cursor = checkpoint.read_cursor(path, manifest, data.train.num_sentences, world)
    return ResumePoint(path, manifest, cursor, tuple(notes), files)


def _has_saved_before(run_dir: Path) -> bool:
    """Return whether an earlier start of this batch job has begun the run and saved a checkpoint."""
    return _begun_by_this_job(run_dir) and bool(checkpoint.candidates(run_dir))


def _begun_by_this_job(run_dir: Path) -> bool:
    job = os.environ.get(JOB_VARIABLE, "")
    try:
        return bool(job) and read_small(run_dir / JOB, _MOST_JOB_BYTES) == job.encode(errors="replace")
    except OSError:
        return False


def _newest_intact(
    found: list[Path], notes: list[str], world: World
) -> tuple[checkpoint.OpenFiles, Manifest] | None:
    """Return the first of ``found`` that is intact, if any; append a line to ``notes`` for each one that is not.

    Raises:
        UnreadableError: On every rank, if a file of one cannot be read before an intact one is found.
    """
    for path in found:
        files = checkpoint.OpenFiles(path)
        try:
            return files, checkpoint.verified(files, world)
        except UnreadableError:  # to resume from an older one would remove this one, which may be intact
            files.close()
            raise
        except CheckpointError as error:
            files.close()
            notes.append(f"skipped {path.name}: {error}")
    return None


def _refuse_later(path: Path, run_dir: Path, overwrite: bool) -> None:
    """Refuse to resume from an older checkpoint in its own directory, which would lose the later ones."""
    if path.parent.parent != run_dir.resolve() or overwrite:
        return
    order = checkpoint.order_of
    later = [other.name for other in checkpoint.candidates(run_dir) if order(other) > order(path)]
    if later:
        raise CheckpointError(
            f"{run_dir} has checkpoints after {path.name}, the newest is {later[0]}: give another --run-dir to "
            "resume from the older one there, or --overwrite to discard the later ones"
        )


def _up_to(path: Path, run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run up to the step of ``path``, newest first."""
    order = checkpoint.order_of
    return [other for other in checkpoint.candidates(run_dir) if order(other) <= order(path)]


def require_same(path: Path, manifest: Manifest, config: Config, data: TrainingData) -> list[str]:
    """Check that a run may resume from ``path``: the same kind of model, on the same corpus.

    Returns:
        Other options that differ, for a notice.

    Raises:
        CheckpointError: If it may not; the message names every difference.
    """
    checkpoint.require_vocabulary(manifest, data.vocabulary, path)
    saved, now = as_tables(checkpoint.config_of(manifest, path)), as_tables(config)
    refused = _differences(saved, now, _FIXED)
    for kind, name in data.names().items():
        if manifest["corpus"][kind] != name:
            refused.append(f"other {kind} shards (set {manifest['corpus'][kind][:16]}..., now {name[:16]}...)")
    if refused:
        raise CheckpointError(
            f"cannot resume from {path}: it was trained with {', '.join(refused)}; give the same, or another --run-dir"
        )
    length = () if config.optimizer.falls_over_run else ("epochs", "max_steps")  # free if they change no rate
    groups = ("data", "model", "softmax", "optimizer", "training", "initial")
    others = {
        group: tuple(
            name for name in {**saved[group], **now[group]}
            if name not in (*_FIXED.get(group, ()), *_FREE.get(group, ()), *length)
        )
        for group in groups
    }
    return _differences(saved, now, others)


def _shown(value: Any) -> Any:
    return "''" if value == "" else value


def _differences(saved: dict[str, Any], now: dict[str, Any], names: dict[str, tuple[str, ...]]) -> list[str]:
    """Return ``--option OLD (now NEW)`` for each of the named options that differs."""
    return [
        f"--{name.replace('_', '-')} {_shown(saved[group].get(name))} (now {_shown(now[group].get(name))})"
        for group, members in names.items() for name in members
        if saved[group].get(name) != now[group].get(name)
    ]


def prepare(run_dir: Path, config: Config, start: ResumePoint, file: VocabularyFile) -> None:
    """Create the directory of a run with its resolved config, versions and vocabulary, or prepare it for resuming.

    Raises:
        OutputError: If the directory holds a run that may be neither resumed nor overwritten, or cannot be written.
        CorpusError: If the vocabulary's ``file`` is no longer the one of the shards: the model would lack its words.
    """
    here = start.path is not None and start.path.parent.parent.resolve() == run_dir.resolve()
    holds_run = bool(checkpoint.candidates(run_dir)) or (run_dir / METRICS).exists()
    may_replace = config.run.overwrite or _begun_by_this_job(run_dir)
    may_replace = may_replace or (config.run.resume == "auto" and not checkpoint.candidates(run_dir))
    if holds_run and not here and not may_replace:
        raise OutputError(
            f"{run_dir} holds a run already: choose another --run-dir, give --resume auto to resume it, or "
            "--overwrite to replace it"
        )
    vocabulary = file.content()  # before anything is removed: it may belong to the run that is replaced
    if not holds_run:
        _refuse_foreign(run_dir, vocabulary)
    try:
        if here:
            assert start.path is not None
            _keep_only(set(_up_to(start.path, run_dir)), run_dir)
        else:
            _keep_only(set(), run_dir)
            for name in (EVENTS, TRACE):
                shutil.rmtree(run_dir / name, ignore_errors=True)
            for name in (METRICS, checkpoint.BEST):
                (run_dir / name).unlink(missing_ok=True)
        (run_dir / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        # How this start came about is not an option of the run: --config with this file must not overwrite the run.
        run = dataclasses.replace(config.run, resume="auto", overwrite=False)
        options = as_tables(dataclasses.replace(config, run=run))
        atomic_write(run_dir / "config.toml", tomli_w.dumps(options).encode(), overwrite=True)
        atomic_write(run_dir / "versions.toml", tomli_w.dumps(versions()).encode(), overwrite=True)
        atomic_write(run_dir / "vocab.txt", vocabulary, overwrite=True)
        # Last: a start that is killed before has not yet done what --overwrite and --resume ask for.
        if job := os.environ.get(JOB_VARIABLE, ""):
            atomic_write(run_dir / JOB, job.encode(errors="replace"), overwrite=True)
        else:
            (run_dir / JOB).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(run_dir, error) from None


def _refuse_foreign(run_dir: Path, vocabulary: bytes) -> None:
    """Refuse a directory with files of the user's that a run would replace, such as a config.toml written by hand.

    Raises:
        OutputError: It has one, and no run has begun there.
    """
    if (run_dir / checkpoint.FOLDER).is_dir():  # the first thing that a run makes
        return
    for name in ("config.toml", "versions.toml", "vocab.txt", EVENTS, TRACE, checkpoint.BEST, JOB):
        path = run_dir / name
        if os.path.lexists(path) and not _holds(path, vocabulary):  # it may be the vocabulary of the run itself
            raise OutputError(
                f"a run in {run_dir} would replace {path}, which is not of a run: give it another name, or choose "
                "another --run-dir"
            )


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _keep_only(kept: set[Path], run_dir: Path) -> None:
    """Remove all other checkpoints, of which a later resume would take the newest for one of this run.

    Raises:
        OutputError: One of them cannot be removed.
    """
    checkpoint.prune(run_dir, kept)
    if left := set(checkpoint.candidates(run_dir)) - kept:
        newest = max(left, key=checkpoint.order_of)
        raise OutputError(f"cannot remove {newest}, which this run replaces: remove it, or choose another --run-dir")


def open_saver(run_dir: Path, world: World, start: ResumePoint, num_newest: int) -> checkpoint.Saver:
    """Return the saver of a run, which keeps the checkpoint that the run resumes from and the best one of the run.

    Args:
        run_dir: The directory of the run.
        world: The world.
        start: Where the run starts.
        num_newest: How many of the newest checkpoints are kept.
    """

    def earlier() -> tuple[list[Path], tuple[float, Path] | None]:
        """Return the checkpoints that the run keeps, and its best one with its perplexity.

        Checkpoints later than ``start`` are left out: they were damaged, or ``--overwrite`` has discarded them.
        """
        if start.path is None or start.path.parent.parent.resolve() != run_dir.resolve():
            return [], None
        best = start.manifest["best"]
        path = checkpoint.path_of(run_dir, best["step"]) if best else None
        known = (best["perplexity"], path) if path is not None and path.is_dir() else None
        kept = _up_to(start.path, run_dir)[::-1]
        return kept[-num_newest:], known

    kept, known = world.agree(earlier)
    return checkpoint.Saver(run_dir, world, kept, known, num_newest)
