"""Define the options of the programs that read a trained model or a run, such as evaluate, export and embed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.checks import positive, require
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DeviceConfig
from lapse_elmo.errors import ConfigError

LAYERS = ("all", "top", "average")
_MODEL_HELP = (
    "a run, one of its checkpoints, or a directory in bilm-tf's or Hugging Face's format, such as bin/export writes"
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of all programs that read a model and write an output."""

    model: str = option(positional=True, metavar="MODEL", help=_MODEL_HELP)
    vocab: str = option("", metavar="FILE", help="vocabulary file (default: the model's)")
    overwrite: bool = option(False, help="replace --output if it exists")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(ModelOptions):
    """The options of the programs that compute with a model."""

    batch_size: int = option(64, metavar="B", help="sentences per batch and rank")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one, else the CPU")
    device_ids: tuple[int, ...] = option(
        (), metavar="ID", help="numbers of the GPUs that the ranks of a node share (default: all)"
    )
    threads: int = option(0, metavar="N", help="CPU threads per rank (0: the node's usable cores / its ranks)")

    def __post_init__(self) -> None:
        positive(self, "batch_size")
        _ = self.devices  # DeviceConfig checks these options

    @property
    def devices(self) -> DeviceConfig:
        """The device options as a DeviceConfig."""
        return DeviceConfig(device=self.device, device_ids=self.device_ids, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ComputeOptions):
    """The options of ``bin/evaluate``."""

    model: str = option(positional=True, metavar="MODEL", help="a run or one of its checkpoints")
    shards: str = option(
        "", metavar="DIR",
        help="directory of the shards to evaluate on (default: those of the run; for held-out text, its --heldout)",
    )
    split: str = option("heldout", choices=("heldout", "train"), help="which of these shards")
    output: str = option("", metavar="FILE", help="also write the result to this JSON file")


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """Parse the options of ``bin/evaluate``."""
    return parse(
        EvaluateConfig, argv, prog="bin/evaluate",
        description="Compute the held-out perplexity of a model with the full softmax: mpirun -n RANKS bin/evaluate "
        "RUN.",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """The options of ``bin/export``."""

    output: str = option(
        metavar="PATH",
        help="directory to create; with --format word2vec, file to write, binary if its name ends in .bin, else text",
    )
    format: str = option(
        "elmo", choices=("elmo", "word2vec", "huggingface"),
        help="elmo: the files of bilm-tf; word2vec: the word vectors alone, for gensim and spaCy; huggingface: a "
        "directory for transformers and sentence-transformers",
    )


def parse_export(argv: Sequence[str]) -> ExportConfig:
    """Parse the options of ``bin/export``."""
    return parse(
        ExportConfig, argv, prog="bin/export",
        description="Write a model in the file format of other programs: bin/export RUN --output PATH "
        "[--format FORMAT].",
    )


@dataclass(frozen=True, kw_only=True)
class TextOptions(ComputeOptions):
    """The options of the programs that send text through a model."""

    texts: tuple[str, ...] = option(
        positional=True, metavar="TEXT",
        help="text files of one tokenised sentence per line, plain or compressed by gzip, zstd, xz or bzip2; or glob "
        "patterns, or directories",
    )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(TextOptions):
    """The options of ``bin/embed``."""

    output: str = option(
        metavar="FILE", help="HDF5 file to write; dataset i has the vectors of line i of the text, from 0"
    )
    layers: str = option(
        "all", choices=LAYERS,
        help="which layers, and the shape of a line's dataset: all: (L + 1, T, 2D), the word vectors first; top or "
        "average: (T, 2D), where T is the number of words",
    )
    pool: str = option(
        "none", choices=("none", "mean"),
        help="mean: one vector per line, the mean over its words, in one dataset 'means' (lines, 2D)",
    )
    words: str = option(
        "", metavar="FILE",
        help="write only the vectors of the words in FILE, one per line; --output is then a NumPy archive (.npz) with "
        "one array per word",
    )
    precision: str = option(
        "fp32", choices=("fp32", "bf16"),
        help="precision of the LSTM's matrix products: bf16 is faster on processors and GPUs with bfloat16, and "
        "changes vectors by 0.1 to 1 %",
    )
    sentence_to_index: bool = option(
        False,
        help="add the dataset sentence_to_index, which AllenNLP's readers use; takes as much memory as the text",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words and (self.pool != "none" or self.sentence_to_index):
            raise ConfigError("--words writes one array per word: drop --pool and --sentence-to-index")
        if self.words and not self.output.endswith(".npz"):
            raise ConfigError(f"--output is {self.output}, expected a name ending in .npz: --words writes an archive")
        if self.output.endswith(".npz") and not self.words:
            raise ConfigError(f"--output is {self.output}, but only --words writes an archive: give a name in .hdf5")
        if self.pool != "none" and self.sentence_to_index:
            raise ConfigError("--sentence-to-index needs a dataset per line, which --pool mean omits; drop one")


def parse_embed(argv: Sequence[str]) -> EmbedConfig:
    """Parse the options of ``bin/embed``."""
    return parse(
        EmbedConfig, argv, prog="bin/embed",
        description="Compute context vectors of the words of a text: mpirun -n RANKS bin/embed RUN TEXT... "
        "--output FILE.hdf5.",
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TextOptions):
    """The options of ``bin/score``."""

    output: str = option(
        "", metavar="FILE", help="tab-separated table to write, one line per word (default: print only totals)"
    )
    totals: str = option("", metavar="FILE", help="also write the totals to this JSON file")


def parse_score(argv: Sequence[str]) -> ScoreConfig:
    """Parse the options of ``bin/score``."""
    return parse(
        ScoreConfig, argv, prog="bin/score",
        description="Compute the surprisal of each word of a text in both directions, its perplexity, its fraction of "
        "unknown words and its bits per character: mpirun -n RANKS bin/score RUN TEXT... --output FILE.tsv. Use bits "
        "per character to compare models with different vocabularies: they include the cost of spelling each unknown "
        "word, which is log2(A + 1) bits per character and for the end of the word, for a text of A distinct "
        "characters.",
    )


@dataclass(frozen=True, kw_only=True)
class NearestConfig:
    """The options of ``bin/nearest``."""

    model: str = option(positional=True, metavar="MODEL", help=_MODEL_HELP)
    words: tuple[str, ...] = option(positional=True, metavar="WORD", help="words of the vocabulary")
    vocab: str = option("", metavar="FILE", help="vocabulary file (default: the model's)")
    count: int = option(10, metavar="N", help="number of neighbours per word")
    table: str = option(
        "embedding", choices=("embedding", "softmax"),
        help="vectors to compare: embedding: those of input words; softmax: those of predicted words",
    )

    def __post_init__(self) -> None:
        positive(self, "count")


def parse_nearest(argv: Sequence[str]) -> NearestConfig:
    """Parse the options of ``bin/nearest``."""
    return parse(
        NearestConfig, argv, prog="bin/nearest",
        description="Print the words with the most similar vectors by cosine: bin/nearest RUN WORD...",
    )


@dataclass(frozen=True)
class ReportConfig:
    """The options of ``bin/report``."""

    runs: tuple[str, ...] = option(
        positional=True, metavar="RUN", help="directories of runs, which are shown on one page"
    )
    output: str = option("", metavar="FILE", help="HTML file to write (default: report.html in the first RUN)")

    def __post_init__(self) -> None:
        suffix = Path(self.output or "report.html").suffix
        require(suffix in (".html", ".htm"), "output", self.output, "a name that ends in .html")


def parse_report(argv: Sequence[str]) -> ReportConfig:
    """Parse the options of ``bin/report``."""
    return parse(
        ReportConfig, argv, prog="bin/report",
        description="Make an HTML page of the learning curves, speed and options of runs, from their metrics.jsonl.",
    )
