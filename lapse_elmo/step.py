"""One training step: pull rows, compute, exchange reports between the ranks, push gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.batches import Batch
from lapse_elmo.config.training import Config
from lapse_elmo.dense_update import squares_of
from lapse_elmo.errors import TrainingError
from lapse_elmo.gradient_noise import noise_of
from lapse_elmo.model.bilm import BiLM
from lapse_elmo.model.softmax import log_expected_count, sampled_softmax_nll
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.rng import torch_stream
from lapse_elmo.row_update import RowGradients
from lapse_elmo.schedule import Rates
from lapse_elmo.step_report import RankReport, StepResult, Vote, exchange_reports
from lapse_elmo.tables import PulledRows, Uploader


@dataclass(frozen=True)
class AnnouncedBatch:
    """A batch that was announced to the server.

    Attributes:
        batch: The batch.
        sample: The handle of its negative samples; None for the full softmax.
    """

    batch: Batch
    sample: int | None


@dataclass(frozen=True)
class _Part:
    """Results of one part (micro-batch) of a step."""

    batch: Batch
    nll: float
    rows: tuple[RowGradients, RowGradients]  # of the embedding and of the softmax


@dataclass(frozen=True)
class _Pulled:
    """The rows of one part of a step.

    Attributes:
        embedding: Rows of the embedding (U, D).
        softmax: Distinct rows of the softmax (R, D + 1), for targets and samples.
        softmax_rows: (R,) their row numbers.
        targets: (N,) indices into ``softmax``.
        samples: (S,) indices into ``softmax``.
    """

    embedding: PulledRows
    softmax: PulledRows
    softmax_rows: np.ndarray
    targets: np.ndarray
    samples: np.ndarray


class TrainingStep:
    """Trains a batch of each of the rank's parts per call, on every rank at the same time (collective).

    The loss is nll divided by the mean number of targets in a batch of as many sentences, so every target has the same
    weight, as in bilm-tf, whose batches all have the same number of targets. If nll were divided by the batch's own
    number of targets, a batch of very short sentences would move the parameters as far as one of long sentences, and
    towards ending every sentence at once.

    With K parts (``--accumulate``) a rank does the work of K ranks: all parts are computed with the same parameters.
    The dense gradients are averaged over all parts of all ranks; the rows' gradients are added up over a node, and
    those of frequent rows over all nodes.

    Attributes:
        measures_noise: Whether there are several gradients of the same parameters, which show the gradient noise; with
            ``--local-steps``, those of the first step after each average.
        dense_fallback: A warning about a slow way of summing dense gradients, or "".

    Args:
        config: The options.
        world: The world.
        parameters: The model and its tables.
        device: Where this rank computes.
        sentence_targets: Mean number of targets, of both directions, per sentence.
        vote: Called once per step on every rank; ``StepResult.votes`` counts the votes of all ranks.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        parameters: Parameters,
        device: torch.device,
        sentence_targets: float,
        vote: Callable[[], Vote],
    ) -> None:
        self.config = config
        self.world = world
        self.parameters = parameters
        self.model: BiLM = parameters.model
        self.device = device
        self.uploader = Uploader(device)
        self.sentence_factor = config.optimizer.loss_scale / sentence_targets
        # Adagrad divides by the size of past gradients, so their scale matters little; with plain descent it does.
        self.row_scale = config.optimizer.row_scale if config.optimizer.optimizer == "adagrad" else 0.0
        self.num_parts = world.size * config.training.accumulate
        self.vote = vote
        self.num_classes = parameters.softmax.segment.num_rows
        self.samples_softmax = config.softmax.num_samples < self.num_classes
        self._dense: list[nn.Parameter] = list(self.model.parameters())
        self.measures_noise = self.num_parts > 1
        self._update = parameters.open_dense_update(device)
        self.dense_fallback = self._update.fallback
        self._settled = True  # whether all nodes have the same dense parameters
        self._row_updates = parameters.open_row_updates()
        self._wait_for_pushes: Callable[[], None] = world.start_node_barrier()

    def close(self) -> None:
        """Release resources after the last step (collective)."""
        self._wait_for_pushes()
        self._update.close()

    def announce(self, batches: Sequence[Batch], clock: int) -> list[AnnouncedBatch]:
        """Announce the parts of the step at ``clock`` to the server, and have their samples drawn."""
        return [self._announce(batch, clock) for batch in batches]

    def _announce(self, batch: Batch, clock: int) -> AnnouncedBatch:
        server = self.parameters.server
        self.parameters.embedding.intent(batch.input_rows, clock, clock + 1)
        self.parameters.softmax.intent(batch.distinct_targets, clock, clock + 1)
        if not self.samples_softmax:
            return AnnouncedBatch(batch, None)
        return AnnouncedBatch(batch, server.prepare_sample(self.config.softmax.num_samples, clock, clock + 1))

    def __call__(self, announced: Sequence[AnnouncedBatch], step: int, rates: Rates, last: bool = False) -> StepResult:
        """Train one step.

        Args:
            announced: One batch for each part.
            step: The number of the step, from 1.
            rates: The learning rates.
            last: Whether this is the last step of an epoch or of the run, after which nodes average local steps.

        Raises:
            TrainingError: On every rank, before anything is pushed, if a loss or gradient is not finite.
        """
        timer = _Timer("pull", lambda phase: self.world.progress.enter(f"step {step}, {phase}"))
        self._wait_for_pushes()  # on one node, so that equal seeds give equal results
        parts, gradients, square = self._parts(announced, step, timer)
        timer.next("agree")
        for number, update in enumerate(self._row_updates):
            update.put([part.rows[number] for part in parts])
        turns = parts[0].batch.turns
        self._update.start(gradients, self.measures_noise and len(parts) == 1, turns)
        self.world.node_barrier()
        for update in self._row_updates:
            update.add_up()
        norms = self._update.finish()
        report = RankReport(
            nll=sum(part.nll for part in parts),
            num_targets=sum(part.batch.num_targets for part in parts),
            num_tokens=sum(part.batch.num_tokens for part in parts),
            num_cut=sum(part.batch.num_cut for part in parts),
            num_sentences=sum(part.batch.sentences.size for part in parts),
            row_square=sum(update.finish() for update in self._row_updates),
            dense_square=norms.mean_square,
            own_dense_squares=square if len(parts) > 1 else norms.own_squares,
            compute_s=timer.seconds["compute"],
        )
        reports = exchange_reports(self.world, report, self.vote())
        total = reports.total
        # All ranks have the same sums, so all clip by the same factor and agree on whether the norm is finite.
        # Nodes' gradients for a rare row hardly correlate, so they are taken as those of different rows.
        row_square = total["row_square"] * self._mean_factor(total["num_sentences"]) ** 2
        norm = math.sqrt(row_square + total["dense_square"])
        if not (math.isfinite(norm) and reports.finite):
            self._refuse(parts, step, gradients)
        timer.next("push")
        before, self._settled = self._settled, self._push(self._clip_factor(norm), rates, step, last)
        self.parameters.server.advance_clock()
        timer.end()
        signal = noise = 0.0
        if self.measures_noise and before and self.num_parts >= 2 * turns:
            # Parts without sentences have no gradient; those with sentences count ``turns`` times.
            mean_square = total["own_dense_squares"] / self.world.size / turns
            signal, noise = noise_of(mean_square, total["dense_square"], self.num_parts / turns, total["num_tokens"])
        return StepResult(
            nll=total["nll"], num_targets=int(total["num_targets"]), num_tokens=int(total["num_tokens"]),
            num_cut=int(total["num_cut"]), num_sentences=int(total["num_sentences"]), gradient_norm=norm,
            learning_rate=rates.rows, dense_rate=rates.dense, sums_bytes=self._sums_bytes, signal=signal, noise=noise,
            settled=self._settled, votes=reports.votes, seconds=timer.seconds, compute_s=reports.ranks["compute_s"],
        )

    def _parts(
        self, announced: Sequence[AnnouncedBatch], step: int, timer: _Timer
    ) -> tuple[list[_Part], list[Tensor], float]:
        """Compute every part.

        Returns:
            The parts; the mean of their dense gradients; the mean of the squared norms of these (0 for a single part).
        """
        parts: list[_Part] = []
        sums: list[Tensor] = []
        square = 0.0
        self.parameters.refresh_dense()
        for number, of_part in enumerate(announced):
            if number:
                timer.next("pull")
            pulled = self._pull(of_part)
            timer.next("compute")
            worker = self.world.rank * len(announced) + number
            nll, embedding, softmax = self._compute(of_part.batch, pulled, worker, step)
            factor = self._row_factor(of_part.batch)
            of_embedding = RowGradients(pulled.embedding.keys, embedding, factor)
            of_softmax = RowGradients(pulled.softmax.keys, softmax, factor)
            parts.append(_Part(of_part.batch, nll, (of_embedding, of_softmax)))
            if not of_part.batch.num_targets:
                continue
            gradients = [_gradient(p) for p in self._dense]
            if len(announced) == 1:
                return parts, gradients, 0.0
            square += squares_of(gradients)
            # The next part's backward pass allocates new gradients, so these can be reused for the sums.
            sums = [total.add_(one) for total, one in zip(sums, gradients, strict=True)] if sums else gradients
        sums = sums or [torch.zeros_like(p) for p in self._dense]
        return parts, [total.div_(len(announced)) for total in sums], square / len(announced)

    def _pull(self, announced: AnnouncedBatch) -> _Pulled:
        """Pull the rows of a batch."""
        batch, softmax = announced.batch, self.parameters.softmax
        embedding = self.parameters.embedding.pull(batch.input_rows)
        if announced.sample is None:
            rows = samples = np.arange(self.num_classes)
            targets = batch.target_rows
        else:
            keys = np.empty(self.config.softmax.num_samples, np.int64)
            self.parameters.server.pull_sample(announced.sample, keys, None)
            both = np.concatenate([batch.target_rows, keys - softmax.segment.first_key])
            rows, index = np.unique(both, return_inverse=True)
            targets, samples = index[: batch.num_targets], index[batch.num_targets :]
        if not batch.num_targets:
            rows = samples = targets  # none
        return _Pulled(embedding, softmax.pull(rows), rows, targets, samples)

    def _compute(self, batch: Batch, pulled: _Pulled, worker: int, step: int) -> tuple[float, Tensor, Tensor]:
        """Compute loss and gradients; dense gradients are left in ``.grad``.

        Args:
            batch: The batch.
            pulled: Its rows.
            worker: Number of the part over all ranks, which keys its dropout.
            step: The number of the step, likewise.

        Returns:
            The nll (nats), the gradient of the embedding rows (U, D) and that of the softmax rows (R, D + 1).
        """
        for parameter in self._dense:
            parameter.grad = None
        weights = pulled.embedding.weights, pulled.softmax.weights
        if not batch.num_targets:
            return 0.0, *(torch.zeros(w.shape, device=self.device) for w in weights)  # type: ignore[return-value]
        # On a GPU the softmax rows are copied while the LSTM computes.
        take_embedding, take_softmax = (self.uploader.start(w) for w in weights)
        dropout = torch_stream(self.config.training.seed, "dropout", worker, step)
        embedding = take_embedding().requires_grad_()
        # All copies to a GPU come before the LSTM: one from pageable memory waits for what the GPU was given before.
        index, targets, samples = map(self._to_device, (batch.input_index, pulled.targets, pulled.samples))
        log_expected = self._log_expected(pulled.softmax_rows)
        context = self.model.context_vectors(embedding, index, batch.packing, dropout)
        softmax = take_softmax().requires_grad_()
        nll = sampled_softmax_nll(
            context, softmax, targets, samples, log_expected, precision=self.config.model.precision
        )
        (nll * self._loss_factor(batch)).backward()
        return float(nll.detach()), _gradient(embedding), _gradient(softmax)

    def _log_expected(self, rows: np.ndarray) -> Tensor | None:
        """Return the log of the expected count of each row (R,) in a sample; None if it is the same for all rows."""
        softmax = self.config.softmax
        if not self.samples_softmax or softmax.distribution == "uniform":
            return None
        return log_expected_count(
            self._to_device(rows), self.num_classes, softmax.num_samples,
            softmax.num_tries or None, replacement=softmax.replacement,
        )

    def _clip_factor(self, norm: float) -> float:
        bound = self.config.optimizer.clip_norm
        return bound / norm if bound and norm > bound else 1.0

    @property
    def _sums_bytes(self) -> float:
        return self._update.sent_bytes + sum(update.sent_bytes for update in self._row_updates)

    def _push(self, scale: float, rates: Rates, step: int, last: bool) -> bool:
        """Update rows and dense parameters with ``scale`` times their gradients; see :meth:`DenseUpdate.apply`."""
        self.parameters.set_learning_rates(rates)
        settled = self._update.apply(scale, step, last)

        def push_rows() -> None:
            for update in self._row_updates:
                update.push(scale)

        turns, turn = self.parameters.pushers
        if self.config.training.sync and turns > 1:
            # All ranks have pulled by now, since their gradients were summed. The ranks of a node push different rows.
            for current in range(turns):
                if current == turn:
                    push_rows()
                self.world.barrier()
        else:
            push_rows()
        self._wait_for_pushes = self.world.start_node_barrier()
        return settled

    def _row_factor(self, batch: Batch) -> float:
        """Return the factor from the gradients of a part's mean loss to those that are added up over all parts."""
        return self.row_scale / self._loss_factor(batch) if self.row_scale else 1 / self.num_parts

    def _mean_factor(self, num_sentences: float) -> float:
        """Return the factor from the sums of the rows' gradients, as pushed, to the gradients of the mean loss."""
        return self.sentence_factor / max(num_sentences, 1) / self.row_scale if self.row_scale else 1.0

    def _loss_factor(self, batch: Batch) -> float:
        # The mean over all parts is that over the sentences of the step, of which most parts may have none.
        return self.sentence_factor * batch.turns / batch.size

    def _refuse(self, parts: Sequence[_Part], step: int, gradients: Sequence[Tensor]) -> None:
        """Raise an error that names the rank, the step and the sentences that are not finite (collective).

        Args:
            parts: The parts of this rank.
            step: The number of the step.
            gradients: This rank's own dense gradients: the sum over the ranks would not show whose was not finite.

        Raises:
            TrainingError: On every rank.
        """

        def check() -> None:
            dense = squares_of(gradients)
            for part in parts:
                square = dense + squares_of([gradients.values for gradients in part.rows])
                if not (math.isfinite(part.nll) and math.isfinite(square)):
                    what = "gradient norm" if math.isfinite(part.nll) else "loss"
                    shown = ", ".join(map(str, np.sort(part.batch.sentences)[:8]))
                    shown += ", ..." if part.batch.sentences.size > 8 else ""
                    raise TrainingError(
                        f"the {what} is not finite at step {step} (sentences {shown}); nothing was pushed; lower "
                        "--learning-rate, --loss-scale or --clip-norm"
                    )

        self.world.together(check)
        raise TrainingError(
            f"the dense gradient norm is not finite at step {step}; nothing was pushed; lower --learning-rate, "
            "--loss-scale or --clip-norm"
        ).on_every_rank()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class _Timer:
    """Measures seconds by phase, marks the phases in a profile, and calls ``enter`` with each."""

    def __init__(self, phase: str, enter: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._enter = enter
        self._begin(phase)

    def next(self, phase: str) -> None:
        """End the current phase and begin ``phase``."""
        self.end()
        self._begin(phase)

    def end(self) -> None:
        """End the current phase."""
        self._range.__exit__(None, None, None)
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._start

    def _begin(self, phase: str) -> None:
        self._phase, self._start = phase, time.perf_counter()
        self._enter(phase)
        self._range = torch.profiler.record_function(f"{phase} (other)")
        self._range.__enter__()
