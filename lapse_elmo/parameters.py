"""All parameters of a model: two tables in the server, and the dense part there, once per node, or once per GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapse_elmo.config.server import ServerConfig
from lapse_elmo.config.training import Config, ModelConfig
from lapse_elmo.dense_node import NodeDense, NodeUpdate
from lapse_elmo.dense_update import DenseUpdate, RankUpdate, ServerUpdate
from lapse_elmo.errors import ConfigError, OutputError
from lapse_elmo.frequent_rows import num_frequent
from lapse_elmo.local_steps import LocalUpdate
from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.model.bilm import BiLM, BiLMOptions
from lapse_elmo.model.optimizers import DenseOptimizer, DenseRule
from lapse_elmo.mpi.world import World
from lapse_elmo.ps.engines import make_server
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import Distribution, Sampler
from lapse_elmo.rng import stream, torch_stream
from lapse_elmo.row_update import RowUpdate
from lapse_elmo.schedule import Rates
from lapse_elmo.tables import DENSE_ROW, DenseTable, RowTable, rule_of

# What the names of dense arrays in a checkpoint start with: those of the model, and those from which training resumes
# where they are not the same.
PARAMETERS, TRAINED = "parameters/", "trained_parameters/"


def build_model(config: ModelConfig, seed: int, initialised: bool = True) -> BiLM:
    """Return the biLM with its initial values, which are equal on every rank; or else with an LSTM of zeros."""
    wanted = {field.name for field in dataclasses.fields(BiLMOptions)}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name in wanted}
    return BiLM(BiLMOptions(**options), torch_stream(seed, "initial lstm") if initialised else None)


def traced_rows(config: ServerConfig, num_classes: int, seed: int) -> np.ndarray:
    """Return the distinct rows of ``--trace-rows``, (n,) int64, ascending; the random ones depend on the seed.

    Raises:
        ConfigError: On all ranks, if the tables, of ``num_classes`` rows, have fewer.
    """
    ranges, num_random = config.traced
    most = max([last + 1 for _, last in ranges] + [num_random])
    if most > num_classes:
        raise ConfigError(
            f"--trace-rows {' '.join(config.trace_rows)} asks for {most:,} rows, but the vocabulary has "
            f"{num_classes:,}: name rows below {num_classes:,}"
        ).on_every_rank()
    drawn = stream(seed, "traced rows").choice(num_classes, num_random, replace=False)
    return np.unique(np.concatenate([drawn, *(np.arange(first, last + 1) for first, last in ranges)]))


class Parameters:
    """Tables, model and dense optimizer of one rank (collective: all ranks construct and close theirs together).

    Args:
        config: The options.
        num_classes: V, the number of rows of both tables.
        world: The world.
        device: Where this rank computes.
        first_sample: Number of the first negative sample; a resumed run continues the numbering.
    """

    def __init__(
        self, config: Config, num_classes: int, world: World, device: torch.device, first_sample: int = 0
    ) -> None:
        self.config = config
        self.world = world
        self.num_classes = num_classes
        in_server = config.training.dense == "ps"
        in_node = not in_server and world.size > 1 and set(world.allgather(device.type)) == {"cpu"}
        self._bf16_sums = config.training.node_sums == "bf16"
        if self._bf16_sums and world.num_nodes > 1 and not in_node:
            raise ConfigError(
                "--node-sums bf16 needs ranks on CPUs, --dense allreduce and --ps embedded: drop it"
            ).on_every_rank()
        self._local_steps = config.training.local_steps if world.num_nodes > 1 else 1  # one node never differs
        if self._local_steps > 1 and not in_node:
            raise ConfigError(
                f"--local-steps {self._local_steps} needs ranks on CPUs, where the ranks of a node share the LSTM's "
                "parameters: drop it"
            ).on_every_rank()
        self.model = build_model(config.model, config.training.seed, not in_node or world.local_rank == 0)
        self.model.to(device)
        dense = list(self.model.parameters())
        optimizer, rule = config.optimizer, rule_of(config.optimizer)
        size = config.model.projection_size
        words, classes = num_frequent(config, num_classes, world)
        shapes = [
            ("embedding", num_classes, size, rule, words),
            ("softmax", num_classes, size + 1, rule, classes),  # the last weight of a row is the bias
        ]
        if in_server:
            shapes.append(("dense", DenseTable.num_rows(dense), DENSE_ROW, rule_of(optimizer, per_row=False), 0))
        layout = Layout.of(*shapes)
        server = config.server
        options: dict[str, Any] = {"technique": server.technique_for(config.training.sync)}
        if server.ps == "embedded":
            options["staleness"] = server.staleness
        if server.trace_rows:
            rows = traced_rows(server, num_classes, config.training.seed)
            options["traced"] = np.concatenate([layout[name].keys(rows) for name in ("embedding", "softmax")])
        self.server = make_server(server.ps, world, layout, ("softmax", self._sampler()), first_sample, **options)
        initial = optimizer.initial_accumulator
        self.embedding = RowTable(self.server, layout["embedding"], initial)
        self.softmax = RowTable(self.server, layout["softmax"], initial)
        self.dense_table: DenseTable | None = None
        if in_server:
            self.dense_table = DenseTable(RowTable(self.server, layout["dense"], initial), dense)
        dense_rule = DenseRule(config.dense_optimizer, initial, optimizer.epsilon, config.dense_average)
        self.node_dense = NodeDense(world, dense, dense_rule) if in_node else None
        if self.node_dense is None:
            self.dense_optimizer = DenseOptimizer(dense, dense_rule, config.dense_rate)
        else:
            self.dense_optimizer = self.node_dense.optimizer(config.dense_rate)
        self.set_learning_rates(Rates(optimizer.learning_rate, config.dense_rate))

    @property
    def tables(self) -> list[RowTable]:
        """All tables in the server, in the order of its segments."""
        tables = [self.embedding, self.softmax]
        return [*tables, self.dense_table.table] if self.dense_table else tables

    def set_learning_rates(self, rates: Rates) -> None:
        """Set the learning rates of this rank's steps."""
        for table in self.tables:
            self.server.set_rate(table.segment.name, rates.rows)
        self.dense_optimizer.learning_rate = rates.dense

    def initialise(self) -> None:
        """Set the initial values, which depend on the seed but not on the number of ranks (collective).

        The embedding is drawn from N(0, 1), as in lapse-elmo and torch.nn.Embedding; with bilm-tf's Glorot bound, which
        shrinks with the vocabulary, it learns far slower. The softmax weights are normal with standard deviation
        1/sqrt(D), as in bilm-tf. The softmax bias starts at the log probabilities of the log-uniform law, so that the
        first predictions are close to word frequencies.
        """
        seed, size, rows = self.config.training.seed, self.config.model.projection_size, self.num_classes

        def embedding(first: int, end: int) -> torch.Tensor:
            generator = torch_stream(seed, "initial embedding", first)
            return torch.randn(end - first, size, generator=generator)

        log_probabilities = torch.from_numpy(log_uniform_probability(np.arange(rows), rows)).log().float()

        def softmax(first: int, end: int) -> torch.Tensor:
            generator = torch_stream(seed, "initial softmax", first)
            weights = torch.randn(end - first, size, generator=generator) / math.sqrt(size)
            return torch.cat([weights, log_probabilities[first:end, None]], 1)

        self.embedding.initialise(self.world.rank, self.world.size, embedding)
        self.softmax.initialise(self.world.rank, self.world.size, softmax)
        if self.dense_table is not None and self.world.rank == 0:
            self.dense_table.initialise()
        self.server.quiesce()

    def sync_parameters(self) -> None:
        """Make every push visible, and update the model's dense parameters (collective)."""
        self.server.quiesce()
        self.refresh_dense()
        self.server.barrier()

    def start_trace(self, folder: Path) -> None:
        """Begin the trace of ``--trace-rows`` in ``folder``, if there is one."""
        if self.config.server.trace_rows:
            from lapse_elmo.ps.trace import TracedServer  # as in engines.py, only for runs with a trace

            assert isinstance(self.server, TracedServer)
            self.server.start_trace(folder)

    def save_trace(self) -> None:
        """Write what there is of the trace, after an error of all ranks, which end without closing it (collective)."""
        if self.config.server.trace_rows:
            from lapse_elmo.ps.trace import TracedServer

            assert isinstance(self.server, TracedServer)
            with contextlib.suppress(OutputError):  # the error that ends the job is the one to report
                self.server.save_trace()

    def open_dense_update(self, device: torch.device) -> DenseUpdate:
        """Open what averages the dense gradients and updates the dense parameters (collective)."""
        if self.node_dense is not None and self._local_steps > 1:
            steps, parts = self._local_steps, self.config.training.accumulate
            return LocalUpdate(
                self.world, self.node_dense, self.dense_optimizer, steps, parts, bf16=self._bf16_sums
            )
        if self.node_dense is not None:
            return NodeUpdate(self.world, self.node_dense, self.dense_optimizer, bf16=self._bf16_sums)
        if self.dense_table is not None:
            return ServerUpdate(self.world, self.dense_table)
        return RankUpdate(self.world, device, self.dense_optimizer)

    def open_row_updates(self) -> list[RowUpdate]:
        """Open what updates the rows of the embedding and of the softmax (collective)."""
        training = self.config.training
        positions = training.accumulate * training.batch_size * (self.config.data.max_length + 2)
        num_samples = training.accumulate * self.config.softmax.num_samples
        # The targets of both directions are the words of the same positions.
        return [
            RowUpdate(
                self.world, table, min(self.num_classes, most), shared=self.config.server.shares_rows,
                bf16=self._bf16_sums,
            )
            for table, most in ((self.embedding, positions), (self.softmax, positions + num_samples))
        ]

    @property
    def pushers(self) -> tuple[int, int]:
        """How many pushes a row can get per step, and which of them are this rank's: one per node, or one per rank."""
        world = self.world
        return (world.num_nodes, world.node) if self.config.server.shares_rows else (world.size, world.rank)

    def dense_tensors(self) -> dict[str, torch.Tensor]:
        """Return the dense parameters and their optimizer's state, by reference, by their name in a checkpoint.

        Where the parameters are averaged, the averages are the model, and training resumes from the others.
        """
        names, averages = [name for name, _ in self.model.named_parameters()], self.dense_optimizer.averages
        trained = [parameter.data for parameter in self.model.parameters()]
        tensors = dict(zip((PARAMETERS + name for name in names), averages.means if averages else trained, strict=True))
        if averages:
            tensors.update(zip((TRAINED + name for name in names), trained, strict=True))
        return {**tensors, **self.dense_optimizer.named_state(names)}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Make the model compute with the averages of the dense parameters meanwhile, if they are averaged."""
        parameters = list(self.model.parameters())
        trained = [parameter.data for parameter in parameters]
        self.use_averages()
        try:
            yield
        finally:
            for parameter, tensor in zip(parameters, trained, strict=True):
                parameter.data = tensor

    def use_averages(self) -> None:
        """Make the model compute with the averages of the dense parameters, if they are averaged."""
        if self.dense_optimizer.averages is not None:
            for parameter, mean in zip(self.model.parameters(), self.dense_optimizer.averages.means, strict=True):
                parameter.data = mean

    def set_dense(self, tensor: torch.Tensor, values: np.ndarray) -> None:
        """Set one of :meth:`dense_tensors`; every rank of a node calls it, and the first one sets what they share."""
        if self.sets_dense(tensor):
            tensor.copy_(torch.from_numpy(values))

    def sets_dense(self, tensor: torch.Tensor) -> bool:
        """Whether this rank sets one of :meth:`dense_tensors`, which may be shared by the node's ranks."""
        return self.writes_dense or tensor is self.dense_optimizer.num_steps

    @property
    def writes_dense(self) -> bool:
        """Whether this rank sets the dense parameters when they are restored; the node's other ranks see the result."""
        return self.node_dense is None or self.world.local_rank == 0

    def refresh_dense(self) -> None:
        """Pull the dense parameters if they are in the server; before they are read."""
        if self.dense_table is not None:
            self.dense_table.pull()

    def _sampler(self) -> Sampler:
        softmax, world = self.config.softmax, self.world
        distribution = Distribution(softmax.distribution, self.num_classes)
        # If the packages' ranks on a machine drew the same rows, they would keep relocating them from each other.
        _, node = self.pushers
        return Sampler(
            distribution, softmax.sampling_scheme, softmax.replacement, self.config.training.seed, world.rank, node,
            softmax.share_samples, self.config.training.accumulate,
        )
