"""One training step: pull rows, compute, agree between the ranks, push."""

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
from lapse_elmo.context import context_vectors
from lapse_elmo.dense_mean import DenseMean, open_dense_mean
from lapse_elmo.errors import TrainingError
from lapse_elmo.model.bilm import BiLM
from lapse_elmo.model.optimizers import sum_of_squares
from lapse_elmo.model.softmax import log_expected_count, sampled_softmax_nll
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.rng import torch_stream
from lapse_elmo.step_report import RankReport, Tally, Vote, exchange_reports
from lapse_elmo.tables import PulledRows
from lapse_elmo.upload import Uploader


@dataclass(frozen=True)
class AnnouncedBatch:
    """A batch whose intent went out: ``sample`` is the handle of its negative samples (None for the full softmax)."""

    batch: Batch
    sample: int | None


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks: sums of nll (nats), targets, tokens; the gradient norm before clipping.

    ``votes`` are those that the ranks cast at this step. ``seconds`` are this rank's, by phase: pull, compute,
    agree (waiting for other ranks), push. ``compute_s`` (ranks,) are the compute seconds of every rank. ``signal`` and
    ``noise`` are parts of the gradient noise scale (:func:`noise_of`), 0 where the step cannot tell.
    """

    nll: float
    num_targets: int
    num_tokens: int
    num_cut: int
    num_sentences: int
    gradient_norm: float
    learning_rate: float
    signal: float
    noise: float
    votes: Tally
    seconds: dict[str, float]
    compute_s: np.ndarray


@dataclass(frozen=True)
class _Part:
    """What a part of the step has computed: its rows as pulled, and their gradients."""

    batch: Batch
    pulled: _Pulled
    nll: float
    embedding: Tensor
    softmax: Tensor


@dataclass(frozen=True)
class _Pulled:
    """The rows of one step; ``samples`` and ``targets`` index ``softmax``."""

    embedding: PulledRows
    softmax: PulledRows
    softmax_rows: np.ndarray
    targets: np.ndarray
    samples: np.ndarray


class TrainingStep:
    """Trains a batch of each of the rank's parts per call, on every rank at the same time (collective).

    The loss whose gradient is taken is nll / targets of an average batch of the same number of sentences, so each
    target weighs the same, as with bilm-tf, whose batches are equally large. With nll / targets of the batch, one of
    very short sentences would move the parameters as far as one of long ones, and towards ending every sentence at
    once.

    With K parts (``--accumulate``) a rank does what K ranks would: all parts are computed with the same parameters,
    the dense gradients are averaged over all parts of all ranks, and the rows' gradients are pushed part by part.

    :param sentence_targets: how many targets, of both directions, a sentence has on average.
    :param vote: called once per step on every rank; ``StepResult.votes`` counts the votes of all ranks.
    :ivar tells_noise: whether there are several gradients of the same parameters to tell the noise from.
    :ivar dense_fallback: a warning about the slow way in which dense gradients are summed, or "".
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
        self.vote = vote
        self.num_classes = parameters.softmax.segment.num_rows
        self.samples_softmax = config.softmax.num_samples < self.num_classes
        self._dense: list[nn.Parameter] = list(self.model.parameters())
        self._mean: DenseMean | None = None
        self.dense_fallback = ""
        self.tells_noise = parameters.dense_table is None and world.size * config.training.accumulate > 1
        if parameters.dense_table is None:
            self._mean, self.dense_fallback = open_dense_mean(world, device, sum(p.numel() for p in self._dense))

    def close(self) -> None:
        """Collective: no step follows."""
        if self._mean is not None:
            self._mean.close()

    def announce(self, batch: Batch, clock: int) -> AnnouncedBatch:
        """Send the intent of a batch that will be trained at ``clock``, and have its samples drawn."""
        server = self.parameters.server
        self.parameters.embedding.intent(batch.input_rows, clock, clock + 1)
        self.parameters.softmax.intent(np.unique(batch.target_rows), clock, clock + 1)
        if not self.samples_softmax:
            return AnnouncedBatch(batch, None)
        return AnnouncedBatch(batch, server.prepare_sample(self.config.softmax.num_samples, clock, clock + 1))

    def __call__(self, announced: Sequence[AnnouncedBatch], step: int, rate: float) -> StepResult:
        """Train the step's batches, one of each part, at the learning rate ``rate``.

        :raises TrainingError: on every rank, before anything is pushed, if a gradient is not finite.
        """
        timer = _Timer("pull", lambda phase: self.world.progress.enter(f"step {step}, {phase}"))
        parts, gradients, square = self._parts(announced, step, timer)
        timer.next("agree")
        dense_mean = self._start_mean(gradients)
        if self.tells_noise and len(parts) == 1:
            square = _square(0.0, *gradients)  # while the ranks' gradients are being summed
        sparse = sum(_square(0.0, part.embedding, part.softmax) for part in parts) / len(parts)
        dense = dense_mean()
        dense_square = _square(0.0, *dense)
        report = RankReport(
            nll=sum(part.nll for part in parts),
            num_targets=sum(part.batch.num_targets for part in parts),
            num_tokens=sum(part.batch.num_tokens for part in parts),
            num_cut=sum(part.batch.num_cut for part in parts),
            num_sentences=sum(part.batch.sentences.size for part in parts),
            gradient_square=sparse + dense_square,
            dense_square=square,
            compute_s=timer.seconds["compute"],
        )
        reports = exchange_reports(self.world, report, self.vote())
        # The mean over the ranks: all of them must clip by the same factor, and agree on whether it is finite.
        norm = math.sqrt(float(reports.ranks["gradient_square"].mean()))
        if not (math.isfinite(norm) and reports.finite):
            self._refuse(parts, step, gradients)
        timer.next("push")
        self._push(parts, dense, self._clip_factor(norm), rate)
        self.parameters.server.advance_clock()
        timer.end()
        total = reports.total
        signal, noise = 0.0, 0.0
        if self.tells_noise:
            num_parts = self.world.size * len(parts)
            signal, noise = noise_of(
                total["dense_square"] / self.world.size, dense_square, num_parts, total["num_tokens"]
            )
        return StepResult(
            nll=total["nll"], num_targets=int(total["num_targets"]), num_tokens=int(total["num_tokens"]),
            num_cut=int(total["num_cut"]), num_sentences=int(total["num_sentences"]), gradient_norm=norm,
            learning_rate=rate, signal=signal, noise=noise, votes=reports.votes, seconds=timer.seconds,
            compute_s=reports.ranks["compute_s"],
        )

    def _parts(
        self, announced: Sequence[AnnouncedBatch], step: int, timer: _Timer
    ) -> tuple[list[_Part], list[Tensor], float]:
        """Compute every part: the parts, the mean of their dense gradients, the mean of these' squared norms."""
        parts: list[_Part] = []
        sums: list[Tensor] = []
        square = 0.0
        for number, of_part in enumerate(announced):
            if number:
                timer.next("pull")
            pulled = self._pull(of_part)
            timer.next("compute")
            worker = self.world.rank * len(announced) + number
            parts.append(_Part(of_part.batch, pulled, *self._compute(of_part.batch, pulled, worker, step)))
            gradients = [_gradient(p) for p in self._dense]
            if len(announced) == 1:
                return parts, gradients, 0.0
            square += _square(0.0, *gradients)
            # The next part's backward pass makes new ones: these are free to hold the sums.
            sums = [total.add_(one) for total, one in zip(sums, gradients, strict=True)] if number else gradients
        return parts, [total.div_(len(announced)) for total in sums], square / len(announced)

    def _pull(self, announced: AnnouncedBatch) -> _Pulled:
        batch, softmax = announced.batch, self.parameters.softmax
        if self.parameters.dense_table is not None:
            self.parameters.dense_table.pull()
        embedding = self.parameters.embedding.pull(batch.input_rows)
        if announced.sample is None:
            samples = np.arange(self.num_classes)
            return _Pulled(embedding, softmax.pull(samples), samples, batch.target_rows, samples)
        keys = np.empty(self.config.softmax.num_samples, np.int64)
        self.parameters.server.pull_sample(announced.sample, keys, None)
        both = np.concatenate([batch.target_rows, keys - softmax.segment.first_key])
        rows, index = np.unique(both, return_inverse=True)
        targets, samples = index[: batch.num_targets], index[batch.num_targets :]
        return _Pulled(embedding, softmax.pull(rows), rows, targets, samples)

    def _compute(self, batch: Batch, pulled: _Pulled, worker: int, step: int) -> tuple[float, Tensor, Tensor]:
        """(nll, gradient of the embedding rows, of the softmax rows); dense gradients are left in ``.grad``."""
        for parameter in self._dense:
            parameter.grad = None
        weights = pulled.embedding.weights, pulled.softmax.weights
        if not batch.num_targets:
            return 0.0, *(torch.zeros(w.shape, device=self.device) for w in weights)  # type: ignore[return-value]
        # On a GPU the softmax rows cross while the LSTM computes.
        take_embedding, take_softmax = (self.uploader.start(w) for w in weights)
        dropout = torch_stream(self.config.training.seed, "dropout", worker, step)
        embedding = take_embedding().requires_grad_()
        context = context_vectors(self.model, embedding, batch, dropout)
        softmax = take_softmax().requires_grad_()
        nll = sampled_softmax_nll(
            context, softmax[:, :-1], softmax[:, -1], self._to_device(pulled.targets), self._to_device(pulled.samples),
            self._log_expected(pulled.softmax_rows), precision=self.config.model.precision,
        )
        (nll * self._loss_factor(batch)).backward()
        return float(nll.detach()), _gradient(embedding), _gradient(softmax)

    def _log_expected(self, rows: np.ndarray) -> Tensor | None:
        """log of the expected count of each row (U,) in a sample; None where it is the same for all of them."""
        softmax = self.config.softmax
        if not self.samples_softmax or softmax.distribution == "uniform":
            return None
        return log_expected_count(
            self._to_device(rows), self.num_classes, softmax.num_samples,
            softmax.num_tries or None, replacement=softmax.replacement,
        )

    def _start_mean(self, gradients: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin the mean of the ranks' dense gradients, which the result gives; they stay as they are where the server
        adds them up."""
        return self._mean.start(gradients) if self._mean is not None else lambda: gradients

    def _clip_factor(self, norm: float) -> float:
        bound = self.config.optimizer.clip_norm
        return bound / norm if bound and norm > bound else 1.0

    def _push(self, parts: Sequence[_Part], dense: list[Tensor], scale: float, rate: float) -> None:
        parameters = self.parameters
        parameters.set_learning_rate(rate)

        def push_rows() -> None:
            for part in parts:
                of_rows = scale * self._row_factor(part.batch)
                parameters.embedding.push(part.pulled.embedding, part.embedding, of_rows)
                parameters.softmax.push(part.pulled.softmax, part.softmax, of_rows)

        if self.config.training.sync:
            # All have pulled (the gradients were summed since), and now push one after another.
            for rank in range(self.world.size):
                if rank == self.world.rank:
                    push_rows()
                self.world.barrier()
        else:
            push_rows()
        if parameters.dense_table is not None:
            # The ranks' steps add up in the server: with gradients of 1 / R they go as far as one on the mean.
            parameters.dense_table.push(dense, scale / self.world.size)
        else:
            parameters.dense_optimizer.step(dense, scale)

    def _row_factor(self, batch: Batch) -> float:
        """What makes of the rows' gradients of the mean loss those of the summed loss, times --row-scale."""
        optimizer = self.config.optimizer
        factor = optimizer.row_scale if optimizer.optimizer == "adagrad" else 0.0  # plain descent has no such measure
        return factor / self._loss_factor(batch) if factor else 1.0

    def _loss_factor(self, batch: Batch) -> float:
        return self.sentence_factor / batch.size

    def _refuse(self, parts: Sequence[_Part], step: int, gradients: Sequence[Tensor]) -> None:
        """Collective: end the run before anything is pushed, naming rank, step and sentences.

        :param gradients: this rank's dense ones, not the ranks' sum, which does not say whose was not finite.
        """

        def check() -> None:
            dense = _square(0.0, *gradients)
            for part in parts:
                if not (math.isfinite(part.nll) and math.isfinite(_square(dense, part.embedding, part.softmax))):
                    what = "gradient norm" if math.isfinite(part.nll) else "loss"
                    shown = ", ".join(map(str, np.sort(part.batch.sentences)[:8]))
                    shown += ", ..." if part.batch.sentences.size > 8 else ""
                    raise TrainingError(
                        f"the {what} is not finite at step {step} (sentences {shown}); nothing was pushed; lower "
                        "--learning-rate, --loss-scale or --clip-norm"
                    )

        self.world.together(check)
        raise TrainingError(
            f"the dense gradient norm is not finite at step {step}; nothing was pushed"
        ).on_every_rank()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def noise_of(mean_square: float, square: float, num_parts: int, num_tokens: float) -> tuple[float, float]:
    """(signal, noise) of a step: unbiased estimates of the true gradient's squared norm, and of the squared deviation
    from it of the gradient of a single token.

    Their ratio is the gradient noise scale in tokens (McCandlish et al. 2018, arXiv:1812.06162, appendix A): the batch
    at which half of an averaged gradient's squared norm is noise. Each is noisy, and the signal may be below 0: sum
    both over many steps before dividing.

    :param mean_square: mean over the parts of the squared norm of a part's gradient. :param square: squared norm of the
        mean of these gradients. :param num_parts: 2 or more. :param num_tokens: of all parts.
    """
    signal = (num_parts * square - mean_square) / (num_parts - 1)
    return signal, (mean_square - square) * num_tokens / (num_parts - 1)


def _square(before: float, *tensors: Tensor) -> float:
    """``before`` and the sum of all squares."""
    return sum(map(sum_of_squares, tensors), before)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class _Timer:
    """Seconds by phase, and the phases as ranges of a profile; ``tell`` is called with each."""

    def __init__(self, phase: str, tell: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = tell
        self._begin(phase)

    def next(self, phase: str) -> None:
        self.end()
        self._begin(phase)

    def end(self) -> None:
        self._range.__exit__(None, None, None)
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._start

    def _begin(self, phase: str) -> None:
        self._phase, self._start = phase, time.perf_counter()
        self._tell(phase)
        self._range = torch.profiler.record_function(f"{phase}, but what is named")
        self._range.__enter__()
