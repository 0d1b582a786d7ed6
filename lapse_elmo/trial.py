"""A few real training steps for a plan (``--plan-nodes``), whose results are thrown away."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass

from lapse_elmo.ahead import announce_ahead, read_ahead
from lapse_elmo.config.training import Config
from lapse_elmo.cursor import Cursor
from lapse_elmo.devices import Device
from lapse_elmo.mpi.world import World
from lapse_elmo.parameters import Parameters
from lapse_elmo.schedule import Rates
from lapse_elmo.step import TrainingStep
from lapse_elmo.step_report import StepResult, Vote
from lapse_elmo.training_data import TrainingData, sentence_targets, sentence_tokens

_WARM_UP_STEPS = 2
_MOST_STEPS, _FEWEST_STEPS, _MOST_S = 20, 3, 60.0  # after the warm-up


@dataclass(frozen=True)
class Trial:
    """What the trial steps took: the mean over the ranks and the median over the steps, per training step.

    Attributes:
        num_ranks: Ranks of the trial, all on one machine.
        num_nodes: Nodes that they were split into.
        num_steps: Steps that were measured.
        seconds: Seconds by phase: pull, compute, agree, push, and other (between the steps); those that grow with the
            batch (all but ``agree`` and ``other``) are scaled from the words of each step to ``tokens``.
        tokens: Words of a rank in a mean step, with full batches.
    """

    num_ranks: int
    num_nodes: int
    num_steps: int
    seconds: dict[str, float]
    tokens: float


def run_trial(config: Config, world: World, data: TrainingData, device: Device) -> Trial:
    """Train a few steps with full batches, as ``bin/train`` does, and measure them (collective); nothing is written."""
    training = dataclasses.replace(
        config.training, first_batch=0, max_steps=0, epochs=_WARM_UP_STEPS + _MOST_STEPS  # an epoch has a step or more
    )
    config = dataclasses.replace(config, training=training)
    world.progress.enter("plan, making the parameters")
    parameters = Parameters(config, data.vocabulary.size, world, device.device)
    parameters.initialise()
    results: list[StepResult] = []
    start_s = ended_s = time.monotonic()

    def vote() -> Vote:
        return Vote(end=len(results) >= _WARM_UP_STEPS + _FEWEST_STEPS - 1 and time.monotonic() - start_s > _MOST_S)

    step_once = TrainingStep(config, world, parameters, device.device, sentence_targets(config, data.train), vote)
    rates = Rates(config.optimizer.learning_rate, config.dense_rate)
    batches = read_ahead(Cursor(config, world, data.train).batches())
    for announced in announce_ahead(batches, step_once.announce, training.lookahead):
        result = step_once(announced, len(results) + 1, rates)
        before_s, ended_s = ended_s, time.monotonic()
        other_s = ended_s - before_s - sum(result.seconds.values())
        results.append(dataclasses.replace(result, seconds={**result.seconds, "other": other_s}))
        if results[-1].votes.end or len(results) == _WARM_UP_STEPS + _MOST_STEPS:
            break
    step_once.close()
    parameters.server.close()
    tokens = training.batch_size * training.accumulate * sentence_tokens(config, data.train)
    measured = results[_WARM_UP_STEPS:]
    return Trial(world.size, world.num_nodes, len(measured), _mean_seconds(measured, world, tokens), tokens)


def _mean_seconds(results: list[StepResult], world: World, tokens: float) -> dict[str, float]:
    """Return the median seconds by phase of steps of ``tokens`` words per rank (collective)."""
    own: dict[str, list[float]] = {}
    for result in results:
        for phase, seconds in result.seconds.items():
            size = result.num_tokens / world.size
            scale = tokens / size if phase not in ("agree", "other") and size else 1.0
            own.setdefault(phase, []).append(scale * seconds)
    medians = {phase: statistics.median(values) for phase, values in own.items()}
    everyone = world.allgather(medians)
    return {phase: statistics.mean(rank[phase] for rank in everyone) for phase in medians}
