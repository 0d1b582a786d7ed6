"""Held-out perplexity by full softmax, computed by all ranks, and the unigram perplexity as a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lapse_elmo.batches import Batch, evaluation_batches
from lapse_elmo.config.training import DataConfig
from lapse_elmo.corpus.shards import ShardSet
from lapse_elmo.corpus.vocabulary import END, UNKNOWN
from lapse_elmo.errors import ConfigError
from lapse_elmo.model.full_softmax import full_softmax_nll
from lapse_elmo.mpi.world import World
from lapse_elmo.node_softmax import NodeSoftmax
from lapse_elmo.parameters import Parameters

# Context vectors per pass over the softmax rows; joining them takes twice that for a moment. More would not be faster,
# since each row that is read is multiplied by 8,000 vectors of ELMo's size. A pass ends before a signal is noticed, and
# takes a minute on a core with 793,471 such rows.
HELD_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Perplexity:
    """Summed nll (nats) of each direction over ``num_targets`` targets per direction, of all ranks.

    ``num_cut`` sentences were cut at --max-length, and the words that follow there are not among the targets.
    """

    forward_nll: float
    backward_nll: float
    num_targets: int
    num_cut: int = 0

    @property
    def forward(self) -> float:
        """Perplexity of the forward direction."""
        return _exp(self.forward_nll / self.num_targets)

    @property
    def backward(self) -> float:
        """Perplexity of the backward direction."""
        return _exp(self.backward_nll / self.num_targets)

    @property
    def mean(self) -> float:
        """Perplexity over the targets of both directions."""
        return _exp((self.forward_nll + self.backward_nll) / (2 * self.num_targets))


def _exp(loss: float) -> float:
    """Return exp(loss), or infinity where it overflows: a model that has diverged has a perplexity too."""
    return math.exp(loss) if not loss > 700 else math.inf


@torch.no_grad()
def measure_perplexity(
    parameters: Parameters, shards: ShardSet, data: DataConfig, batch_size: int, world: World, device: torch.device,
    stopping: Callable[[], object] = lambda: False,
) -> Perplexity | None:
    """Measure perplexity over every sentence of ``shards``, each with a zero initial state (collective).

    The softmax rows are read in chunks, so that memory does not grow with the vocabulary, in one pass for each
    ``HELD_BYTES`` of context vectors. With several nodes each reads only its own rows (:class:`NodeSoftmax`).

    Args:
        parameters: The model.
        shards: The sentences; each rank computes its share.
        data: How sentences are cut and whether they have boundaries.
        batch_size: Sentences per batch.
        world: The world.
        device: Where this rank computes.
        stopping: Whether this rank is asked to stop; called before each pass.

    Returns:
        The perplexity; None on every rank if one has stopped.

    Raises:
        ConfigError: If no sentence has a target (single tokens without boundaries).
    """
    model, softmax = parameters.model, parameters.softmax
    model.eval()
    sums = np.zeros(5)  # nll of both directions, targets, cut sentences, ranks that have stopped
    batches = evaluation_batches(shards, world.rank, world.size, batch_size, data.max_length, data.boundaries)

    def counted() -> Iterator[Batch]:
        for batch in batches:
            sums[3] += batch.num_cut
            yield batch

    if world.num_nodes == 1:
        for context, target in _held(counted(), parameters, device, HELD_BYTES):
            if stopping():
                sums[4] = 1
                break
            chunks = ((first, rows.to(device)) for first, rows in softmax.chunks())
            sums[:3] += _sums(full_softmax_nll(context, world.progress.counted(chunks), target))
    else:
        across = NodeSoftmax(softmax, world, device)
        # Each of the ranks that send to one and the same rank sends it all vectors that it holds.
        held = _held(counted(), parameters, device, HELD_BYTES // across.most_senders)
        nothing = torch.empty(0, softmax.size - 1, device=device), torch.empty(0, dtype=torch.int64, device=device)
        while True:  # as often as the rank with the most batches needs
            mine = next(held, None)
            has_more, sums[4] = world.sum_(np.array([mine is not None, bool(stopping())], np.int64))
            if sums[4] or not has_more:
                break
            sums[:3] += _sums(across.nll(*(mine or nothing)))
    model.train()
    world.sum_(sums)
    if sums[4]:
        return None
    if not sums[2]:
        raise ConfigError("the held-out sentences have no targets: those of one token need --boundaries")
    return Perplexity(float(sums[0]), float(sums[1]), int(sums[2]), int(sums[3]))


def _held(
    batches: Iterator[Batch], parameters: Parameters, device: torch.device, most_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield context vectors (2 n, D) and targets (2 n,), forward ones first, of ``most_bytes`` at a time.

    Only the vectors of a single pair of neighbours, one of each direction, may take more than that.
    """
    held: list[tuple[torch.Tensor, np.ndarray]] = []
    num_bytes = 0
    for batch in parameters.world.progress.counted(batches):
        if not batch.num_targets:
            continue
        embedding = parameters.embedding.pull(batch.input_rows).weights.to(device)
        context = parameters.model.context_vectors(embedding, torch.from_numpy(batch.input_index), batch.packing)
        for piece, targets in _pieces(context, batch.target_rows, most_bytes):
            if held and num_bytes + piece.nbytes > most_bytes:
                yield _joined(held, device)
                held, num_bytes = [], 0
            held.append((piece, targets))
            num_bytes += piece.nbytes
    if held:
        yield _joined(held, device)


def _pieces(
    context: torch.Tensor, targets: np.ndarray, most_bytes: int
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Cut a batch's context vectors (2 n, D) and targets (2 n,) into pieces that have both directions of some pairs.

    A batch of long sentences takes far more than what is sent to each of many nodes at a time.
    """
    pairs = len(context) // 2
    most = max(most_bytes * pairs // context.nbytes, 1)
    if most >= pairs:
        yield context, targets
        return
    for first in range(0, pairs, most):
        some = slice(first, min(first + most, pairs))
        both = [half[some] for half in context.chunk(2)]
        yield torch.cat(both), np.concatenate([half[some] for half in np.split(targets, 2)])


def _joined(held: list[tuple[torch.Tensor, np.ndarray]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the context vectors and targets of all batches, forward ones first, and empty ``held``."""
    halves = [half for context, _ in held for half in context.chunk(2)]
    targets = [half for _, target in held for half in np.split(target, 2)]
    held.clear()
    target = torch.from_numpy(np.concatenate(targets[::2] + targets[1::2]))
    return torch.cat(halves[::2] + halves[1::2]), target.to(device)


def _sums(nll: torch.Tensor) -> np.ndarray:
    """Return the summed forward and backward nll, and the number of targets per direction."""
    forward, backward = nll.chunk(2) if len(nll) else (nll, nll)
    return np.array([float(forward.sum()), float(backward.sum()), len(forward)])


def unigram_perplexity(train: ShardSet, heldout: ShardSet, boundaries: bool, world: World) -> float:
    """Return the perplexity of the held-out text under the word frequencies of the training text (collective).

    A model that has learned more than frequencies is far below it. Targets are words and, with ``boundaries``, the end
    of each sentence; a class that does not occur in the training text counts as if it had occurred once.
    """
    counts, targets = (shards.unigram_counts(world).astype(np.float64) for shards in (train, heldout))
    if boundaries:
        counts[END], targets[END] = train.num_sentences, heldout.num_sentences
    counts[UNKNOWN:] = np.maximum(counts[UNKNOWN:], 1)
    log_probability = np.log(np.maximum(counts, 1e-300) / counts.sum())
    return math.exp(-float((targets * log_probability).sum()) / float(targets.sum()))
