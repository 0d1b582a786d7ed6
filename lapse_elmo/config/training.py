"""Define the options of ``bin/train``: one documented dataclass per group, checked when it is made.

Defaults follow the sources named in the README. Where they differ, benchmarks/learning.md has the measurement.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapse_elmo.config.checks import fraction, positive, require
from lapse_elmo.config.cli import convert, option, options_of, parse
from lapse_elmo.config.initial import InitialConfig
from lapse_elmo.config.optimizer import ADAM_FACTOR, DENSE_AVERAGE, OptimizerConfig
from lapse_elmo.config.plan import PlanConfig, check_plan, refuse_parts_of_a_plan
from lapse_elmo.config.server import ServerConfig
from lapse_elmo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_SHARDS = "data/shards"
DEFAULT_VOCAB = "data/vocab.txt"

PRESETS = {
    "small": {"projection_size": 128, "cell_size": 512, "num_layers": 2},
    "original": {"projection_size": 512, "cell_size": 4096, "num_layers": 2},
}


@dataclass(frozen=True)
class DataConfig:
    """Where the shards and the vocabulary are, and how sentences are cut."""

    shards: str = option(DEFAULT_SHARDS, metavar="DIR", help="directory of the training and held-out shards")
    vocab: str = option(DEFAULT_VOCAB, metavar="FILE", help="vocabulary that the shards were made with")
    heldout: str = option(
        "", metavar="DIR", help="directory of other held-out shards, such as a test set (default: those in --shards)"
    )
    max_length: int = option(400, metavar="N", help="maximum length of a sentence in tokens; longer ones are truncated")
    boundaries: bool = option(True, help="add <S> and </S> to each sentence, and predict them too")

    def __post_init__(self) -> None:
        positive(self, "max_length")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and regularisation of the bidirectional LSTM."""

    preset: str = option(
        "", choices=("", *PRESETS), metavar="NAME",
        help="model sizes: small (D 128, C 512, L 2) or original (D 512, C 4096, L 2), unless the "
        "next three options give others (default: small)",
        replaces=("projection_size", "cell_size", "num_layers"),
    )
    projection_size: int = option(0, metavar="D", help="size of word vectors and LSTM outputs (0: the preset's)")
    cell_size: int = option(0, metavar="C", help="size of the LSTM's memory cell (0: the preset's)")
    num_layers: int = option(0, metavar="L", help="LSTM layers per direction (0: the preset's)")
    dropout: float = option(0.1, metavar="P", help="dropout probability of word vectors and of context vectors")
    recurrent_dropout: float = option(
        0.0, metavar="P", help="dropout probability of the hidden state, with one mask per sentence"
    )
    cell_clip: float = option(3.0, metavar="X", help="clip the memory cell to [-X, X] (0: no limit)")
    projection_clip: float = option(3.0, metavar="X", help="clip the hidden state to [-X, X] (0: no limit)")
    context: str = option(
        "top", choices=("top", "mix"),
        help="context vectors that predict words: the top layer (as in ELMo) or a scalar mix of all layers (as in "
        "lapse-elmo)"
    )
    lstm: str = option(
        "fused", choices=("fused", "allennlp"),
        help="LSTM implementation: our own, or AllenNLP's ElmoLstm, which is slower and computes the same"
    )
    precision: str = option(
        "fp32", choices=("fp32", "bf16"),
        help="precision of matrix products in training; bf16 keeps cells, sums and parameters in float32",
    )
    lstm_init: str = option(
        "glorot", choices=("glorot", "orthogonal"),
        help="initialisation of the LSTM weights: glorot as in bilm-tf, orthogonal as in AllenNLP"
    )

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset or "small"].items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        positive(self, "projection_size", "cell_size", "num_layers")
        for name in ("cell_clip", "projection_clip"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        fraction(self, "dropout", "recurrent_dropout")
        require(self.num_layers <= 100, "num_layers", self.num_layers, "at most 100")
        if self.precision == "bf16" and self.lstm != "fused":
            raise ConfigError("--precision bf16 needs --lstm fused, since AllenNLP's LSTM computes in float32")


@dataclass(frozen=True)
class SoftmaxConfig:
    """Negative samples of the training loss; evaluation uses the full softmax."""

    num_samples: int = option(8192, metavar="S", help="negative samples per step, shared by the whole batch")
    replacement: bool = option(False, help="draw the samples with replacement")
    distribution: str = option(
        "log-uniform", choices=("log-uniform", "uniform"),
        help="distribution of the samples over the vocabulary, which is ordered by frequency"
    )
    sampling_scheme: str = option(
        "preloc", choices=("naive", "preloc", "pool", "local"),
        help="how the server draws samples: naive: when they are pulled; preloc: ahead of the step, so that their rows "
        "are local by then; pool: like preloc, but each pool of draws is used twice; local: only from rows that are on "
        "the node",
    )
    share_samples: str = option(
        "node", choices=("node", "job", "none"),
        help="which ranks use the same samples in a step: those of a node (fewest rows per node), all of the "
        "job, or none",
    )
    num_tries: float = option(
        0.0, metavar="N",
        help="number of draws assumed when computing expected counts of samples without replacement (0: computed)"
    )

    def __post_init__(self) -> None:
        positive(self, "num_samples")
        require(self.num_tries >= 0, "num_tries", self.num_tries, "0 or more")
        if self.replacement and self.num_tries:
            raise ConfigError("--num-tries is for sampling without replacement; drop it, or give --no-replacement")


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, in which batches, from which seed."""

    epochs: int = option(2, metavar="N", help="number of passes over the training shards")
    max_steps: int = option(0, metavar="N", help="stop after N steps (0: after --epochs)")
    max_minutes: float = option(
        0.0, metavar="N", help="stop after N minutes of training, summed over all starts of the run (0: no limit)"
    )
    evaluate_every: int = option(
        0, metavar="N",
        help="also measure held-out perplexity and save a checkpoint every N steps (0: only at the end of each epoch)",
    )
    patience: int = option(
        0, metavar="N",
        help="early stopping: stop after N consecutive evaluations without a better held-out perplexity (0: never)"
    )
    batch_size: int = option(32, metavar="B", help="maximum number of sentences per step and rank")
    first_batch: int = option(
        8, metavar="N",
        help="number of sentences in the first step, over all ranks, which share them equally, or take turns if there "
        "are more ranks than sentences (0: --batch-size per rank at every step)",
    )
    growth_tokens: int = option(
        75_000, metavar="N",
        help="the global batch grows by --first-batch sentences every N trained tokens, up to --batch-size per rank "
        "(0: it does not grow)",
    )
    accumulate: int = option(
        1, metavar="K",
        help="gradient accumulation: each rank computes K batches per update, so that R ranks train as R x K ranks "
        "would",
    )
    lookahead: int = option(
        1, metavar="N",
        help="number of steps ahead at which the server learns which rows a batch needs (its intent) and draws its "
        "samples",
    )
    seed: int = option(1, metavar="N", help="seed of all random numbers")
    sync: bool = option(
        False,
        help="let nodes push one after another: slower, but bitwise reproducible, as the ranks of one node always are",
    )
    dense: str = option(
        "allreduce", choices=("allreduce", "ps"),
        help="LSTM parameters: one copy per node (per rank on GPUs), with gradients all-reduced; or rows in the "
        "parameter server",
    )
    node_sums: str = option(
        "fp32", choices=("fp32", "bf16"),
        help="format in which nodes send each other the gradients that are summed, those of LSTM parameters and of "
        "frequent rows: fp32, or bf16, which rounds them and halves the bytes",
    )

    local_steps: int = option(
        1, metavar="K",
        help="for slow networks: each node updates its LSTM parameters with its own gradients, and nodes average the "
        "parameters every K steps; saves and evaluations wait for these steps (1: gradients are summed over all nodes "
        "at each step)",
    )

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "accumulate", "local_steps")
        limits = {"epochs": 1_000_000, "accumulate": 100_000, "lookahead": 10_000, "local_steps": 10_000}
        for name, limit in limits.items():
            require(getattr(self, name) <= limit, name, getattr(self, name), f"at most {limit:,}")
        for name in (
            "max_steps", "max_minutes", "evaluate_every", "patience", "lookahead", "seed", "first_batch",
            "growth_tokens",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        if self.sync and self.dense == "ps":
            raise ConfigError("--sync orders only the pushes of table rows; it needs --dense allreduce")
        if self.accumulate > 1 and self.dense == "ps":
            raise ConfigError("--accumulate sums dense gradients before each update; it needs --dense allreduce")
        if self.local_steps > 1 and self.dense == "ps":
            raise ConfigError("--local-steps averages the nodes' copies of the LSTM; it needs --dense allreduce")


@dataclass(frozen=True)
class DeviceConfig:
    """Where the ranks compute."""

    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one, else the CPU")
    device_ids: tuple[int, ...] = option(
        (), metavar="ID", help="numbers of the GPUs that the ranks of a node share (default: all)"
    )
    threads: int = option(0, metavar="N", help="CPU threads per rank (0: the node's usable cores / its ranks)")

    def __post_init__(self) -> None:
        require(self.threads >= 0, "threads", self.threads, "0 or more")
        require(all(i >= 0 for i in self.device_ids), "device_ids", self.device_ids, "numbers of 0 or more")
        if self.device_ids and self.device == "cpu":
            raise ConfigError("--device-ids names GPUs but --device is cpu; drop one of them")


@dataclass(frozen=True)
class RunConfig:
    """What is written, where and when."""

    run_dir: str = option(
        "", metavar="DIR", help="directory for config, metrics and checkpoints (default: runs/DATE-TIME)"
    )
    resume: str = option(
        "auto", metavar="WHAT",
        help="auto: resume the run in --run-dir if there is one; never: start from scratch, and fail if there is one; "
        "otherwise the directory of a run or of a checkpoint to resume from",
    )
    overwrite: bool = option(False, help="replace the run in --run-dir instead of resuming it")
    save_every_steps: int = option(0, metavar="N", help="save a checkpoint every N steps (0: off)")
    save_every_minutes: float = option(
        10.0, metavar="N", help="save a checkpoint every N minutes (0: off)"
    )
    keep_checkpoints: int = option(
        2, metavar="N", help="number of newest checkpoints to keep, in addition to the best one"
    )
    save_at_tokens: tuple[int, ...] = option(
        (), metavar="N",
        help="save a checkpoint after N trained tokens and never delete it, for learning curves: 1M,10M,100M (default: "
        "none)",
    )
    stall_minutes: float = option(
        20.0, metavar="N",
        help="if no rank makes progress for N minutes, report which rank hangs and where the others wait, and end the "
        "job with status 76 (0: never)",
    )
    dry_run: bool = option(False, help="print ranks, shards, memory and number of steps, and exit")
    report_every: int = option(20, metavar="N", help="write metrics every N steps")
    profile: int = option(
        0, metavar="N",
        help="profile N steps, after the first 3, and write tables and browser traces to --run-dir/profile (0: none)",
    )
    progress: str = option(
        "auto", choices=("auto", "bar", "lines", "none"),
        help="progress bar, plain lines or nothing; auto: a bar on a terminal, else lines"
    )

    def __post_init__(self) -> None:
        require(self.profile >= 0, "profile", self.profile, "0 or more")
        positive(self, "report_every", "keep_checkpoints")
        require(all(n > 0 for n in self.save_at_tokens), "save_at_tokens", self.save_at_tokens, "numbers above 0")
        for name in ("save_every_steps", "save_every_minutes", "stall_minutes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.resume != "", "resume", "empty", "auto, never, or a run or checkpoint")


@dataclass(frozen=True)
class Config:
    """All options of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    initial: InitialConfig = field(default_factory=InitialConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.softmax.distribution == "uniform" and self.softmax.num_tries:
            raise ConfigError("--num-tries is for --distribution log-uniform, not uniform; drop one of them")
        if self.training.sync and self.server.technique in ("adaptive", "replication"):
            raise ConfigError(
                f"--sync needs rows with one copy, but --technique {self.server.technique} makes replicas, which "
                "receive pushes at times that vary from run to run: give relocation or static"
            )
        if self.training.sync and self.server.ps == "adapm":
            raise ConfigError("--sync needs rows with one copy, and --ps adapm makes replicas: drop one of them")
        if self.training.dense == "ps" and self.dense_optimizer != self.optimizer.optimizer:
            raise ConfigError(
                f"--dense ps updates the LSTM's parameters as rows, with --optimizer {self.optimizer.optimizer}: drop "
                f"--dense-optimizer {self.dense_optimizer}"
            )
        if self.training.dense == "ps" and self.optimizer.dense_rate:
            raise ConfigError("--dense ps updates the LSTM's parameters at --learning-rate: drop --dense-rate")
        if self.training.dense == "ps" and self.optimizer.dense_average > 0:
            raise ConfigError("--dense ps does not average the LSTM's parameters: drop --dense-average")
        check_plan(self)

    @property
    def dense_optimizer(self) -> str:
        """The update rule of the dense parameters: ``adam``, ``adagrad`` or ``sgd``."""
        rows = self.optimizer.optimizer
        default = "adam" if rows == "adagrad" and self.training.dense != "ps" else rows
        return self.optimizer.dense_optimizer or default

    @property
    def dense_rate(self) -> float:
        """The learning rate of the dense parameters where that of the rows is ``--learning-rate``."""
        factor = ADAM_FACTOR / self.model.projection_size if self.dense_optimizer == "adam" else 1.0
        return self.optimizer.dense_rate or factor * self.optimizer.learning_rate

    @property
    def dense_average(self) -> float:
        """The fraction of the steps over which the dense parameters are averaged; 0 if they are not."""
        given = self.optimizer.dense_average
        return given if given >= 0 else 0.0 if self.training.dense == "ps" else DENSE_AVERAGE


def parse_train(argv: Sequence[str]) -> Config:
    """Parse the options of ``bin/train``."""
    config = parse(
        Config, argv, prog="bin/train",
        description="Train a sparse ELMo on the shards that bin/preprocess makes: mpirun -n RANKS bin/train. The "
        "options below can also be given in a TOML file (--config), with one table per group of options. Large "
        "integers may be written as 1_000_000, and on the command line as 1e6 or 1M (K, M and G for thousands, "
        "millions and billions).",
    )
    refuse_parts_of_a_plan(config)
    _refuse_samples_that_vary(config)
    # Not for the configs of models: a run that resumes needs no --init-from any more, and was once taken without.
    if config.initial.init_accumulators == "kept" and not config.initial.init_from:
        raise ConfigError("--init-accumulators kept needs a model that has them: give --init-from")
    return config


def _refuse_samples_that_vary(config: Config) -> None:
    """Refuse --sync with samples that depend on where rows are; not for the configs of models, which may have both.

    Raises:
        ConfigError: The message names the options.
    """
    is_local = config.softmax.sampling_scheme == "local" and config.server.ps == "embedded"
    if config.training.sync and is_local and config.server.technique_for(True) != "static":
        raise ConfigError(
            "--sync needs samples that repeat, but --sampling-scheme local draws from the rows that are on a node, and "
            "when rows move varies from run to run: give another scheme, or --technique static"
        )


def from_tables(tables: dict) -> Config:
    """Return the Config saved as nested plain values by :func:`lapse_elmo.config.cli.as_tables`.

    Raises:
        ConfigError: An option is unknown, of the wrong type or out of range.
    """
    made = {}
    for name, group in typing.get_type_hints(Config).items():
        known = {option.name: (hint, option.metadata["choices"]) for _, option, hint in options_of(group)}
        values = tables.get(name, {})
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}")
        made[name] = group(**{key: convert(value, known[key][0], key, known[key][1]) for key, value in values.items()})
    return Config(**made)
