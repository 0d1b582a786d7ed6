"""``bin/report``: a picture of a run: what it learnt, where rows lived, and how many accesses were local."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapse_elmo.config.using import parse_report
from lapse_elmo.errors import ConfigError, OutputError
from lapse_elmo.metrics.run_log import METRICS
from lapse_elmo.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SEGMENTS = ("embedding", "softmax")
_COLOURS = {"embedding": "tab:blue", "softmax": "tab:orange", "dense": "tab:green"}

Records = list[dict[str, Any]]


def main(argv: list[str], enter: Callable[[], World]) -> None:
    """Parse, read the metrics, draw. A program of one process, without MPI."""
    options = parse_report(argv)
    path = Path(options.output or Path(options.run) / "report.png")
    records = read_metrics(Path(options.run))
    figure = draw(records, options.run)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".report-") as folder:
            made = Path(folder) / path.name
            figure.savefig(made)
            os.replace(made, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; name another by --output") from None
    print(path)


def read_metrics(run_dir: Path) -> Records:
    """The lines of a run's metrics.jsonl.

    :raises ConfigError: if there are none, or the file is not such a one.
    """
    path = run_dir / METRICS
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the folder of a run of bin/train") from None
    except ValueError:
        raise ConfigError(f"{path} is not the metrics of a run: a line is not JSON") from None
    if not any(isinstance(record, dict) and record.get("kind") == "train" for record in records):
        raise ConfigError(f"{path} holds no reports yet: the run has not come to --report-every steps")
    return records


def draw(records: Records, title: str) -> Figure:
    """Eight panels: what was learnt, local share, waiting, traffic, rows by node and by frequency, batch, rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((14, 16), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(4, 2)
    train = [record for record in records if record["kind"] == "train"]
    placed = [record for record in records if record["kind"] == "placement"]
    _draw_loss(axes[0, 0], train, [record for record in records if record["kind"] == "epoch"])
    _draw_local_share(axes[0, 1], train)
    _draw_waiting(axes[1, 0], train)
    _draw_traffic(axes[1, 1], train)
    _draw_owners(axes[2, 0], placed)
    _draw_bands(figure, axes[2, 1], placed)
    _draw_batch(axes[3, 0], train)
    _draw_rate(axes[3, 1], train)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric; values that are not finite are left out."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _segments(records: Records) -> list[str]:
    return [name for name in _COLOURS if any(f"server/{name}_local_share" in record for record in records)]


def _draw_loss(axis: Axes, train: Records, epochs: Records) -> None:
    axis.plot(*_series(train, "train/loss_nats"), color="black", label="training loss")
    steps, perplexities = _series(epochs, "heldout/mean_perplexity")
    axis.plot(steps, np.log(perplexities), "o", color="tab:red", label="held-out")
    axis.set_ylabel("loss (nats)")
    axis.legend(loc="upper right")
    speed = axis.twinx()
    speed.plot(*_series(train, "train/tokens_per_s"), color="0.7")
    speed.set_ylabel("tokens/s (grey)")
    speed.set_ylim(bottom=0)
    axis.set_title("What was learnt, and how fast")


def _draw_batch(axis: Axes, train: Records) -> None:
    axis.plot(*_series(train, "train/global_batch_tokens"), color="black", label="global batch")
    axis.plot(*_series(train, "train/noise_scale_tokens"), ".", color="tab:red", label="gradient noise scale")
    axis.set_yscale("log")
    axis.set_ylabel("tokens")
    axis.legend(loc="lower right")
    axis.set_title("The batch of all ranks, and the batch that the gradient noise would bear")


def _draw_rate(axis: Axes, train: Records) -> None:
    axis.plot(*_series(train, "train/learning_rate"), color="black", label="learning rate")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate")
    norms = axis.twinx()
    norms.plot(*_series(train, "train/gradient_norm"), color="0.7")
    norms.set_yscale("log")
    norms.set_ylabel("gradient norm before clipping (grey)")
    axis.set_title("How far a step goes")


def _draw_local_share(axis: Axes, train: Records) -> None:
    lowest = 1.0
    for name in _segments(train):
        steps, shares = _series(train, f"server/{name}_local_share")
        lowest = min([lowest, *shares])
        axis.plot(steps, [100 * share for share in shares], color=_COLOURS[name], label=name)
    axis.set_ylim(100 * lowest - 3, 101)
    axis.set_ylabel("%")
    axis.legend(loc="lower right")
    axis.set_title("Rows pulled and pushed that were on the worker's node")


def _draw_waiting(axis: Axes, train: Records) -> None:
    names = ["pull", "compute", "agree", "push", "save"]
    phases = [(name, *_series(train, f"step/{name}_s")) for name in names]
    shown = [(name, values) for name, steps, values in phases if len(values) == len(train)]
    axis.stackplot([record["step"] for record in train], [values for _, values in shown], labels=[n for n, _ in shown])
    axis.set_ylabel("seconds a step (rank 0)")
    axis.legend(loc="upper right")
    axis.set_title("Where the time went")


def _draw_traffic(axis: Axes, train: Records) -> None:
    for name in _segments(train):
        for what, line in (("relocated", "-"), ("replicated", "--"), ("synchronised", ":")):
            steps, rows = _series(train, f"server/{name}_{what}_rows")
            axis.plot(steps, rows, line, color=_COLOURS[name], label=f"{name}, {what}")
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("rows a step, all nodes")
    axis.legend(loc="upper right", fontsize="small")
    axis.set_title("Rows that moved, were copied, and were kept alike")


def _draw_owners(axis: Axes, placed: Records) -> None:
    steps = [record["step"] for record in placed]
    totals = {
        kind: np.array([sum(np.sum(record[n][kind], 1) for n in _SEGMENTS) for record in placed])
        for kind in ("main", "replicas")
    }
    if not placed:
        axis.text(0.5, 0.5, "one node, or a server that does not tell", ha="center", transform=axis.transAxes)
    for node in range(totals["main"].shape[1] if placed else 0):
        colour = f"C{node % 10}"
        axis.plot(steps, totals["main"][:, node], color=colour, label=f"node {node}")
        axis.plot(steps, totals["replicas"][:, node], ":", color=colour)
    if placed:
        axis.set_ylim(bottom=0)
        axis.legend(loc="center right")
    axis.set_ylabel("rows")
    axis.set_title("Rows on each node: main copies (lines) and replicas (dotted)")


def _draw_bands(figure: Figure, axis: Axes, placed: Records) -> None:
    """Replicas of a softmax row, on average, by how frequent its word is."""
    axis.set_title("Replicas a softmax row, by the word's place in the vocabulary")
    axis.set_ylabel("row (most frequent words first)")
    if not placed:
        return
    ends = np.array(placed[0]["softmax"]["ends"])
    sizes = np.diff(ends, prepend=0)
    copies = np.array([np.sum(record["softmax"]["replicas"], 0) for record in placed]) / sizes
    steps = [record["step"] for record in placed]
    edges = [0, *steps] if len(steps) > 1 else [0, steps[0]]
    image = axis.pcolormesh(edges, [0.5, *ends], copies.T, cmap="viridis", vmin=0)
    axis.set_yscale("log")
    figure.colorbar(image, ax=axis, label="replicas")
