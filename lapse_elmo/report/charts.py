"""The charts of a report as SVG: metrics of all runs together, then phases and row placement of each run."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lapse_elmo.code_cache import own_folder, temporary_folder
from lapse_elmo.report.runs import PHASES, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SEGMENTS = ("embedding", "softmax")
_COLOURS = {"embedding": "tab:blue", "softmax": "tab:orange", "dense": "tab:green"}


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its title, its caption and the SVG element."""

    title: str
    text: str
    svg: str


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return all charts for which the runs have values."""
    tokens = all(run.by_tokens for run in runs)
    x_label = "tokens trained" if tokens else "step"
    if len(runs) == 1:  # its name is the page's title
        runs = [dataclasses.replace(runs[0], name="")]

    def curves(name: str, y_label: str, *, log: bool = False, zero: bool = False) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for number, run in enumerate(runs):
                axis.plot(*run.series(name, tokens=tokens), label=run.name or None, **_style(number))
            _finish(axis, x_label, y_label, log=log, zero=zero)

        return draw

    found = [
        _chart("Loss", "Mean nll per target: training (lines, sampled softmax) and held-out (dots, full softmax).",
               lambda axis: _draw_loss(axis, runs, tokens, x_label)),
        _chart("Held-out perplexity", "exp of the held-out loss, mean of both directions.",
               lambda axis: _draw_heldout(axis, runs, tokens, x_label)),
        _chart("Speed", "Tokens per second of all ranks.", curves("train/tokens_per_s", "tokens/s", zero=True)),
    ]
    optional = (
        ("train/learning_rate", "Learning rate", "Of the tables' rows, at each step.", "learning rate", False),
        ("train/dense_learning_rate", "Learning rate of the LSTM", "At each step.", "learning rate", False),
        ("train/global_batch_tokens", "Batch", "Tokens per step, over all ranks.", "tokens", True),
        ("train/noise_scale_tokens", "Noise scale", "Batch at which half of the gradient is noise.", "tokens", True),
        ("train/gradient_norm", "Gradient norm", "Mean per report, before clipping.", "norm", True),
    )
    for name, title, text, y_label, log in optional:
        if any(run.has(name) for run in runs):
            found.append(_chart(title, text, curves(name, y_label, log=log, zero=not log)))
    for run in runs:
        of_run = f" ({run.name})" if len(runs) > 1 else ""
        found.append(_chart(
            f"Time by phase{of_run}", "Seconds per step on rank 0.", functools.partial(_draw_phases, run=run)
        ))
        if run.num_nodes > 1:
            found += _server_charts(run, of_run)
    return found


def _server_charts(run: Run, of_run: str) -> list[Chart]:
    return [
        _chart(f"Local share{of_run}", "Share of pulled and pushed rows that were on the worker's node.",
               lambda axis: _draw_local_share(axis, run)),
        _chart(f"Traffic{of_run}", "Rows per step that were relocated, replicated and synchronised, over all nodes.",
               lambda axis: _draw_traffic(axis, run)),
        _chart(f"Rows on each node{of_run}", "Main copies (lines) and replicas (dotted).",
               lambda axis: _draw_owners(axis, run)),
        _chart(f"Replicas by frequency{of_run}", "Replicas per softmax row, by the word's rank in the vocabulary.",
               lambda axis: _draw_bands(axis, run)),
    ]


def _chart(title: str, text: str, draw: Callable[[Axes], None]) -> Chart:
    figure = figure_of(draw)
    output = io.BytesIO()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # text as <text>; reproducible ids
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    svg = output.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    # Remove width and height, so that the page's style sets the size; the viewBox keeps the aspect ratio.
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)  # ids must be unique in the page
    return Chart(title, text, svg.replace("<svg ", f'<svg role="img" aria-label="{_escaped(title)}" ', 1))


def figure_of(draw: Callable[[Axes], None]) -> Figure:
    """Return a figure with one chart."""
    if not os.path.isabs(os.path.expanduser("~")):  # as in some containers, where matplotlib cannot be imported then
        os.environ.setdefault("MPLCONFIGDIR", str(own_folder(temporary_folder())))
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    draw(figure.subplots())
    return figure


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _style(number: int) -> dict[str, Any]:
    """Return how the lines of a run look; colours alone would repeat after ten runs."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def _finish(axis: Axes, x_label: str, y_label: str, *, log: bool = False, zero: bool = False) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlim(left=0)
    if log:
        _log_scale(axis)
    elif zero:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def _log_scale(axis: Axes) -> None:
    """Make the y axis logarithmic, with few numbers on it; values of less than a factor of 2 keep a linear axis."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    low, high = axis.dataLim.intervaly
    if not low > 0 or high < 2 * low:
        return
    axis.set_yscale("log")
    decades = np.log10(high / low)
    labelled = (2, 3, 4, 5, 6, 8) if decades < 0.7 else (2, 3, 5) if decades < 1.5 else (3,) if decades < 3 else ()
    number = EngFormatter(sep="")

    def minor(value: float, position: int | None) -> str:
        digit = round(value / 10 ** np.floor(np.log10(value)))
        return number(value, position) if digit in labelled else ""

    axis.yaxis.set_major_formatter(number)
    axis.yaxis.set_minor_formatter(FuncFormatter(minor))


def _draw_loss(axis: Axes, runs: Sequence[Run], tokens: bool, x_label: str) -> None:
    for number, run in enumerate(runs):
        axis.plot(*run.series("train/loss_nats", tokens=tokens), label=run.name or None, **_style(number))
        positions, perplexities = run.series("heldout/mean_perplexity", of=run.epochs, tokens=tokens)
        axis.plot(positions, np.log(perplexities), **(_style(number) | {"marker": "o", "linestyle": ""}))
    _finish(axis, x_label, "loss (nats)")


def _draw_heldout(axis: Axes, runs: Sequence[Run], tokens: bool, x_label: str) -> None:
    for number, run in enumerate(runs):
        points = run.series("heldout/mean_perplexity", of=run.epochs, tokens=tokens)
        axis.plot(*points, marker="o", label=run.name or None, **_style(number))
    _finish(axis, x_label, "perplexity", log=True)


def _draw_phases(axis: Axes, run: Run) -> None:
    phases = [(name, run.series(f"step/{name}_s")[1]) for name in PHASES]
    shown = [(name, values) for name, values in phases if len(values) == len(run.train)]
    steps = [record["step"] for record in run.train]
    axis.stackplot(steps, [values for _, values in shown], labels=[name for name, _ in shown])
    _finish(axis, "step", "seconds", zero=True)


def _draw_local_share(axis: Axes, run: Run) -> None:
    for name, colour in _COLOURS.items():
        steps, shares = run.series(f"server/{name}_local_share")
        axis.plot(steps, [100 * share for share in shares], color=colour, label=name if shares else None)
    _finish(axis, "step", "%")


def _draw_traffic(axis: Axes, run: Run) -> None:
    for name, colour in _COLOURS.items():
        for what, line in (("relocated", "-"), ("replicated", "--"), ("synchronised", ":")):
            steps, rows = run.series(f"server/{name}_{what}_rows")
            axis.plot(steps, rows, line, color=colour, label=f"{name}, {what}" if rows else None)
    axis.set_yscale("symlog", linthresh=10)
    _finish(axis, "step", "rows per step", zero=True)


def _draw_owners(axis: Axes, run: Run) -> None:
    steps = [record["step"] for record in run.placed]
    # A run that was resumed may have had other numbers of nodes before: there is no line where a node was not there.
    totals = {kind: np.full((len(steps), run.num_nodes), np.nan) for kind in ("main", "replicas")}
    for kind, total in totals.items():
        for number, record in enumerate(run.placed):
            rows = sum(np.sum(record[name][kind], 1) for name in _SEGMENTS)
            total[number, : np.size(rows)] = rows
    for node in range(run.num_nodes):
        colour = f"C{node % 10}"
        axis.plot(steps, totals["main"][:, node], color=colour, label=f"node {node}")
        axis.plot(steps, totals["replicas"][:, node], ":", color=colour)
    _finish(axis, "step", "rows", zero=True)


def _draw_bands(axis: Axes, run: Run) -> None:
    """Draw the mean number of replicas of a softmax row, by the frequency rank of its word."""
    ends = np.array(run.placed[0]["softmax"]["ends"])
    sizes = np.diff(ends, prepend=0)
    copies = np.array([np.sum(record["softmax"]["replicas"], 0) for record in run.placed]) / sizes
    steps = [record["step"] for record in run.placed]
    edges = [0, *steps] if len(steps) > 1 else [0, steps[0]]
    image = axis.pcolormesh(edges, [0.5, *ends], copies.T, cmap="viridis", vmin=0)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("row (most frequent words first)")
    axis.figure.colorbar(image, ax=axis, label="replicas")
