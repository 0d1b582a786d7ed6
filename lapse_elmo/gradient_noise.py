"""The gradient noise scale: how large a batch can be before more of it no longer helps."""

from __future__ import annotations


def noise_of(mean_square: float, square: float, num_parts: float, num_tokens: float) -> tuple[float, float]:
    """Return (signal, noise) of a step, whose ratio noise / signal is the gradient noise scale in tokens.

    ``signal`` is an unbiased estimate of the squared norm of the true gradient, ``noise`` of the squared deviation of
    the gradient of a single token from it. The noise scale is the batch at which half of the squared norm of an
    averaged gradient is noise (McCandlish et al. 2018, arXiv:1812.06162, appendix A). Both estimates are noisy, and the
    signal may be negative: sum both over many steps before dividing.

    Args:
        mean_square: Mean over the parts of the squared norm of a part's gradient.
        square: Squared norm of the mean of these gradients.
        num_parts: Parts of all ranks; 2 or more.
        num_tokens: Tokens of all parts.
    """
    signal = (num_parts * square - mean_square) / (num_parts - 1)
    return signal, (mean_square - square) * num_tokens / (num_parts - 1)
