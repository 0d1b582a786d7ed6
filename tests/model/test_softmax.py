"""Sampled and full softmax against AllenNLP's loss and plain autograd, in float64; the sampler's expected counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lapse_elmo.log_uniform import log_uniform_probability
from lapse_elmo.model import full_softmax, reference
from lapse_elmo.model.full_softmax import full_softmax_nll
from lapse_elmo.model.products import Matmul
from lapse_elmo.model.softmax import (
    expected_num_tries,
    log_expected_count,
    sampled_softmax_nll,
)

TOLERANCE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(high: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def plain_nll(
    context: Tensor, weight: Tensor, bias: Tensor, target_index: Tensor, sample_index: Tensor,
    log_expected: Tensor | None,
) -> Tensor:
    """Compute sampled_softmax_nll by autograd over the whole (N, S) matrix."""
    bias_minus_log_q = bias if log_expected is None else bias - log_expected
    true = (context * weight[target_index]).sum(1) + bias_minus_log_q[target_index]
    logits = context @ weight[sample_index].t() + bias_minus_log_q[sample_index]
    logits = logits.masked_fill(sample_index == target_index[:, None], -math.inf)
    return -torch.log_softmax(torch.cat([true[:, None], logits], 1), 1)[:, 0].sum()


def sampled_nll(
    context: Tensor, weight: Tensor, bias: Tensor, target_index: Tensor, sample_index: Tensor,
    log_expected: Tensor | None = None, chunk: int = 256,
) -> Tensor:
    """Compute sampled_softmax_nll of rows given as weights and biases."""
    softmax = torch.cat([weight, bias[:, None]], 1)
    return sampled_softmax_nll(context, softmax, target_index, sample_index, log_expected, chunk=chunk)


def leaves(num_targets: int, rows: int, size: int = 6) -> list[Tensor]:
    shapes = [(num_targets, size), (rows, size), (rows,)]
    return [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


# Chunks of 16 targets and more are padded to a multiple of 16.
@pytest.mark.parametrize(("num_targets", "chunk"), [(1, 8), (7, 8), (8, 8), (30, 8), (5, 16), (16, 16), (70, 32)])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_equals_plain_autograd(num_targets: int, chunk: int, repeats: bool, corrected: bool) -> None:
    target, sample = indices(25, num_targets), indices(25, 40) if repeats else torch.randperm(25)[:12]
    log_expected = random(25, seed=7) if corrected else None
    results = []
    functions: list[Callable[..., Tensor]] = [partial(sampled_nll, chunk=chunk), plain_nll]
    for nll in functions:
        values = leaves(num_targets, 25)
        loss = nll(*values, target, sample, log_expected)
        (3.0 * loss).backward()
        results.append([loss.detach(), *(value.grad for value in values)])
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize(
    ("num_targets", "chunk", "sizes"),
    [(70, 32, [32, 32, 16]), (64, 32, [32, 32]), (5, 256, [16]), (257, 256, [144, 128]), (9, 8, [5, 4])],
)
def test_chunks_are_of_whole_rows_and_no_larger(
    monkeypatch: pytest.MonkeyPatch, num_targets: int, chunk: int, sizes: list[int]
) -> None:
    """The memory of a run is estimated from their size."""
    once, found = Matmul.mm_into, []

    def noted(self: Matmul, out: Tensor, first: Tensor, second: Tensor) -> Tensor:
        if second.shape[1] == 4:  # of the logits, not of their gradients
            found.append(len(first))
        return once(self, out, first, second)

    monkeypatch.setattr(Matmul, "mm_into", noted)
    context, weight, bias = leaves(num_targets, 9)
    sampled_nll(context, weight, bias, indices(9, num_targets), indices(9, 4), chunk=chunk)
    assert found == sizes


@pytest.mark.parametrize("sparse", [False, True])
def test_equals_allennlp_with_the_same_draws(sparse: bool) -> None:
    num_classes, num_samples = 60, 25
    samples, tries = np.random.default_rng(1).permutation(num_classes)[:num_samples], 41
    loss = reference.modules("sampled_softmax_loss").SampledSoftmaxLoss
    theirs = loss(num_classes, 6, num_samples, sparse=sparse).double()
    theirs.choice_func = lambda *_: (samples, tries)
    target = indices(num_classes, 50)
    context, weight, bias = leaves(50, num_classes)
    rows, biases = theirs.softmax_w, theirs.softmax_b
    if sparse:
        rows, biases = rows.weight, biases.weight
    with torch.no_grad():
        rows.copy_(weight)
        biases.copy_(bias.view_as(biases))
    their_context = context.detach().clone().requires_grad_()
    expected = theirs(their_context, target)
    expected.backward()
    # AllenNLP computes its expected counts in float32; ours are float64, so theirs bound the agreement.
    log_expected = log_expected_count(torch.arange(num_classes), num_classes, num_samples, tries)
    loss = sampled_nll(context, weight, bias, target, torch.from_numpy(samples), log_expected)
    loss.backward()
    found = [loss.detach(), context.grad, weight.grad, bias.grad]
    dense = [g.to_dense() if g.is_sparse else g for g in (rows.grad, biases.grad)]
    reached = [expected.detach(), their_context.grad, dense[0], dense[1].view(-1)]
    torch.testing.assert_close(found, reached, rtol=2e-5, atol=2e-5)
    # With their own counts, everything else agrees to the last digits.
    _, counts, sample_counts = theirs.log_uniform_candidate_sampler(target, theirs.choice_func)
    log_expected[target] = counts.double().log()
    log_expected[samples] = sample_counts.double().log()
    values = leaves(50, num_classes)
    loss = sampled_nll(values[0], values[1], values[2], target, torch.from_numpy(samples), log_expected)
    loss.backward()
    torch.testing.assert_close([loss.detach(), *(v.grad for v in values)], reached, rtol=2e-7, atol=2e-7)


def test_all_rows_as_samples_are_the_full_softmax() -> None:
    target, every = indices(25, 30), torch.arange(25)
    context, weight, bias = leaves(30, 25)
    loss = sampled_nll(context, weight, bias, target, every, None, chunk=7)
    loss.backward()
    copies = leaves(30, 25)
    expected = torch.nn.functional.cross_entropy(copies[0] @ copies[1].t() + copies[2], target, reduction="sum")
    expected.backward()
    found = [loss.detach(), context.grad, weight.grad, bias.grad]
    torch.testing.assert_close(found, [expected.detach(), *(v.grad for v in copies)], **TOLERANCE)


def test_gradcheck() -> None:
    target, sample = indices(7, 5), torch.tensor([1, 3, 3, 6])
    log_expected = random(7)
    assert torch.autograd.gradcheck(
        lambda c, w, b: sampled_nll(c, w, b, target, sample, log_expected, chunk=2), leaves(5, 7, 3)
    )


def test_no_targets_no_samples_and_no_gradient() -> None:
    context, weight, bias = leaves(0, 9)
    none = torch.empty(0, dtype=torch.int64)
    loss = sampled_nll(context, weight, bias, none, indices(9, 4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and weight.grad is not None and not weight.grad.any()
    context, weight, bias = leaves(4, 9)
    loss = sampled_nll(context, weight, bias, indices(9, 4), none)
    assert float(loss.detach()) == 0.0, "a target without any negative is certain"
    with torch.no_grad():
        quiet = sampled_nll(context, weight, bias, indices(9, 4), indices(9, 5))
    loud = sampled_nll(context, weight, bias, indices(9, 4), indices(9, 5))
    assert torch.equal(quiet, loud.detach()) and not quiet.requires_grad


def test_extreme_logits_stay_finite() -> None:
    context, weight, bias = (value.detach() * 1e3 for value in leaves(20, 25))
    arguments = (indices(25, 20), torch.arange(12), None)
    values = [value.float().requires_grad_() for value in (context, weight, bias)]
    loss = sampled_nll(values[0], values[1], values[2], *arguments)
    loss.backward()
    expected = plain_nll(context, weight, bias, *arguments)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0.0)
    assert all(bool(value.grad.isfinite().all()) for value in values if value.grad is not None)


@pytest.mark.parametrize(("chunk", "class_chunk"), [(512, 32_768), (7, 10), (30, 57), (1, 1)])
def test_full_softmax_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int, class_chunk: int) -> None:
    monkeypatch.setattr(full_softmax, "TARGET_BLOCK", chunk)
    monkeypatch.setattr(full_softmax, "CLASS_BLOCK", class_chunk)
    context, weight, bias = (value.detach() for value in leaves(30, 57))
    target = indices(57, 30)
    rows = torch.cat([weight, bias[:, None]], 1)
    expected = torch.nn.functional.cross_entropy(context @ weight.t() + bias, target, reduction="none")
    for size in (57, 20, 1):
        chunks = [(first, rows[first : first + size]) for first in range(0, 57, size)]
        torch.testing.assert_close(full_softmax_nll(context, chunks, target), expected, **TOLERANCE)
    narrow = full_softmax_nll(context.float(), [(0, rows.float())], target)
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, expected, rtol=1e-5, atol=1e-5)
    assert full_softmax_nll(context[:0], [(0, rows)], target[:0]).shape == (0,)


@pytest.mark.parametrize("num_classes", [1, 2, 9_358, 793_471])
def test_log_uniform_probabilities_sum_to_one(num_classes: int) -> None:
    probability = log_uniform_probability(torch.arange(num_classes), num_classes)
    assert abs(float(probability.sum()) - 1.0) < 1e-10
    assert bool((probability[1:] < probability[:-1]).all())


def test_expected_counts_are_those_of_draws() -> None:
    num_classes, num_samples, repeats = 200, 50, 3000
    generator = np.random.default_rng(3)
    with_replacement, without, tries = np.zeros(num_classes), np.zeros(num_classes), []
    for _ in range(repeats):
        # inverse transform: floor((V + 1)^u) - 1 is log-uniform
        draws = (np.exp(generator.random(2000) * math.log(num_classes + 1)).astype(int) - 1).clip(0, num_classes - 1)
        np.add.at(with_replacement, draws[:num_samples], 1)
        first_seen = np.sort(np.unique(draws, return_index=True)[1])
        tries.append(first_seen[num_samples - 1] + 1)
        without[np.unique(draws[: tries[-1]])] += 1
    classes = torch.arange(num_classes)
    expected = log_expected_count(classes, num_classes, num_samples, replacement=True).exp().numpy()
    np.testing.assert_allclose(expected.sum(), num_samples, rtol=1e-9)
    assert np.abs(with_replacement / repeats - expected).max() < 5 * math.sqrt(expected.max() / repeats)
    expected = log_expected_count(classes, num_classes, num_samples).exp().numpy()
    np.testing.assert_allclose(expected.sum(), num_samples, rtol=1e-9)
    # Fixing the number of draws is an approximation of stopping at S distinct ones: hence the margin.
    assert np.abs(without / repeats - expected).max() < 0.03
    assert abs(expected_num_tries(num_classes, num_samples) / np.mean(tries) - 1.0) < 0.02


def test_expected_counts_at_the_limits() -> None:
    classes = torch.arange(12)
    assert expected_num_tries(12, 12) == math.inf
    assert torch.equal(log_expected_count(classes, 12, 12), torch.zeros(12, dtype=torch.float64))
    given = log_expected_count(classes, 12, 5, 9.0).exp()
    torch.testing.assert_close(given, 1.0 - (1.0 - log_uniform_probability(classes, 12)) ** 9)
    one = log_expected_count(torch.tensor([793_470]), 793_471, 8192, 1.0).exp()
    torch.testing.assert_close(one, log_uniform_probability(torch.tensor([793_470]), 793_471), rtol=1e-12, atol=0.0)
