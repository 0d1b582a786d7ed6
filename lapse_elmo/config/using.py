"""The options of the programs that use what a run has left: ``bin/evaluate``, ``export``, ``embed`` and ``report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapse_elmo.config.checks import positive, require
from lapse_elmo.config.cli import option, parse
from lapse_elmo.config.training import DeviceConfig

LAYERS = ("all", "top", "average")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which saved model, and what may be replaced."""

    model: str = option(positional=True, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or one of its checkpoints")
    vocab: str = option("", metavar="FILE", help="vocabulary (default: the run's)")
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

    output: str = option(metavar="DIR", help="folder to make, with options.json, weights.hdf5 and vocab.txt")


def parse_export(argv: Sequence[str]) -> ExportConfig:
    """The options of ``bin/export``."""
    return parse(
        ExportConfig, argv, prog="bin/export",
        description="Write a saved model in the files of bilm-tf, which AllenNLP and others read: "
        "bin/export RUN --output DIR.",
    )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ComputeOptions):
    """All options of embedding text."""

    texts: tuple[str, ...] = option(
        positional=True, metavar="TEXT", help="files, folders or globs; plain or gzip, one tokenised sentence a line"
    )
    output: str = option(metavar="FILE", help="HDF5 file to write: line i of all the text as dataset i, from 0 on")
    layers: str = option(
        "all", choices=LAYERS, help="all: (L + 1, T, 2D), the word vectors first; top or average: (T, 2D)"
    )


def parse_embed(argv: Sequence[str]) -> EmbedConfig:
    """The options of ``bin/embed``."""
    return parse(
        EmbedConfig, argv, prog="bin/embed",
        description="Contextual vectors of text from a saved model: mpirun -n RANKS bin/embed RUN TEXT... "
        "--output FILE.hdf5.",
    )


@dataclass(frozen=True)
class ReportConfig:
    """All options of a report."""

    run: str = option(positional=True, metavar="RUN", help="a run's folder")
    output: str = option("", metavar="FILE", help="picture to write, .png, .svg or .pdf (default: RUN/report.png)")

    def __post_init__(self) -> None:
        suffix = Path(self.output or "report.png").suffix
        require(suffix in (".png", ".svg", ".pdf"), "output", self.output, "a name that ends in .png, .svg or .pdf")


def parse_report(argv: Sequence[str]) -> ReportConfig:
    """The options of ``bin/report``."""
    return parse(
        ReportConfig, argv, prog="bin/report",
        description="Draw what a run learnt and where the parameter server's rows lived, from its metrics.jsonl.",
    )
