"""Where a worker is in the corpus: steps, epochs, and which sentences of the epoch it still has to train.

The sentences are what counts for a run that goes on with another number of ranks: those that are left of the epoch are
shared out anew, each once. A run that resumes with the same ranks takes the same batches as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.batches import Batch, BatchStream, WorkerPart
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.growth import BatchGrowth
from lapse_elmo.mpi.world import World


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps in all, epochs completed, and steps done in the epoch that is under way."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class SavedCursor:
    """What a checkpoint knows of an epoch under way.

    :ivar parts: by rank of the run that saved it, the sentences (ascending) that were its share of the epoch, or of
        the rest of the epoch that it went on with. None at all where no epoch was begun.
    :ivar left: likewise, those that were not trained yet.
    """

    progress: Progress
    parts: list[np.ndarray]
    left: list[np.ndarray]


class Cursor:
    """This rank's way through the corpus (collective: all ranks make theirs together, and step together).

    A step has a batch of each of the rank's parts (``--accumulate``): a rank with K parts takes the batches that K
    ranks would take.

    :param saved: where to resume; None starts at the beginning.
    :ivar exact: whether this rank's next batches are those that it would have had without a stop.
    """

    def __init__(self, config: Config, world: World, shards: ShardSet, saved: SavedCursor | None = None) -> None:
        self._config = config
        self._training = config.training
        self._whole = batch_streams(config, world, shards)
        self._streams = self._whole  # of the epoch under way
        self.exact = True
        progress = saved.progress if saved else Progress()
        self.step, self.epoch, self.step_in_epoch = progress.step, progress.epoch, progress.step_in_epoch
        self._enter_whole()
        if saved is not None and saved.parts:
            self._enter_epoch(saved, world)

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.epoch, self.step_in_epoch)

    @property
    def part(self) -> WorkerPart:
        """This rank's sentences of a whole epoch."""
        return WorkerPart(self._whole[0].part.first, self._whole[-1].part.end)

    def steps_of(self, epoch: int) -> int:
        """Steps of a whole epoch."""
        return self._whole[0].steps_of(epoch)

    @property
    def num_steps(self) -> int:
        """The number of the last step of the run."""
        later = sum(self.steps_of(epoch) for epoch in range(self.epoch + 1, self._training.epochs))
        now = self._streams[0].steps_of(self.epoch) if self.epoch < self._training.epochs else 0
        all_steps = self.step - self.step_in_epoch + now + later
        return min(all_steps, self._training.max_steps or all_steps)

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        steps = self._training.max_steps
        return self.epoch >= self._training.epochs or 0 < steps <= self.step

    @property
    def within_epoch(self) -> bool:
        """Whether an epoch is begun and not over."""
        return self.step_in_epoch > 0 or self._streams is not self._whole

    @property
    def trained_sentences(self) -> int:
        """Sentences of all ranks that are trained, in all epochs."""
        return self._streams[0].trained_before(self.epoch, self.step_in_epoch)

    @property
    def epochs_done(self) -> float:
        return self.trained_sentences / self._whole[0].num_all

    @property
    def step_sentences(self) -> int:
        """Sentences of all ranks in the next step."""
        return self._streams[0].trained_before(self.epoch, self.step_in_epoch + 1) - self.trained_sentences

    def run_sentences(self) -> int:
        """Sentences of all ranks in all epochs of the run, up to --max-steps."""
        step, streams = self.step - self.step_in_epoch, self._streams
        for epoch in range(self.epoch, self._training.epochs):
            num_steps = streams[0].steps_of(epoch)
            if 0 < self._training.max_steps <= step + num_steps:
                return streams[0].trained_before(epoch, max(self._training.max_steps - step, 0))
            step, streams = step + num_steps, self._whole
        return self._training.epochs * self._whole[0].num_all

    def batches(self) -> Iterator[tuple[Batch, ...]]:
        """For each step from here to the end, epoch after epoch, a batch of each part."""
        step, num_steps, first, streams = self.step, self.num_steps, self.step_in_epoch, self._streams
        for epoch in range(self.epoch, self._training.epochs):
            for batches in zip(*(stream.epoch(epoch, first) for stream in streams), strict=True):
                if step == num_steps:
                    return
                yield batches
                step += 1
            first, streams = 0, self._whole

    def trained(self, batches: Sequence[Batch]) -> bool:
        """Note that a step's batches are trained; whether they were the last ones of an epoch."""
        for batch in batches:
            self._left[self._places(batch.sentences)] = False
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch < self._streams[0].steps_of(self.epoch):
            return False
        self.epoch, self.step_in_epoch, self._streams = self.epoch + 1, 0, self._whole
        self._enter_whole()
        return True

    def sentences(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(this rank's sentences of the epoch, those of them that are not trained yet); None between epochs."""
        if not self.within_epoch:
            return None
        sentences = self._own_sentences()
        return sentences, sentences[self._left]

    def _own_sentences(self) -> np.ndarray:
        return np.concatenate([stream.sentences for stream in self._streams])

    def _places(self, sentences: np.ndarray) -> np.ndarray:
        """The places of some of this rank's ``sentences`` among all of them."""
        return sentences - self.part.first if self._own is None else np.searchsorted(self._own, sentences)

    def _enter_whole(self) -> None:
        self._own: np.ndarray | None = None  # this rank's sentences, where they are not simply a range
        self._left = np.ones(self.part.end - self.part.first, bool)

    def _enter_epoch(self, saved: SavedCursor, world: World) -> None:
        """Collective: resume within the epoch that ``saved`` was in."""
        config, shards = self._config, self._whole[0].shards
        if len(saved.parts) == world.size:
            part, left = saved.parts[world.rank], saved.left[world.rank]
            everyone = np.concatenate(saved.parts)
            streams = batch_streams(config, world, shards, everyone if everyone.size < shards.num_sentences else None)
            # The batches may have been made in another way: by another batch size or seed, or another version of this.
            behind = [stream.sentences_before(self.epoch, self.step_in_epoch) for stream in streams]
            mine = np.concatenate([stream.sentences for stream in streams])
            self.exact = np.array_equal(mine, part) and np.array_equal(
                np.setdiff1d(part, np.concatenate(behind), assume_unique=True), left
            )
        else:
            self.exact = False
        self.exact = all(world.allgather(self.exact))
        if self.exact:
            self._streams, self._own = streams, part
            self._left = np.isin(part, left, assume_unique=True)
            return
        self.step_in_epoch = 0
        self._streams = batch_streams(config, world, shards, np.sort(np.concatenate(saved.left)))
        self._own = self._own_sentences()
        self._left = np.ones(self._own.size, bool)


def batch_streams(
    config: Config, world: World, shards: ShardSet, rest: np.ndarray | None = None
) -> list[BatchStream]:
    """This rank's training batches, a stream for each of its parts; ``rest`` is as in :class:`BatchStream`."""
    training, data = config.training, config.data
    num_workers = world.size * training.accumulate
    length = min(shards.num_tokens / max(shards.num_sentences, 1), data.max_length)
    growth = BatchGrowth(
        training.batch_size, num_workers, training.first_batch, float(training.growth_tokens), length
    )
    return [
        BatchStream(
            shards, world.rank * training.accumulate + part, num_workers, growth, training.seed, data.max_length,
            data.boundaries, rest,
        )
        for part in range(training.accumulate)
    ]
