"""The options of ``bin/train``: one documented dataclass a group, checked when it is made.

Defaults follow the sources named in the README; where they differ, benchmarks/learning.md has the measurement.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapse_elmo.config.checks import fraction, positive, require
from lapse_elmo.config.cli import checked, option, options_of, parse
from lapse_elmo.config.initial import InitialConfig
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
    """Corpus: where shards and vocabulary are and how sentences are cut"""

    shards: str = option(DEFAULT_SHARDS, metavar="DIR", help="folder with the training and held-out shards")
    vocab: str = option(DEFAULT_VOCAB, metavar="FILE", help="vocabulary that the shards were made with")
    heldout: str = option("", metavar="DIR", help="held-out shards of another folder than --shards (a test set)")
    max_length: int = option(400, metavar="N", help="tokens of a sentence that are used; longer ones are cut")
    boundaries: bool = option(True, help="put <S> and </S> around each sentence and predict them")

    def __post_init__(self) -> None:
        positive(self, "max_length")


@dataclass(frozen=True)
class ModelConfig:
    """Model: sizes and regularisation of the bidirectional LSTM"""

    preset: str = option(
        "", choices=("", *PRESETS), metavar="NAME",
        help="small (D 128, C 512, L 2) or original (D 512, C 4096, L 2); sizes given beside it win",
    )
    projection_size: int = option(0, metavar="D", help="size of embedding and LSTM output (0: the preset's, 128)")
    cell_size: int = option(0, metavar="C", help="size of the LSTM's memory cell (0: the preset's, 512)")
    num_layers: int = option(0, metavar="L", help="LSTM layers in each direction (0: the preset's, 2)")
    dropout: float = option(0.1, metavar="P", help="dropout on the embeddings and on the predicting vectors")
    recurrent_dropout: float = option(0.0, metavar="P", help="dropout on the LSTM's output, one mask a sentence")
    cell_clip: float = option(3.0, metavar="X", help="bound on the memory cell's values")
    projection_clip: float = option(3.0, metavar="X", help="bound on the LSTM output's values")
    context: str = option(
        "top", choices=("top", "mix"), help="what predicts: the top layer (ELMo) or a scalar mix of all (lapse-elmo)"
    )
    lstm: str = option(
        "fused", choices=("fused", "allennlp"), help="our packed LSTM or AllenNLP's ElmoLstm: the same numbers"
    )
    precision: str = option(
        "fp32", choices=("fp32", "bf16"),
        help="of training's matrix products; bf16 keeps cells, sums and parameters in float32",
    )
    lstm_init: str = option(
        "glorot", choices=("glorot", "orthogonal"), help="initial LSTM kernels: bilm-tf's or AllenNLP's"
    )

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset or "small"].items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        positive(self, "projection_size", "cell_size", "num_layers", "cell_clip", "projection_clip")
        fraction(self, "dropout", "recurrent_dropout")
        require(self.num_layers <= 100, "num_layers", self.num_layers, "at most 100")
        if self.precision == "bf16" and self.lstm != "fused":
            raise ConfigError("--precision bf16 needs --lstm fused: AllenNLP's LSTM computes in float32")


@dataclass(frozen=True)
class SoftmaxConfig:
    """Softmax: negative samples of the training loss (evaluation uses the full softmax)"""

    num_samples: int = option(8192, metavar="S", help="negative samples a step, shared by the batch")
    replacement: bool = option(False, help="draw the samples with replacement")
    distribution: str = option(
        "log-uniform", choices=("log-uniform", "uniform"), help="what the samples are drawn from"
    )
    sampling_scheme: str = option(
        "preloc", choices=("naive", "preloc", "pool", "local"),
        help="when the server draws them, and how often it uses a draw (lapse_elmo/ps/sampling.py)",
    )
    share_samples: str = option(
        "node", choices=("node", "job", "none"),
        help="which ranks draw the same samples in a step: those of a node (it then touches the rows of one sample "
        "instead of one per rank), all, or none",
    )
    num_tries: float = option(
        0.0, metavar="N", help="draws behind the samples' expected counts, without replacement (0: computed)"
    )

    def __post_init__(self) -> None:
        positive(self, "num_samples")
        require(self.num_tries >= 0, "num_tries", self.num_tries, "0 or more")
        if self.replacement and self.num_tries:
            raise ConfigError("--num-tries is for sampling without replacement; leave it out or give --no-replacement")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: how a step changes the parameters"""

    optimizer: str = option("adagrad", choices=("adagrad", "sgd"), help="update rule of rows and dense parameters")
    learning_rate: float = option(0.2, metavar="X", help="learning rate")
    initial_accumulator: float = option(1.0, metavar="X", help="Adagrad's accumulators at the start")
    row_accumulators: str = option(
        "element", choices=("element", "row"),
        help="Adagrad's accumulators of embedding and softmax rows: one for each element, or one for the row, which "
        "sums the mean squares of its gradients",
    )
    epsilon: float = option(1e-7, metavar="X", help="added to the root of Adagrad's accumulators")
    clip_norm: float = option(10.0, metavar="X", help="bound on the global gradient norm (0: none)")
    loss_scale: float = option(50.0, metavar="X", help="factor on the mean loss whose gradient is taken")
    row_scale: float = option(
        2.0, metavar="X",
        help="factor on the summed loss whose gradient Adagrad's rows take, whatever the batch: a rare word's step "
        "does not shrink as batches grow (0: that of the mean loss, times --loss-scale, as dense parameters)",
    )
    warmup_tokens: int = option(
        0, metavar="N", help="tokens over which the learning rate rises from 0, linearly (0: it starts at full height)"
    )
    schedule: str = option(
        "constant", choices=("constant", "linear", "cosine", "inverse-sqrt"),
        help="what the learning rate does after the warm-up: stay, fall to --final-rate in a line or half a cosine, or "
        "fall as 1 / sqrt(1 + tokens / --decay-tokens)",
    )
    decay_tokens: int = option(
        0, metavar="N",
        help="tokens after the warm-up over which it falls (0: the rest of the run, for linear and cosine; the tokens "
        "of the warm-up, for inverse-sqrt)",
    )
    final_rate: float = option(
        0.0, metavar="X", help="share of the learning rate that linear and cosine end at, and inverse-sqrt never leaves"
    )

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "loss_scale", "epsilon")
        for name in ("warmup_tokens", "decay_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.row_scale >= 0, "row_scale", self.row_scale, "0 or more")
        require(0 <= self.final_rate <= 1, "final_rate", self.final_rate, "a share from 0 to 1")
        if self.schedule == "constant" and (self.decay_tokens or self.final_rate):
            raise ConfigError(
                "--decay-tokens and --final-rate are of a falling learning rate: give --schedule linear, cosine or "
                "inverse-sqrt with them"
            )
        if self.schedule == "inverse-sqrt" and not (self.decay_tokens or self.warmup_tokens):
            raise ConfigError("--schedule inverse-sqrt needs the tokens that it falls over: --decay-tokens N")
        require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "0 or more")
        require(self.initial_accumulator >= 0, "initial_accumulator", self.initial_accumulator, "0 or more")


@dataclass(frozen=True)
class TrainingConfig:
    """Training: how long, how much at once, from which seed"""

    epochs: int = option(2, metavar="N", help="passes over the training shards")
    max_steps: int = option(0, metavar="N", help="end after this many steps (0: when the epochs are done)")
    max_minutes: float = option(0.0, metavar="N", help="end after this much training time (0: no limit)")
    evaluate_every: int = option(
        0, metavar="N",
        help="measure held-out perplexity, and save, after every N steps too (0: only at the end of epochs)",
    )
    patience: int = option(
        0, metavar="N", help="end after N evaluations in a row without a better held-out perplexity (0: never)"
    )
    batch_size: int = option(32, metavar="B", help="sentences per step and rank, at most")
    first_batch: int = option(
        8, metavar="N",
        help="sentences of the first step, of all ranks together, which share them equally (0: --batch-size per rank "
        "at every step)",
    )
    growth_tokens: int = option(
        75_000, metavar="N",
        help="tokens in which the global batch grows by --first-batch, up to --batch-size per rank (0: it stays)",
    )
    accumulate: int = option(
        1, metavar="K",
        help="parts that a rank computes in turn before each update, as K ranks would: few ranks train with the batch "
        "of many",
    )
    lookahead: int = option(1, metavar="N", help="clocks by which a batch's intent and samples go ahead of its step")
    seed: int = option(1, metavar="N", help="seed of every random stream")
    sync: bool = option(False, help="order the ranks' pushes, so that equal seeds and ranks give equal bits")
    dense: str = option(
        "allreduce", choices=("allreduce", "ps"),
        help="LSTM parameters: equal on all ranks by summed gradients, or kept in the server as rows",
    )

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "accumulate")
        for name, most in (("epochs", 1_000_000), ("accumulate", 100_000), ("lookahead", 10_000)):
            require(getattr(self, name) <= most, name, getattr(self, name), f"at most {most:,}")
        for name in (
            "max_steps", "max_minutes", "evaluate_every", "patience", "lookahead", "seed", "first_batch",
            "growth_tokens",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        if self.sync and self.dense == "ps":
            raise ConfigError("--sync orders sparse pushes only; it needs --dense allreduce")
        if self.accumulate > 1 and self.dense == "ps":
            raise ConfigError("--accumulate sums dense gradients before an update; it needs --dense allreduce")


@dataclass(frozen=True)
class ServerConfig:
    """Server: which parameter server keeps the rows, and where"""

    ps: str = option(
        "embedded", choices=("embedded", "lapse", "adapm"),
        help="our own engine, or the installed package lapse or adapm with a node a rank",
    )
    technique: str = option(
        "", choices=("", "adaptive", "relocation", "replication", "static"), metavar="NAME",
        help="what an intent does to a row: moves it, copies it, either as need be, or nothing (static) (default: "
        "adaptive; relocation with --sync and with --ps lapse)",
    )
    staleness: int = option(4, metavar="N", help="clocks by which a replica may lag behind; from 2 on")
    nodes: int = option(
        0, metavar="N", help="split the ranks of each machine into N nodes, to try several nodes on one machine"
    )

    def __post_init__(self) -> None:
        require(self.staleness >= 2, "staleness", self.staleness, "2 or more")
        require(self.nodes >= 0, "nodes", self.nodes, "0 or more")
        if self.nodes > 1 and self.ps != "embedded":
            raise ConfigError(f"--nodes is for the embedded server; with --ps {self.ps} each rank is a node anyway")

    def technique_for(self, sync: bool) -> str:
        """The technique asked for, or the best that keeps the run's promises."""
        return self.technique or ("relocation" if sync or self.ps == "lapse" else "adaptive")


@dataclass(frozen=True)
class DeviceConfig:
    """Devices: where the ranks compute"""

    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")
    device_ids: tuple[int, ...] = option((), metavar="ID", help="GPUs to share among a node's ranks (default: all)")
    threads: int = option(0, metavar="N", help="CPU threads a rank (0: the node's usable cores / its ranks)")

    def __post_init__(self) -> None:
        require(self.threads >= 0, "threads", self.threads, "0 or more")
        require(all(i >= 0 for i in self.device_ids), "device_ids", self.device_ids, "numbers from 0 on")
        if self.device_ids and self.device == "cpu":
            raise ConfigError("--device-ids names GPUs but --device is cpu; give one of the two")


@dataclass(frozen=True)
class RunConfig:
    """Run: what is written where, and when"""

    run_dir: str = option("", metavar="DIR", help="folder for config, metrics and models (default: runs/DATE-TIME)")
    resume: str = option(
        "auto", metavar="WHAT",
        help="auto goes on with a run that is in --run-dir already, never refuses to; or the checkpoint or run to "
        "go on from",
    )
    overwrite: bool = option(False, help="replace a run that is already in --run-dir instead of going on with it")
    save_every_steps: int = option(0, metavar="N", help="save a checkpoint every N steps (0: not by steps)")
    save_every_minutes: float = option(10.0, metavar="N", help="save when so many minutes have passed (0: not by time)")
    keep_checkpoints: int = option(2, metavar="N", help="newest checkpoints that stay, in addition to the best one")
    save_at_tokens: tuple[int, ...] = option(
        (), metavar="N", help="save a checkpoint, which stays, once so many tokens are trained, for learning curves"
    )
    stall_minutes: float = option(
        20.0, metavar="N",
        help="end the job with status 76 once no rank has made progress for so long, saying which rank is silent and "
        "where the others wait (0: wait for ever)",
    )
    dry_run: bool = option(False, help="show roles, shards, memory and steps, and start nothing")
    report_every: int = option(20, metavar="N", help="steps between two lines of metrics")
    profile: int = option(
        0, metavar="N",
        help="profile N steps, after the first 3: tables and traces for a browser in the run's folder (0: none)",
    )
    progress: str = option(
        "auto", choices=("auto", "bar", "lines", "none"), help="progress bar, plain lines or nothing"
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

    def __post_init__(self) -> None:
        if self.softmax.distribution == "uniform" and self.softmax.num_tries:
            raise ConfigError("--num-tries is for the log-uniform distribution; leave one of the two out")
        if self.training.sync and self.server.technique in ("adaptive", "replication"):
            raise ConfigError(
                "--sync needs rows with one copy, since when replicas learn of a push depends on timing; with "
                f"--technique {self.server.technique} rows have replicas: give relocation or static"
            )
        if self.training.sync and self.server.ps == "adapm":
            raise ConfigError("--sync needs rows with one copy, and --ps adapm makes replicas: leave one away")


def parse_train(argv: Sequence[str]) -> Config:
    """The options of ``bin/train``."""
    return parse(
        Config, argv, prog="bin/train",
        description="Train a sparse ELMo on integer shards: mpirun -n RANKS bin/train. The options below can also come "
        "from a TOML file with a table a group.",
    )


def from_tables(tables: dict) -> Config:
    """The Config saved as nested plain values (:func:`lapse_elmo.config.cli.as_tables`)."""
    made = {}
    for name, group in typing.get_type_hints(Config).items():
        known = {option.name: (hint, option.metadata["choices"]) for _, option, hint in options_of(group)}
        values = tables.get(name, {})
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}")
        made[name] = group(**{key: checked(value, known[key][0], key, known[key][1]) for key, value in values.items()})
    return Config(**made)
