"""What a run would take on other machines (``--plan-nodes``): memory, traffic, seconds per step, hours for the corpus.

The arithmetic of a step is measured by trial steps on one machine (:mod:`lapse_elmo.trial`), the traffic of rows
comes from :mod:`lapse_elmo.traffic`, the rest is assumed. docs/choosing.md lists the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lapse_elmo.balance import longest_batch
from lapse_elmo.config.training import Config
from lapse_elmo.devices import Device
from lapse_elmo.errors import ConfigError
from lapse_elmo.frequent_rows import node_use, num_frequent
from lapse_elmo.gradient_sample import STRIDE
from lapse_elmo.local_steps import averaging_bytes
from lapse_elmo.memory import Estimate, dense_size, estimate
from lapse_elmo.model.optimizers import DenseRule
from lapse_elmo.mpi.world import World
from lapse_elmo.node_sums import sum_bytes
from lapse_elmo.step_report import report_bytes
from lapse_elmo.tables import rule_of
from lapse_elmo.traffic import RowTraffic, row_traffic
from lapse_elmo.training_data import TrainingData
from lapse_elmo.trial import Trial, run_trial

# The manager's work per row and transmission sent, from counts of its processor time at 4 to 64 nodes
# (benchmarks/README.md).
_ROW_S, _TRANSMISSION_S, _COPIED_BYTES_PER_S = 1.5e-6, 6e-4, 5e9


@dataclass(frozen=True)
class PlannedShape:
    """The ranks of the planned run; a :class:`~lapse_elmo.memory.Shape` as rank 0 sees it."""

    num_nodes: int
    local_size: int
    rank: int = 0

    @property
    def host_size(self) -> int:
        """The number of ranks on a machine."""
        return self.local_size

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.num_nodes * self.local_size


@dataclass(frozen=True)
class Forecast:
    """The planned run.

    Attributes:
        shape: Nodes and ranks.
        memory: Of rank 0, and of what a node shares.
        rows: Rows that a node sends per step.
        dense_bytes: Bytes that a node sends per step to sum the gradients of dense parameters and frequent rows, and to
            average dense parameters.
        report_bytes: Bytes of the ranks' reports that a node receives per step.
        seconds: Seconds of a step by phase.
        network_s: Seconds that the node's link is busy per step.
        tokens: Words of a step, of all ranks.
        run_tokens: Words of the whole run.
    """

    shape: PlannedShape
    memory: Estimate
    rows: RowTraffic
    dense_bytes: float
    report_bytes: float
    seconds: dict[str, float]
    network_s: float
    tokens: float
    run_tokens: float

    @property
    def step_s(self) -> float:
        """Seconds of a step: those of its phases, or of the link if it is busy longer."""
        return max(sum(self.seconds.values()), self.network_s)

    @property
    def tokens_per_s(self) -> float:
        """Words per second of all ranks."""
        return self.tokens / self.step_s

    @property
    def node_bytes(self) -> int:
        """Memory of the first node, which also holds what rank 0 alone keeps, with the libraries of its ranks."""
        own, ranks = self.memory, self.shape.local_size
        return own.shared + self.copied_bytes + ranks * (own.dense + own.activations + own.libraries)

    @property
    def copied_bytes(self) -> int:
        """What the ranks of the first node copy for a checkpoint: their rows, and rank 0 the dense parameters."""
        return self.memory.copy + (self.shape.local_size - 1) * (self.memory.rows // self.shape.size)


def forecast(config: Config, data: TrainingData, shape: PlannedShape, trial: Trial, memory: Estimate) -> Forecast:
    """Return what the run of ``config`` would take.

    Args:
        config: The options; ``config.plan`` has the network.
        data: The corpus.
        shape: Nodes and ranks.
        trial: Measured steps.
        memory: The estimate for ``shape``.
    """
    model, training, plan = config.model, config.training, config.plan
    nodes, words = shape.num_nodes, trial.tokens / training.accumulate / training.batch_size
    sentence = words + (2 if config.data.boundaries else 0)
    use = node_use(config, data.vocabulary.size, sentence, shape.local_size)
    rule, size = rule_of(config.optimizer), model.projection_size
    frequent = num_frequent(config, data.vocabulary.size, shape)
    rows = row_traffic(use, nodes, [4 * (width + rule.state_width(width)) for width in (size, size + 1)], frequent)
    dense_bytes = summed_bytes(config, nodes, frequent[0] * size + frequent[1] * (size + 1))
    reported = float(report_bytes() * shape.local_size * (nodes - 1))
    bytes_per_s, latency_s = plan.network_gbit * 1e9 / 8, plan.network_us * 1e-6
    hops = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    # The trial's ranks waited for the longest of their batches, more ranks wait for a longer one.
    longer = longest_batch(config, data.train, shape.size) - longest_batch(config, data.train, trial.num_ranks)
    seconds = {
        **trial.seconds,
        "longest batch": max(longer, 0.0) * sum(trial.seconds.get(phase, 0.0) for phase in ("pull", "compute", "push")),
        "dense sum": dense_bytes / bytes_per_s + 2 * hops * latency_s,
        "reports": reported / bytes_per_s + hops * latency_s,
        "serving": rows.rows * _ROW_S + rows.transmissions * _TRANSMISSION_S
        + 2 * rows.num_bytes / _COPIED_BYTES_PER_S,  # each byte is copied on both sides
    }
    run_tokens = training.epochs * float(data.train.num_tokens)
    if training.max_steps:
        run_tokens = min(run_tokens, training.max_steps * trial.tokens * shape.size)
    return Forecast(
        shape, memory, rows, dense_bytes, reported, seconds,
        (rows.num_bytes + dense_bytes + reported) / bytes_per_s, trial.tokens * shape.size, run_tokens,
    )


def summed_bytes(config: Config, num_nodes: int, row_numbers: float) -> float:
    """Return the bytes that a node sends per step for sums and averages over the nodes.

    Args:
        config: The options.
        num_nodes: The number of nodes.
        row_numbers: Numbers of all frequent rows.
    """
    model, training = config.model, config.training
    dense = dense_size(model.projection_size, model.cell_size, model.num_layers)
    bf16, every = training.node_sums == "bf16", training.local_steps
    if every == 1:
        return sum_bytes(dense + row_numbers, num_nodes, bf16=bf16)
    state = list(DenseRule(config.dense_optimizer).initial_state)
    sampled = sum_bytes(dense / STRIDE, num_nodes)
    averaged = averaging_bytes(dense, state, num_nodes, bf16=bf16) / every
    return sum_bytes(row_numbers, num_nodes, bf16=bf16) + sampled + averaged


def forecast_lines(config: Config, world: World, data: TrainingData, device: Device) -> tuple[str, ...]:
    """Measure trial steps, and return the plan of ``config.plan`` as text (collective).

    Raises:
        ConfigError: On every rank, if the job has several nodes, or the corpus is too small for the plan.
    """
    plan = config.plan
    shape = PlannedShape(plan.plan_nodes, plan.plan_ranks or world.size)
    if world.num_nodes > 1:
        raise ConfigError(
            f"--plan-nodes measures one machine, but the job has {world.num_nodes} nodes: start it on one of them"
        ).on_every_rank()
    if data.train.num_sentences < shape.size * config.training.accumulate:
        raise ConfigError(
            f"{data.train.num_sentences:,} training sentences cannot be shared by {shape.num_nodes} x "
            f"{shape.local_size} ranks: lower --plan-nodes or --plan-ranks"
        ).on_every_rank()
    memory = estimate(config, data.vocabulary.size, data.train, shape)  # before the trial, which takes memory itself
    if shape.num_nodes > 1 and world.size > 1:
        # As several nodes, so that managers and the sums between nodes take their share of the processors here, too.
        world.split(min(max(world.size // shape.local_size, 2), shape.num_nodes))
    trial = run_trial(config, world, data, device)
    return tuple(_lines(config, forecast(config, data, shape, trial, memory), trial))


def _lines(config: Config, plan: Forecast, trial: Trial) -> list[str]:
    rows, memory, ranks = plan.rows, plan.memory, plan.shape.local_size
    sent = rows.num_bytes + plan.dense_bytes
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in plan.seconds.items())
    bound = "" if plan.step_s > plan.network_s else "; the network is the limit"
    return [
        f"plan for {plan.shape.num_nodes} nodes of {ranks} ranks, {config.plan.network_gbit:g} Gbit/s and "
        f"{config.plan.network_us:g} us between nodes, from {trial.num_steps} steps of {trial.num_ranks} ranks here"
        f"{f' as {trial.num_nodes} nodes' if trial.num_nodes > 1 else ''}:",
        f"  memory per node: {plan.node_bytes / 1e9:.2f} GB: {memory.shared / 1e9:.2f} shared, "
        f"{plan.copied_bytes / 1e9:.2f} for checkpoints, {ranks} ranks with {memory.dense / 1e9:.2f} dense, "
        f"{memory.activations / 1e9:.2f} activations, {memory.libraries / 1e9:.2f} libraries each",
        f"  sent per node and step: {sent / 1e6:.1f} MB: rows that move {rows.moved_bytes / 1e6:.1f}, updates of "
        f"replicas {rows.changed_bytes / 1e6:.1f}, refreshed replicas {rows.refreshed_bytes / 1e6:.1f}, sums of "
        f"gradients {plan.dense_bytes / 1e6:.1f}",
        f"  seconds per step: {plan.step_s:.3f}: {phases}; the link is busy for {plan.network_s:.3f}{bound}",
        f"  {plan.tokens_per_s:,.0f} tokens/s; {plan.run_tokens:,.0f} tokens in "
        f"{plan.run_tokens / plan.tokens_per_s / 3600:.2f} hours, without evaluations and saves",
    ]
