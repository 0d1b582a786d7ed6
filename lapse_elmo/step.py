"""One training step: pull rows, compute, agree between the ranks, push."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lapse_elmo.batches import Batch
from lapse_elmo.config.training import Config
from lapse_elmo.dense_mean import DenseMean, open_dense_mean
from lapse_elmo.devices import Uplink
from lapse_elmo.errors import TrainingError
from lapse_elmo.model.bilm import BiLM
from lapse_elmo.model.optimizers import sum_of_squares
from lapse_elmo.model.softmax import log_expected_count, sampled_softmax_nll
from lapse_elmo.parameters import Parameters
from lapse_elmo.rng import torch_stream
from lapse_elmo.tables import PulledRows
from lapse_elmo.world import World


@dataclass(frozen=True)
class AnnouncedBatch:
    """A batch whose intent went out: ``sample`` is the handle of its negative samples (None for the full softmax)."""

    batch: Batch
    sample: int | None


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks: sums of nll (nats), targets, tokens; the gradient norm before clipping.

    ``flags`` are what each rank had to say to all at this step. ``seconds`` are this rank's, by phase: pull, compute,
    agree (waiting for other ranks), push. ``compute_s`` (ranks,) are the compute seconds of every rank.
    """

    nll: float
    num_targets: int
    num_tokens: int
    num_cut: int
    gradient_norm: float
    flags: tuple[int, ...]
    seconds: dict[str, float]
    compute_s: np.ndarray


@dataclass(frozen=True)
class _Pulled:
    """The rows of one step; ``samples`` and ``targets`` index ``softmax``."""

    embedding: PulledRows
    softmax: PulledRows
    softmax_rows: np.ndarray
    targets: np.ndarray
    samples: np.ndarray


class TrainingStep:
    """Trains one batch a call, on every rank at the same time (collective).

    The loss whose gradient is taken is nll / ``mean_targets``, so each target weighs the same, as with bilm-tf, whose
    batches are equally large. With nll / targets of the batch, one of very short sentences would move the parameters
    as far as one of long ones, and towards ending every sentence at once.

    :param mean_targets: how many targets a batch has on average.
    :param flag: a number asked for once a step on every rank; ``StepResult.flags`` has those of all ranks, on all.
    :ivar remark: what a log should say of how dense gradients are summed, if anything.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        parameters: Parameters,
        device: torch.device,
        mean_targets: float,
        flag: Callable[[], int],
    ) -> None:
        self.config = config
        self.world = world
        self.parameters = parameters
        self.model: BiLM = parameters.model
        self.device = device
        self.uplink = Uplink(device)
        self.loss_factor = config.optimizer.loss_scale / mean_targets
        self.flag = flag
        self.num_classes = parameters.softmax.segment.num_rows
        self.samples_softmax = config.softmax.num_samples < self.num_classes
        self._dense: list[nn.Parameter] = list(self.model.parameters())
        self._mean: DenseMean | None = None
        self.remark = ""
        if parameters.dense_table is None:
            self._mean, self.remark = open_dense_mean(world, device, sum(p.numel() for p in self._dense))

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

    def __call__(self, announced: AnnouncedBatch, step: int) -> StepResult:
        batch = announced.batch
        timer = _Timer("pull")
        pulled = self._pull(announced)
        timer.next("compute")
        nll, embedding, softmax = self._compute(batch, pulled, step)
        timer.next("agree")
        dense_mean = self._start_mean([_gradient(p) for p in self._dense])
        square = _square(0.0, embedding, softmax)
        dense = dense_mean()
        square = _square(square, *dense)
        mine = np.array(
            [
                *(nll, batch.num_targets, batch.num_tokens, batch.num_cut, square, self.flag()),
                timer.seconds["compute"],
            ],
            np.float64,
        )
        ranks = self.world.gather_numbers(mine)
        # The mean over the ranks, so that all of them take the same factor, and the same way here.
        norm = math.sqrt(float(ranks[:, 4].mean()))
        if not (math.isfinite(norm) and np.isfinite(ranks).all()):
            self._refuse(batch, step, nll, (embedding, softmax))
        timer.next("push")
        self._push(pulled, embedding, softmax, dense, self._clip_factor(norm))
        self.parameters.server.advance_clock()
        timer.end()
        total = ranks.sum(0)
        return StepResult(
            nll=float(total[0]), num_targets=int(total[1]), num_tokens=int(total[2]), num_cut=int(total[3]),
            gradient_norm=norm, flags=tuple(ranks[:, 5].astype(int).tolist()), seconds=timer.seconds,
            compute_s=ranks[:, 6],
        )

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

    def _compute(self, batch: Batch, pulled: _Pulled, step: int) -> tuple[float, Tensor, Tensor]:
        """(nll, gradient of the embedding rows, of the softmax rows); dense gradients are left in ``.grad``."""
        for parameter in self._dense:
            parameter.grad = None
        weights = pulled.embedding.weights, pulled.softmax.weights
        if not batch.num_targets:
            return 0.0, *(torch.zeros(w.shape, device=self.device) for w in weights)  # type: ignore[return-value]
        # On a GPU the softmax rows cross while the LSTM computes.
        take_embedding, take_softmax = (self.uplink.send(w) for w in weights)
        dropout = torch_stream(self.config.training.seed, "dropout", self.world.rank, step)
        embedding = take_embedding().requires_grad_()
        context = predicting_vectors(self.model, embedding, batch, dropout)
        softmax = take_softmax().requires_grad_()
        nll = sampled_softmax_nll(
            context, softmax[:, :-1], softmax[:, -1], self._to_device(pulled.targets), self._to_device(pulled.samples),
            self._log_expected(pulled.softmax_rows), precision=self.config.model.precision,
        )
        (nll * self.loss_factor).backward()
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

    def _push(
        self, pulled: _Pulled, embedding: Tensor, softmax: Tensor, dense: list[Tensor], scale: float
    ) -> None:
        parameters = self.parameters

        def push_rows() -> None:
            parameters.embedding.push(pulled.embedding, embedding, scale)
            parameters.softmax.push(pulled.softmax, softmax, scale)

        if self.config.training.sync:
            # All have pulled (the gradients were summed since), and now push one after another.
            for rank in range(self.world.size):
                if rank == self.world.rank:
                    push_rows()
                self.world.barrier()
        else:
            push_rows()
        if parameters.dense_table is not None:
            parameters.dense_table.push(dense, scale)
        else:
            parameters.dense_optimizer.step(dense, scale)

    def _refuse(self, batch: Batch, step: int, nll: float, sparse: tuple[Tensor, Tensor]) -> None:
        """Collective: end the run before anything is pushed, naming rank, step and sentences."""

        def check() -> None:
            # The dense gradients as they were before the ranks' were summed: a sum does not say whose was not finite.
            mine = _square(0.0, *sparse, *(_gradient(p) for p in self._dense))
            if not (math.isfinite(nll) and math.isfinite(mine)):
                what = "gradient norm" if math.isfinite(nll) else "loss"
                shown = ", ".join(map(str, np.sort(batch.sentences)[:8]))
                shown += ", ..." if batch.sentences.size > 8 else ""
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


def predicting_vectors(model: BiLM, embedding: Tensor, batch: Batch, dropout: torch.Generator | None) -> Tensor:
    """Predicting vectors (N, D) of a batch, forward targets first.

    :param embedding: (U, D) weights of ``batch.input_rows``.
    """
    device = embedding.device
    embedded = nn.functional.embedding(torch.from_numpy(batch.input_index).to(device), embedding)
    forward, backward = model(embedded, torch.from_numpy(batch.mask), dropout)
    size = forward.shape[-1]
    return torch.cat(
        [
            forward.reshape(-1, size)[torch.from_numpy(batch.forward_places).to(device)],
            backward.reshape(-1, size)[torch.from_numpy(batch.backward_places).to(device)],
        ]
    )


def _square(before: float, *tensors: Tensor) -> float:
    """``before`` and the sum of all squares."""
    return sum(map(sum_of_squares, tensors), before)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class _Timer:
    """Seconds by phase, and the phases as ranges of a profile."""

    def __init__(self, phase: str) -> None:
        self.seconds: dict[str, float] = {}
        self._begin(phase)

    def next(self, phase: str) -> None:
        self.end()
        self._begin(phase)

    def end(self) -> None:
        self._range.__exit__(None, None, None)
        self.seconds[self._phase] = time.perf_counter() - self._start

    def _begin(self, phase: str) -> None:
        self._phase, self._start = phase, time.perf_counter()
        self._range = torch.profiler.record_function(f"{phase}, but what is named")
        self._range.__enter__()
