"""The position of a worker in the corpus: steps, epochs, and which sentences of the epoch are still to be trained.

A run that resumes with the same number of ranks takes the same batches as if it had not stopped. With another number of
ranks, the remaining sentences of the epoch are redistributed over them, and each is trained once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lapse_elmo.batches import Batch, BatchStream, EpochShare
from lapse_elmo.config.training import Config
from lapse_elmo.corpus.shards import ShardSet, WorkerPart
from lapse_elmo.growth import BatchGrowth
from lapse_elmo.mpi.world import World
from lapse_elmo.training_data import sentence_tokens


@dataclass(frozen=True)
class Position:
    """Steps done in all, epochs completed, and steps done in the current epoch."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class SavedCursor:
    """The position of a saved run and, if it was saved within an epoch, what a rank needs to resume there.

    Attributes:
        position: Where the run was.
        own: If the run was saved by as many ranks as resume it: this rank's sentences of the epoch, or of what was left
            of the epoch when that run was itself resumed.
        own_left: Those of ``own`` that were not trained yet, ascending.
        rest: All sentences that were not trained yet, shared out among the ranks that resume. None between epochs.
    """

    position: Position
    own: EpochShare | None = None
    own_left: np.ndarray | None = None
    rest: EpochShare | None = None


class Cursor:
    """This rank's position in the corpus (collective: all ranks construct theirs together, and step together).

    A step has one batch for each of the rank's parts (``--accumulate``): a rank with K parts takes the batches that K
    ranks would take.

    Attributes:
        step: Steps done in all.
        epoch: Epochs completed.
        step_in_epoch: Steps done in the current epoch.
        exact: Whether the batches of all ranks are those that they would have had without the interruption.

    Args:
        config: The options.
        world: The world.
        shards: The training shards.
        saved: Where to resume; None starts at the beginning.
    """

    def __init__(self, config: Config, world: World, shards: ShardSet, saved: SavedCursor | None = None) -> None:
        self._config = config
        self._training = config.training
        self._whole_streams = batch_streams(config, world, shards)
        self._streams = self._whole_streams  # those of the current epoch, of which a resumed run may have only a part
        self.exact = True
        position = saved.position if saved else Position()
        self.step, self.epoch, self.step_in_epoch = position.step, position.epoch, position.step_in_epoch
        self._enter_whole()
        if saved is not None and saved.rest is not None:
            self._enter_epoch(saved, saved.rest, world)

    @property
    def position(self) -> Position:
        """The position as plain values."""
        return Position(self.step, self.epoch, self.step_in_epoch)

    @property
    def part(self) -> WorkerPart:
        """This rank's sentences of a whole epoch."""
        return WorkerPart(self._whole_streams[0].part.first, self._whole_streams[-1].part.end)

    def steps_of(self, epoch: int) -> int:
        """Return the number of steps of a whole epoch."""
        return self._whole_streams[0].steps_of(epoch)

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
    def at_last_step(self) -> bool:
        """Whether the next step is the last one of an epoch or of the run."""
        ends_epoch = self.step_in_epoch + 1 == self._streams[0].steps_of(self.epoch)
        return ends_epoch or self.step + 1 == self._training.max_steps

    @property
    def within_epoch(self) -> bool:
        """Whether an epoch has begun and is not over."""
        return self.step_in_epoch > 0 or self._streams is not self._whole_streams

    @property
    def trained_sentences(self) -> int:
        """Sentences that all ranks have trained, in all epochs."""
        return self._streams[0].trained_before(self.epoch, self.step_in_epoch)

    @property
    def epochs_done(self) -> float:
        """Epochs done, with a fraction within an epoch."""
        return self.trained_sentences / self._whole_streams[0].num_all

    @property
    def step_sentences(self) -> int:
        """Sentences of all ranks in the next step."""
        return self._streams[0].trained_before(self.epoch, self.step_in_epoch + 1) - self.trained_sentences

    @property
    def batch_fraction(self) -> float:
        """How much of the batch that the gradient noise allows the ranks train at the next step, at most 1."""
        return self._streams[0].growth.fulfilled(self.trained_sentences)

    def run_sentences(self) -> int:
        """Return the sentences of all ranks in all epochs of the run, up to --max-steps."""
        step, streams = self.step - self.step_in_epoch, self._streams
        for epoch in range(self.epoch, self._training.epochs):
            num_steps = streams[0].steps_of(epoch)
            if 0 < self._training.max_steps <= step + num_steps:
                return streams[0].trained_before(epoch, max(self._training.max_steps - step, 0))
            step, streams = step + num_steps, self._whole_streams
        return self._training.epochs * self._whole_streams[0].num_all

    def batches(self) -> Iterator[tuple[Batch, ...]]:
        """Yield one batch per part for each step from here to the end, epoch after epoch."""
        step, num_steps, first, streams = self.step, self.num_steps, self.step_in_epoch, self._streams
        for epoch in range(self.epoch, self._training.epochs):
            for batches in zip(*(stream.epoch(epoch, first) for stream in streams), strict=True):
                if step == num_steps:
                    return
                yield batches
                step += 1
            first, streams = 0, self._whole_streams

    def trained(self, batches: Sequence[Batch]) -> bool:
        """Count a step, whose batches are trained; return whether it was the last one of an epoch."""
        for batch in batches:
            self._left[self._indices(batch.sentences)] = False
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch < self._streams[0].steps_of(self.epoch):
            return False
        self.epoch, self.step_in_epoch, self._streams = self.epoch + 1, 0, self._whole_streams
        self._enter_whole()
        return True

    def sentences(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return this rank's sentences of the epoch, and those of them not trained yet; None between epochs."""
        if not self.within_epoch:
            return None
        sentences = self._own_sentences()
        return sentences, sentences[self._left]

    def _own_sentences(self) -> np.ndarray:
        return np.concatenate([stream.sentences for stream in self._streams])

    def _indices(self, sentences: np.ndarray) -> np.ndarray:
        """Return the indices of some of this rank's ``sentences`` among all of them."""
        return sentences - self.part.first if self._own is None else np.searchsorted(self._own, sentences)

    def _enter_whole(self) -> None:
        self._own: np.ndarray | None = None  # this rank's sentences; None if they are ``part``, a range
        self._left = np.ones(self.part.end - self.part.first, bool)

    def _enter_epoch(self, saved: SavedCursor, rest: EpochShare, world: World) -> None:
        """Resume within the epoch that ``saved`` was in, of which ``rest`` is left (collective)."""
        config, shards, own, left = self._config, self._whole_streams[0].shards, saved.own, saved.own_left
        self.exact = False
        if own is not None and left is not None:
            streams = batch_streams(config, world, shards, own if own.num_all < shards.num_sentences else None)
            # The saved run may have made its batches differently: with another batch size or seed, or by an older
            # version of this program. Exact resumption needs the same share and the same sentences trained.
            behind = [stream.sentences_before(self.epoch, self.step_in_epoch) for stream in streams]
            mine = np.concatenate([stream.sentences for stream in streams])
            self.exact = np.array_equal(mine, own.numbers) and np.array_equal(
                np.setdiff1d(own.numbers, np.concatenate(behind), assume_unique=True), left
            )
        self.exact = all(world.allgather(self.exact))
        if self.exact:
            assert own is not None and left is not None
            self._streams, self._own = streams, own.numbers
            self._left = np.isin(own.numbers, left, assume_unique=True)
            return
        self.step_in_epoch = 0
        self._streams = batch_streams(config, world, shards, rest)
        self._own = self._own_sentences()
        self._left = np.ones(self._own.size, bool)


def batch_streams(
    config: Config, world: World, shards: ShardSet, rest: EpochShare | None = None
) -> list[BatchStream]:
    """Return this rank's training batches, one stream per part; ``rest`` is as in :class:`BatchStream`."""
    training, data = config.training, config.data
    num_workers = world.size * training.accumulate
    growth = BatchGrowth(
        training.batch_size, num_workers, training.first_batch, float(training.growth_tokens),
        sentence_tokens(config, shards),
    )
    return [
        BatchStream(
            shards, world.rank * training.accumulate + part, num_workers, growth, training.seed, data.max_length,
            data.boundaries, rest,
        )
        for part in range(training.accumulate)
    ]
