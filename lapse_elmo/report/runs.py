"""Read the data of a run for a report: metrics, options, versions, and nearest words in its newest model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapse_elmo.errors import ConfigError, UserError
from lapse_elmo.inputs import read_small, read_toml
from lapse_elmo.metrics.run_log import METRICS
from lapse_elmo.trained import load

Records = list[dict[str, Any]]

TOKENS = "train/trained_tokens"
PHASES = ("pull", "compute", "agree", "push", "save")
_NUM_WORDS, _NUM_NEIGHBOURS = 8, 6
_MOST_METRICS_BYTES = 1 << 33
_MIN_LETTERS = 4  # show neighbours only of words of at least this many letters: shorter ones are mostly function words


@dataclass(frozen=True)
class Run:
    """The data of one run.

    Attributes:
        name: Its name in the report.
        train: Records of metrics.jsonl of the kind ``train``.
        epochs: Records of the kind ``epoch``.
        placed: Records of the kind ``placement``.
        options: The resolved options, a table per group.
        versions: Versions of the software, by package.
        neighbours: Pairs (word, its nearest words with their cosines).
    """

    name: str
    train: Records
    epochs: Records
    placed: Records
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    neighbours: list[tuple[str, str]] = field(default_factory=list)

    @property
    def by_tokens(self) -> bool:
        """Whether all reports have the number of trained tokens; those of old runs do not."""
        return all(TOKENS in record for record in self.train)

    @property
    def num_nodes(self) -> int:
        """Number of nodes that hold rows; 1 if the server does not report it."""
        return max((len(record["softmax"]["main"]) for record in self.placed), default=1)

    def series(self, name: str, *, of: Records | None = None, tokens: bool = False) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a metric, without values that are not finite.

        Args:
            name: Name of the metric.
            of: Records to search; None means those of training.
            tokens: Whether to return numbers of trained tokens instead of steps.
        """
        axis = TOKENS if tokens else "step"
        records = self.train if of is None else of
        found = [(r[axis], r[name]) for r in records if r.get(name) is not None and r.get(axis) is not None]
        return [x for x, _ in found], [y for _, y in found]

    def has(self, name: str) -> bool:
        """Return whether the run has values of a metric."""
        return bool(self.series(name)[1])

    def summary(self) -> dict[str, Any]:
        """Return the run's row in the table of runs, by column."""
        data, model, training = (self.options.get(group, {}) for group in ("data", "model", "training"))
        perplexities = self.series("heldout/mean_perplexity", of=self.epochs)[1]
        speeds = sorted(self.series("train/tokens_per_s")[1])
        tokens = self.series(TOKENS)[1]
        return {
            "run": self.name, "shards": data.get("shards", ""), "D": model.get("projection_size", ""),
            "C": model.get("cell_size", ""), "L": model.get("num_layers", ""),
            "batch per rank": training.get("batch_size", ""), "seed": training.get("seed", ""),
            "steps": self.train[-1]["step"], "tokens": int(tokens[-1]) if tokens else "",
            "training loss (nats)": round(self.train[-1]["train/loss_nats"] or float("nan"), 3),
            "best held-out perplexity": round(min(perplexities), 2) if perplexities else "",
            "last held-out perplexity": round(perplexities[-1], 2) if perplexities else "",
            "median tokens/s": round(speeds[len(speeds) // 2]) if speeds else "",
            "slowest rank": self.slowest_rank(),
        }

    def slowest_rank(self) -> str:
        """Return the rank that was slowest most often, its host, and the mean seconds of its phases per step."""
        named = [record for record in self.train if record.get("ranks/slowest") is not None]
        if not named:
            return ""
        (rank, count), *_ = Counter(record["ranks/slowest"] for record in named).most_common(1)
        of_rank = [record for record in named if record["ranks/slowest"] == rank]
        means = []
        for phase in PHASES:
            values = [record[name] for record in of_rank if record.get(name := f"ranks/slowest_{phase}_s") is not None]
            means += [f"{phase} {sum(values) / len(values):.3f}"] if values else []
        host = of_rank[-1]["ranks/slowest_host"]
        return f"{rank} on {host} ({count} of {len(named)} reports; s/step: {', '.join(means)})"


def read_run(folder: Path, name: str) -> Run:
    """Read the run in ``folder``.

    Raises:
        ConfigError: If its metrics are missing, empty or not in the expected format.
    """
    records = read_metrics(folder)
    kinds = {kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "epoch", "placement")}
    return Run(
        name, kinds["train"], kinds["epoch"], kinds["placement"], _read_toml(folder / "config.toml"),
        _read_toml(folder / "versions.toml"), _neighbours(folder),
    )


def read_metrics(run_dir: Path) -> Records:
    """Return the records of a run's metrics.jsonl.

    Raises:
        ConfigError: If the file is missing, is not JSON lines, or has no report yet.
    """
    path = run_dir / METRICS
    try:
        text = read_small(path, _MOST_METRICS_BYTES).decode()
        # What follows the last line break is a line that is being written, or was when the run was killed.
        records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the directory of a run of bin/train") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} does not hold the metrics of a run: a line is not JSON") from None
    if not any(isinstance(record, dict) and record.get("kind") == "train" for record in records):
        raise ConfigError(f"{path} holds no reports yet: the run has not reached --report-every steps")
    return records


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except (OSError, ValueError, RecursionError):  # the report only needs the metrics: accept partial copies
        return {}


def _neighbours(folder: Path) -> list[tuple[str, str]]:
    """Return the nearest words of a few frequent words in the newest saved model; empty if none can be opened."""
    try:
        model = load(folder)
    except UserError:
        return []
    words = [word for word in model.vocabulary.words if word.isalpha() and len(word) >= _MIN_LETTERS]
    return [
        (word, " · ".join(f"{other} {cosine:.2f}" for other, cosine in model.nearest(word, _NUM_NEIGHBOURS)))
        for word in words[:_NUM_WORDS]
    ]
