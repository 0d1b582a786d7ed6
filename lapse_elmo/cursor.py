"""Where a worker is in the corpus: steps, epochs, and which sentences of the epoch it still has to train.

The sentences are what counts for a run that goes on with another number of ranks: those that are left of the epoch are
shared out anew, each once. A run that goes on with the same ranks takes the same batches as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lapse_elmo.batches import Batch, BatchStream
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.world import World


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps in all, epochs completed, and steps done in the epoch that is under way."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class SavedCursor:
    """What a checkpoint knows of an epoch under way.

    :ivar parts: by worker of the run that saved it, the sentences (ascending) that were its share of the epoch, or of
        the rest of the epoch that it went on with. None at all where no epoch was begun.
    :ivar left: likewise, those that were not trained yet.
    """

    progress: Progress
    parts: list[np.ndarray]
    left: list[np.ndarray]


class Cursor:
    """This worker's way through the corpus (collective: all ranks make theirs together, and step together).

    :param saved: where to go on; None starts at the beginning.
    :ivar exact: whether this worker's next batches are those that it would have had without a stop.
    """

    def __init__(self, config: Config, world: World, shards: ShardSet, saved: SavedCursor | None = None) -> None:
        self._config = config
        self._whole = batch_stream(config, world, shards)
        self._stream = self._whole  # of the epoch under way
        self.exact = True
        progress = saved.progress if saved else Progress()
        self.step, self.epoch, self.step_in_epoch = progress.step, progress.epoch, progress.step_in_epoch
        self._left = self._all_left()
        if saved is not None and saved.parts:
            self._enter_epoch(saved, world)

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.epoch, self.step_in_epoch)

    @property
    def stream(self) -> BatchStream:
        """The batches of whole epochs."""
        return self._whole

    @property
    def num_steps(self) -> int:
        """The number of the last step."""
        training = self._config.training
        later = (training.epochs - self.epoch - 1) * self._whole.steps_per_epoch
        all_steps = self.step - self.step_in_epoch + self._stream.steps_per_epoch + later
        return min(all_steps, training.max_steps or all_steps)

    @property
    def finished(self) -> bool:
        return self.epoch >= self._config.training.epochs or self.step >= self.num_steps

    @property
    def within_epoch(self) -> bool:
        """Whether an epoch is begun and not over."""
        return self.step_in_epoch > 0 or self._stream is not self._whole

    @property
    def epochs_done(self) -> float:
        return self.epoch + self.step_in_epoch / self._stream.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """The batches from here to the end, epoch after epoch."""
        step, num_steps, first, batches = self.step, self.num_steps, self.step_in_epoch, self._stream
        for epoch in range(self.epoch, self._config.training.epochs):
            for batch in batches.epoch(epoch, first):
                if step == num_steps:
                    return
                yield batch
                step += 1
            first, batches = 0, self._whole

    def trained(self, batch: Batch) -> bool:
        """Note that ``batch`` is trained; whether it was the last one of an epoch."""
        self._left[self._stream.places(batch.sentences)] = False
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch < self._stream.steps_per_epoch:
            return False
        self.epoch, self.step_in_epoch, self._stream = self.epoch + 1, 0, self._whole
        self._left = self._all_left()
        return True

    def sentences(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(this worker's sentences of the epoch, those of them that are not trained yet); None between epochs."""
        if not self.within_epoch:
            return None
        sentences = self._stream.sentences
        return sentences, sentences[self._left]

    def _all_left(self) -> np.ndarray:
        return np.ones(self._stream.num_sentences, bool)

    def _enter_epoch(self, saved: SavedCursor, world: World) -> None:
        """Collective: go on within the epoch that ``saved`` was in."""
        config, shards = self._config, self._whole.shards
        if len(saved.parts) == world.size:
            part, left = saved.parts[world.rank], saved.left[world.rank]
            longest = max(part.size for part in saved.parts)
            steps = math.ceil(longest / config.training.batch_size)
            stream = batch_stream(config, world, shards, (part, steps))
            # The batches may have been made in another way: by another batch size or seed, or another version of this.
            behind = stream.sentences_before(self.epoch, self.step_in_epoch)
            self.exact = np.array_equal(np.setdiff1d(part, behind, assume_unique=True), left)
        else:
            self.exact = False
        self.exact = all(world.allgather(self.exact))
        if self.exact:
            self._stream = stream
            self._left = np.isin(part, left, assume_unique=True)
            return
        rest = np.sort(np.concatenate(saved.left))
        mine = rest[rest.size * world.rank // world.size : rest.size * (world.rank + 1) // world.size]
        steps = math.ceil(math.ceil(rest.size / world.size) / config.training.batch_size)
        self.step_in_epoch = 0
        self._stream = batch_stream(config, world, shards, (mine, steps))
        self._left = self._all_left()


def batch_stream(
    config: Config, world: World, shards: ShardSet, rest: tuple[np.ndarray, int] | None = None
) -> BatchStream:
    """This rank's training batches."""
    return BatchStream(
        shards, world.rank, world.size, config.training.batch_size, config.training.seed, config.data.max_length,
        config.data.boundaries, rest,
    )
