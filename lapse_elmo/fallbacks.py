"""Warnings about slow fallbacks that this machine takes, and about which kernels compute."""

from __future__ import annotations

import torch

from lapse_elmo import native
from lapse_elmo.config.training import ModelConfig
from lapse_elmo.model import dense, prepacked
from lapse_elmo.model.lstm_steps import STEPS_SOURCE
from lapse_elmo.model.pointwise import SOURCE, triton_problem
from lapse_elmo.model.products import cpu_multiplies_bf16


def model_fallbacks(config: ModelConfig, device: torch.device) -> list[str]:
    """Return a line for each slow fallback that the model takes on this rank, with the reason."""
    lines = []
    sources = {
        "pointwise parts": SOURCE, "products of few rows": prepacked.PREPACKED_SOURCE, "steps": STEPS_SOURCE,
        "dense updates": dense.SOURCE,
    }
    for what, source in sources.items():
        if device.type == "cpu" and native.load(source) is None:
            where = "from Python" if source == STEPS_SOURCE else "in torch"
            lines.append(f"the model's {what} run {where}, which is slower than C: {native.problem(source)}")
    if device.type == "cuda" and (why := triton_problem(device)):
        lines.append(f"the LSTM's pointwise parts run in torch, which is slower than Triton: {why}")
    if config.precision == "bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        lines.append(
            "this processor has no bfloat16 products: --precision bf16 rounds the factors and multiplies in float32, "
            "at the speed of float32"
        )
    return lines


def product_lines(config: ModelConfig, device: torch.device) -> list[str]:
    """Return a line that names the kernels of the LSTM's matrix products; none where torch chooses them."""
    fused_here = config.lstm == "fused" and device.type == "cpu"
    return [prepacked.describe(config.precision)] if fused_here else []
