"""The report of ``benchmarks/gpu.py``: speeds from the metrics of runs, and one Markdown file with everything."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.step import lstm_flops, softmax_flops
from lapse_elmo.config.training import PRESETS

PHASES = ("pull", "compute", "agree", "push")  # of a step, in metrics.jsonl
WARM_UP = 5  # steps, which compile kernels and allocate buffers
PROFILED = 5
FIRST_PROFILED = 4  # as in lapse_elmo/metrics/profile.py, whose imports may be missing here


def training_flops(size: str, num_samples: int) -> float:
    """Return the operations of one token in training: products of LSTM and sampled softmax, both directions."""
    width, cells, layers = (PRESETS[size][name] for name in ("projection_size", "cell_size", "num_layers"))
    return lstm_flops(width, cells, layers) + 2 * softmax_flops(width, num_samples)


def speed(lines: Sequence[dict[str, Any]], profiled: bool) -> dict[str, float]:
    """Return tokens/s and seconds by phase of a run, medians of the reports in its metrics.

    Reports that contain the warm-up, the profile with its export, or an evaluation are left out.

    Args:
        lines: The records of metrics.jsonl.
        profiled: Whether the run was profiled.

    Returns:
        ``tokens_per_s``, by the clock; ``tokens_per_s_of_phases``, of the steps' phases alone; and ``step/PHASE_s``. It
        is empty if no report is left.
    """
    evaluated = {line["step"] for line in lines if line["kind"] == "epoch"}
    first = max(WARM_UP, FIRST_PROFILED + PROFILED - 1) if profiled else WARM_UP
    before, clean = 0, []
    for line in lines:
        if line["kind"] != "train":
            continue
        if before >= first and before not in evaluated:
            clean.append(line)
        before = line["step"]
    if not clean:
        return {}
    names = [f"step/{phase}_s" for phase in PHASES]
    return {
        "tokens_per_s": statistics.median(line["train/tokens_per_s"] for line in clean),
        "tokens_per_s_of_phases": statistics.median(
            line["train/global_batch_tokens"] / sum(line[name] for name in names) for line in clean
        ),
        **{name: statistics.median(line[name] for line in clean) for name in names},
    }


def report(results: dict[str, Any]) -> str:
    """Return the report as Markdown.

    Args:
        results: ``about`` (the device), ``parts`` and ``runs`` (results by name), ``left_out``, ``num_samples`` and
            ``minutes``, as in ``benchmarks/gpu.py``.
    """
    about, parts, runs = results["about"], results["parts"], results["runs"]
    rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in about.get("rates", {}).items())
    lines = [
        f"# {about.get('device', 'unknown device')}, torch {about.get('torch', '?')}", "",
        f"Large square products in TFLOP/s: {rates or 'not measured'}.", "",
        "| part | result | seconds |", "|---|---|---|",
        *(f"| {name} | {part['error'] or part['said']} | {part['seconds']:.1f} |" for name, part in parts.items()), "",
        f"| size | B | precision | tokens/s | of the phases alone | share of the bf16 rate | {', '.join(PHASES)} (ms) "
        "| peak memory (GB) |",
        "|---|---|---|---|---|---|---|---|", *(_row(name, run, results) for name, run in runs.items()), "",
        f"Tokens/s are medians of the reports after {WARM_UP} steps of warm-up, without profile and evaluation.",
    ]
    if results["left_out"]:
        lines += ["", f"Left out, as --minutes {results['minutes']:g} were over: {', '.join(results['left_out'])}."]
    for name, run in runs.items():
        if run.get("profile"):
            lines += ["", f"## A step of {name}", "", "```", run["profile"].strip(), "```"]
    for name, part in [*parts.items(), *runs.items()]:
        if part["error"] or name == "tests":
            lines += ["", f"## Output of {name}", "", "```", part["output"].strip(), "```"]
    plain = {**results, "runs": {name: _numbers(run) for name, run in runs.items()}}
    plain["parts"] = {name: _numbers(part) for name, part in parts.items()}
    return "\n".join([*lines, "", "## All numbers", "", "```json", json.dumps(plain, indent=1), "```"]) + "\n"


def _row(name: str, run: dict[str, Any], results: dict[str, Any]) -> str:
    size, batch, precision = name.split("-")
    if run["error"]:
        return f"| {size} | {batch} | {precision} | failed: {run['error']} | | | | |"
    rate = results["about"].get("rates", {}).get("bf16")
    share = f"{run['tokens_per_s'] * training_flops(size, results['num_samples']) / rate:.1%}" if rate else ""
    phases = ", ".join(f"{1e3 * run[f'step/{phase}_s']:.1f}" for phase in PHASES)
    return (
        f"| {size} | {batch} | {precision} | {run['tokens_per_s']:,.0f} | {run['tokens_per_s_of_phases']:,.0f} | "
        f"{share} | {phases} | {run['peak_bytes'] / 1e9:.1f} |"
    )


def _numbers(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in ("output", "profile")}
