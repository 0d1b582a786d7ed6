"""The options of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from lapse_elmo.config.checks import positive, require
from lapse_elmo.config.cli import option
from lapse_elmo.errors import ConfigError

# Adam moves each weight by about its rate, so what a unit's sum moves by grows with its number of inputs.
ADAM_FACTOR = 1.28
DENSE_AVERAGE = 0.05


@dataclass(frozen=True)
class OptimizerConfig:
    """How a step updates the parameters."""

    optimizer: str = option("adagrad", choices=("adagrad", "sgd"), help="update rule of table rows")
    dense_optimizer: str = option(
        "", choices=("", "adam", "adagrad", "sgd"), metavar="NAME",
        help="update rule of the LSTM's parameters: adam, or that of --optimizer (default: adam; that of --optimizer "
        "with --optimizer sgd or --dense ps)",
    )
    learning_rate: float = option(0.2, metavar="X", help="learning rate, after the warm-up")
    dense_rate: float = option(
        0.0, metavar="X",
        help="learning rate of the LSTM's parameters after the warm-up (0: --learning-rate, but for adam "
        f"--learning-rate x {ADAM_FACTOR:g} / D, which is {0.2 * ADAM_FACTOR / 128:g} for small and "
        f"{0.2 * ADAM_FACTOR / 512:g} for original)",
    )
    dense_average: float = option(
        -1.0, metavar="X",
        help="evaluate, save and export the mean of the LSTM's parameters over the last fraction X of the steps, not "
        f"their last values (0: the last values; -1: {DENSE_AVERAGE:g}, or 0 with --dense ps)",
    )
    initial_accumulator: float = option(1.0, metavar="X", help="initial value of Adagrad's accumulators")
    row_accumulators: str = option(
        "element", choices=("element", "row"),
        help="Adagrad's accumulators of embedding and softmax rows: one per element, or one per row, which takes "
        "less memory and sums the mean squares of the row's gradients",
    )
    epsilon: float = option(
        1e-7, metavar="X", help="added to the square root of Adagrad's accumulators and of Adam's second moments"
    )
    clip_norm: float = option(
        10.0, metavar="X", help="maximum global norm of the gradient; larger gradients are scaled down (0: no limit)"
    )
    loss_scale: float = option(50.0, metavar="X", help="multiply the mean loss by X before taking its gradient")
    row_scale: float = option(
        2.0, metavar="X",
        help="with Adagrad, rows are updated by the gradient of the summed loss times X, so that the updates of rare "
        "words do not shrink as batches grow (0: by that of the mean loss times --loss-scale, as dense parameters are)",
    )
    warmup_tokens: int = option(
        0, metavar="N", help="tokens over which the learning rate rises linearly from 0 (0: no warm-up)"
    )
    schedule: str = option(
        "constant", choices=("constant", "linear", "cosine", "inverse-sqrt"),
        help="learning rate after the warm-up: constant, falling to --final-rate linearly or by half a cosine, or "
        "falling as 1 / sqrt(1 + tokens / --decay-tokens)",
    )
    decay_tokens: int = option(
        0, metavar="N",
        help="tokens after the warm-up over which the learning rate falls (0: linear and cosine take the rest of the "
        "run by --epochs and --max-steps, not by --max-minutes; inverse-sqrt takes --warmup-tokens)",
    )
    final_rate: float = option(
        0.0, metavar="X",
        help="fraction of --learning-rate, from 0 to 1, at which linear and cosine end, and below which inverse-sqrt "
        "does not fall"
    )

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "loss_scale", "epsilon")
        require(self.dense_rate >= 0, "dense_rate", self.dense_rate, "0 or more")
        average = self.dense_average
        require(average == -1 or 0 <= average <= 1, "dense_average", average, "a fraction from 0 to 1, or -1")
        for name in ("warmup_tokens", "decay_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.row_scale >= 0, "row_scale", self.row_scale, "0 or more")
        require(0 <= self.final_rate <= 1, "final_rate", self.final_rate, "a fraction from 0 to 1")
        if self.schedule == "constant" and (self.decay_tokens or self.final_rate):
            raise ConfigError(
                "--decay-tokens and --final-rate need a falling learning rate: give --schedule linear, cosine or "
                "inverse-sqrt too"
            )
        if self.schedule == "inverse-sqrt" and not (self.decay_tokens or self.warmup_tokens):
            raise ConfigError("--schedule inverse-sqrt needs a time scale: give --decay-tokens N or --warmup-tokens N")
        require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "0 or more")
        require(self.initial_accumulator >= 0, "initial_accumulator", self.initial_accumulator, "0 or more")

    @property
    def falls_over_run(self) -> bool:
        """Whether the learning rate falls until the end of the run, wherever that is."""
        return self.schedule in ("linear", "cosine") and not self.decay_tokens
