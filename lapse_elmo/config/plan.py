"""Define the options of ``bin/train`` for a plan, which predicts a run on other machines (``--plan-nodes``)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lapse_elmo.config.checks import require
from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError

if TYPE_CHECKING:
    from lapse_elmo.config.training import Config


@dataclass(frozen=True)
class PlanConfig:
    """A plan for other machines, from a few trial steps on this one; nothing is written."""

    plan_nodes: int = option(
        0, metavar="N",
        help="train a few trial steps here, print memory, traffic, speed and duration of a run on N nodes, and exit "
        "(0: no plan)",
    )
    plan_ranks: int = option(0, metavar="N", help="ranks per planned node (0: as many as are started here)")
    network_gbit: float = option(100.0, metavar="X", help="bandwidth of a planned node's network, in Gbit/s each way")
    network_us: float = option(10.0, metavar="X", help="latency between planned nodes, in microseconds")

    def __post_init__(self) -> None:
        for name in ("plan_nodes", "plan_ranks"):
            require(0 <= getattr(self, name) <= 1_000_000, name, getattr(self, name), "from 0 to 1,000,000")
        require(self.network_gbit > 0, "network_gbit", self.network_gbit, "more than 0")
        require(self.network_us >= 0, "network_us", self.network_us, "0 or more")


def refuse_parts_of_a_plan(config: Config) -> None:
    """Refuse options of a plan without the one that asks for it: what starts would be a run.

    Raises:
        ConfigError: The message names the option.
    """
    given = config.plan
    for field in dataclasses.fields(given):
        if not given.plan_nodes and getattr(given, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise ConfigError(f"--{name} describes the machines of a plan: give --plan-nodes N too, or drop it")


def check_plan(config: Config) -> None:
    """Refuse a plan for options whose traffic cannot be counted.

    Raises:
        ConfigError: The message names the option.
    """
    if not config.plan.plan_nodes:
        return
    training, softmax, server = config.training, config.softmax, config.server
    technique = server.technique_for(training.sync)
    refused = {
        f"--ps {server.ps}": server.ps != "embedded",
        "--sync": training.sync,
        f"--technique {technique}": technique != "adaptive",
        f"--sampling-scheme {softmax.sampling_scheme}": softmax.sampling_scheme != "preloc",
        f"--share-samples {softmax.share_samples}": softmax.share_samples == "job",
        f"--dense {training.dense}": training.dense != "allreduce",
        f"--nodes {server.nodes}": server.nodes > 1,
    }
    for name, chosen in refused.items():
        if chosen:
            raise ConfigError(f"--plan-nodes cannot count the traffic of {name}: drop one of them")
