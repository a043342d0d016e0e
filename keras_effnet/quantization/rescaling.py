"""Rescaling: channels of very different ranges brought closer through a swish, approximately.

Equalization (`equalization.py`) divides each channel x before a swish by a factor s, and pays with
a multiplication on the side of the sigmoid for being exact. Without it

    swish(x) ~ gain * swish(x / s),

where the layers that read the swish take the gains into their kernels, so that the file is as fast
as if nothing had been done. A channel that reaches 80 is far out on the straight arms of its swish
at most places, where both sides agree; so the few channels that spread the range of all others can
give much of it up.

The graph then computes another function. Kernel reconstruction (`reconstruction.py`) takes nearly
all of the difference back: on photographs that took no part, and without rounding of activations,
the scores of V1-B0 are off by 1.7 % of their power before it and by 0.24 % behind it. With the
rounding, whose errors come from all tensors, these are 4.0 and 1.6 %. No other balance of both in
the search ended nearer: not with the errors of the function counted a quarter (1.8 %), nor, before
there was reconstruction, with those of rounding counted a sixteenth and a shift of channels before
the swish.

Source of the exact counterpart: Nagel et al., 2019, Data-Free Quantization Through Weight
Equalization and Bias Correction, section 4.1 (https://arxiv.org/abs/1906.04721).
"""

import dataclasses

import numpy as np

from .calibration import TensorStatistics
from .equalization import (
    absorb,
    divide_outputs,
    levels_of,
    round_to,
    search_rows,
    swish,
    swish_source,
)
from .graph import Graph
from .importance import energy

# Noise-to-signal ratio that rescaling one swish must save: it costs nothing at run time, but
# changes the function a little.
LEAST_GAIN = 2e-4
# Factors tried for each channel.
FACTORS = np.geomspace(0.35, 16, 23).astype(np.float32)
# Ends of the range of all channels that are tried.
ENDS = 16
SMALLEST_END = 3.0
# Below about this a swish is flat, and a range need not reach farther down than up to half its end.
FLAT_BELOW = -6.0
LOBE = 0.28
# Gains stay within these multiples of the factors: rare channels tell little of theirs.
GAINS = (0.5, 1.5)


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """How the channels of a swish are rescaled, and what it is good for.

    Attributes:
        factors: What the channels are divided by before the swish, shape (channels,), float32.
        gains: What they are multiplied by behind it, shape (channels,), float32.
        noise: Squared error behind the swish relative to the signal: of the rounding and of the
            approximation together.
        noise_without: That of the rounding without rescaling.
    """

    factors: np.ndarray
    gains: np.ndarray
    noise: float
    noise_without: float


def rescale_swishes(
    graph: Graph, statistics: dict[str, TensorStatistics], names: list[str]
) -> list[str]:
    """Rescales swishes where it saves noise; the graph then computes nearly the same.

    Args:
        graph: The folded graph, changed in place. Its tensors must be measured anew.
        statistics: Statistics of the graph as it is.
        names: Swishes, out of `equalization.swish_candidates`.

    Returns:
        The names of the swishes that were rescaled.
    """
    changed = []
    for name in names:
        source = swish_source(graph, graph[name])
        found = search_rescaling(statistics[source.name], energy(graph, name))
        if found.noise_without - found.noise < LEAST_GAIN:
            continue
        divide_outputs(source, found.factors)
        absorb(graph, name, found.gains)
        changed.append(name)
    return changed


def search_rescaling(statistics: TensorStatistics, importance: np.ndarray) -> Rescaling:
    """Returns the factors that make the errors behind a swish smallest.

    For a given range of all rescaled channels they do not depend on each other, so each takes the
    best of its factors; several ranges are tried.

    Args:
        statistics: Statistics of the convolution's output.
        importance: Weight of the squared error of each channel, shape (channels,).
    """
    values, exact, rows, _ = search_rows(statistics)
    rows = rows / rows.sum(dtype=np.float64)
    importance = importance / max(importance.mean(), 1e-30)
    power = rows @ exact**2
    signal = max(float(power @ importance), 1e-30)
    channels, best, without = np.arange(len(power)), None, np.inf
    least = float(statistics.low.min())
    for end in np.geomspace(SMALLEST_END, max(float(statistics.high.max()), SMALLEST_END), ENDS):
        table, scale, zero = _rounded_swish(end, least)
        plain, _ = _fit(values, exact, rows, power, np.float32(1), table, scale, zero)
        without = min(without, float(plain @ importance))
        fits = [_fit(values, exact, rows, power, factor, table, scale, zero) for factor in FACTORS]
        errors, gains = (np.stack(part) for part in zip(*fits, strict=True))
        chosen = errors.argmin(axis=0)
        error = float(errors[chosen, channels] @ importance)
        if best is None or error < best[0]:
            best = error, FACTORS[chosen], gains[chosen, channels]
    return Rescaling(best[1], best[2].astype(np.float32), best[0] / signal, without / signal)


def _rounded_swish(end, least):
    """Returns the rounded swish of each of the 256 inputs, and their step and zero."""
    low = min(-FLAT_BELOW, end / 2, max(LOBE, -least))
    scale, zero = levels_of(low, end)
    inputs = (np.arange(256, dtype=np.float32) - zero) * scale
    return round_to(swish(inputs), LOBE, end), scale, zero


def _fit(values, exact, rows, power, factor, table, scale, zero):
    """Returns the squared errors of the channels at their best gains, and the gains."""
    numbers = np.rint(values / (factor * scale)) + zero
    rounded = np.take(table, numbers.astype(np.intp), mode="clip")
    own, common = rows @ rounded**2, rows @ (rounded * exact)
    gains = np.where(own > 0, common / np.maximum(own, 1e-30), factor)
    gains = np.clip(gains, GAINS[0] * factor, GAINS[1] * factor)
    return np.maximum(power - 2 * gains * common + gains**2 * own, 0), gains
