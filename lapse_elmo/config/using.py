"""The options of the programs that use what a run has left: evaluate, export, embed, score, nearest and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.checks import positive, require
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DeviceConfig
from lapse_elmo.errors import ConfigError

LAYERS = ("all", "top", "average")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which saved model, and what may be replaced."""

    model: str = option(
        positional=True, metavar="MODEL", help="a run's folder, one of its checkpoints, or (not to evaluate) an export"
    )
    vocab: str = option("", metavar="FILE", help="vocabulary (default: the model's)")
    overwrite: bool = option(False, help="replace --output if it exists")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(ModelOptions):
    """What programs need that compute with a saved model."""

    batch_size: int = option(64, metavar="B", help="sentences at once and rank")
    device: str = option("auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")
    device_ids: tuple[int, ...] = option((), metavar="ID", help="GPUs to share among a node's ranks (default: all)")
    threads: int = option(0, metavar="N", help="CPU threads a rank (0: the node's usable cores / its ranks)")

    def __post_init__(self) -> None:
        positive(self, "batch_size")
        _ = self.devices  # which has checks of its own

    @property
    def devices(self) -> DeviceConfig:
        return DeviceConfig(device=self.device, device_ids=self.device_ids, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ComputeOptions):
    """All options of an evaluation."""

    shards: str = option("", metavar="DIR", help="shards to evaluate on (default: the run's held-out shards)")
    split: str = option("heldout", choices=("heldout", "train"), help="which shards of the folder")
    output: str = option("", metavar="FILE", help="write the result there too, as JSON")


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """The options of ``bin/evaluate``."""
    return parse(
        EvaluateConfig, argv, prog="bin/evaluate",
        description="Held-out perplexity of a saved model by full softmax: mpirun -n RANKS bin/evaluate RUN.",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """All options of an export."""

    output: str = option(
        metavar="PATH", help="folder to make; of word2vec the file, binary if it ends in .bin and else text"
    )
    format: str = option(
        "elmo", choices=("elmo", "word2vec", "huggingface"),
        help="elmo: bilm-tf's files; word2vec: the word vectors alone, for gensim and spaCy; huggingface: a folder for "
        "transformers and sentence-transformers",
    )


def parse_export(argv: Sequence[str]) -> ExportConfig:
    """The options of ``bin/export``."""
    return parse(
        ExportConfig, argv, prog="bin/export",
        description="Write a saved model in the files of other programs: bin/export RUN --output PATH "
        "[--format FORMAT].",
    )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ComputeOptions):
    """All options of embedding text."""

    texts: tuple[str, ...] = option(
        positional=True, metavar="TEXT",
        help="files, folders or globs, one tokenised sentence a line; plain or in gzip, zstd, xz or bzip2",
    )
    output: str = option(metavar="FILE", help="HDF5 file to write: line i of all the text as dataset i, from 0 on")
    layers: str = option(
        "all", choices=LAYERS, help="all: (L + 1, T, 2D), the word vectors first; top or average: (T, 2D)"
    )
    pool: str = option(
        "none", choices=("none", "mean"), help="mean: one vector a line, all in the dataset 'means' (N, 2D)"
    )
    words: str = option(
        "", metavar="FILE", help="only the words in FILE, one a line: --output is then a NumPy archive (.npz) by word"
    )
    sentence_to_index: bool = option(
        False, help="add the dataset that AllenNLP's readers use; it is made in memory, as large as the text"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words and (self.pool != "none" or self.sentence_to_index):
            raise ConfigError("--words writes vectors of words by word: drop --pool and --sentence-to-index")
        if self.words and not self.output.endswith(".npz"):
            raise ConfigError(f"--words writes a NumPy archive: give an --output that ends in .npz, not {self.output}")
        if self.pool != "none" and self.sentence_to_index:
            raise ConfigError("--sentence-to-index names the datasets of lines, which --pool mean does not make")


def parse_embed(argv: Sequence[str]) -> EmbedConfig:
    """The options of ``bin/embed``."""
    return parse(
        EmbedConfig, argv, prog="bin/embed",
        description="Contextual vectors of text from a saved model: mpirun -n RANKS bin/embed RUN TEXT... "
        "--output FILE.hdf5.",
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ComputeOptions):
    """All options of scoring text."""

    texts: tuple[str, ...] = option(
        positional=True, metavar="TEXT",
        help="files, folders or globs, one tokenised sentence a line; plain or in gzip, zstd, xz or bzip2",
    )
    output: str = option("", metavar="FILE", help="table of words to write, tab-separated (default: totals alone)")
    totals: str = option("", metavar="FILE", help="write the totals there too, as JSON")


def parse_score(argv: Sequence[str]) -> ScoreConfig:
    """The options of ``bin/score``."""
    return parse(
        ScoreConfig, argv, prog="bin/score",
        description="Surprisal of every word of a text in both directions, perplexity, share of unknown words and bits "
        "per character: mpirun -n RANKS bin/score RUN TEXT... --output FILE.tsv.",
    )


@dataclass(frozen=True, kw_only=True)
class NearestConfig:
    """All options of looking for neighbours."""

    model: str = option(positional=True, metavar="MODEL", help="a run, a checkpoint or an exported folder")
    words: tuple[str, ...] = option(positional=True, metavar="WORD", help="words of the vocabulary")
    vocab: str = option("", metavar="FILE", help="vocabulary (default: the model's)")
    count: int = option(10, metavar="N", help="neighbours of each word")
    table: str = option("embedding", choices=("embedding", "softmax"), help="input words, or predicted ones")

    def __post_init__(self) -> None:
        positive(self, "count")


def parse_nearest(argv: Sequence[str]) -> NearestConfig:
    """The options of ``bin/nearest``."""
    return parse(
        NearestConfig, argv, prog="bin/nearest",
        description="The words whose vectors are nearest by cosine: bin/nearest RUN WORD...",
    )


@dataclass(frozen=True)
class ReportConfig:
    """All options of a report."""

    runs: tuple[str, ...] = option(positional=True, metavar="RUN", help="folders of runs; several share one page")
    output: str = option("", metavar="FILE", help="page to write, .html (default: report.html in the first RUN)")

    def __post_init__(self) -> None:
        suffix = Path(self.output or "report.html").suffix
        require(suffix in (".html", ".htm"), "output", self.output, "a name that ends in .html")


def parse_report(argv: Sequence[str]) -> ReportConfig:
    """The options of ``bin/report``."""
    return parse(
        ReportConfig, argv, prog="bin/report",
        description="One HTML page of what runs learnt, how fast, with which options, from their metrics.jsonl.",
    )
