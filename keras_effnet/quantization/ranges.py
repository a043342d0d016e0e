"""From the statistics of a tensor to the range of its 256 levels."""

import dataclasses
import functools
import itertools

import numpy as np

from .calibration import TensorStatistics
from .params import INT8_MAX, INT8_MIN, QuantParams, widen

METHODS = ("min_max", "moving_average", "percentile", "mse", "entropy", "consumer")

# Weight of the past in the moving average of the batches' extremes (Jacob et al., 2018).
MOMENTUM = 0.9
PERCENTILE = 99.99
# Steps between the levels of 8 bits.
LEVELS = INT8_MAX - INT8_MIN
# Points that stand for a tensor in a search: all of its tails, every n-th value between.
SEARCH_POINTS = 8192
TAIL_POINTS = 1024
# Parts of the extremes that the search tries as bounds; factors of the best ones, from coarse to
# fine; and how many pairs of bounds it goes on with.
LOWER_SHARES = (*np.geomspace(1, 0.01, 12), 0.0)
UPPER_SHARES = tuple(np.geomspace(1, 0.01, 16))
ZOOMS = (np.geomspace(1.3, 1 / 1.3, 5), np.geomspace(1.1, 1 / 1.1, 5))
BEST_PAIRS = 2
# Factors of the best step at the end, with moves of its zero point.
STEP_FACTORS = np.geomspace(1.05, 1 / 1.05, 7)
ZERO_MOVES = (-1, 0, 1)
# Bins of the entropy method (TensorRT's choice).
ENTROPY_BINS = 2048


@dataclasses.dataclass(frozen=True)
class Consumer:
    """What reads a tensor: the error of a range is measured after it.

    Attributes:
        function: "identity", "swish", "sigmoid", "hard_swish", "softmax" (over the channels), or
            "gate": the sigmoid of a swish whose other factor is not rounded with it.
        importance: Weight of the squared error of each channel, shape (channels,).
        slope: Factor of each channel inside the sigmoid of a swish, shape (channels,).
    """

    function: str
    importance: np.ndarray
    slope: np.ndarray


def find_range(
    statistics: list[TensorStatistics], method: str, consumers: list[Consumer]
) -> QuantParams:
    """Returns the quantization parameters of tensors that share one range.

    Args:
        statistics: Statistics of each tensor.
        method: One of `METHODS`.
        consumers: The consumer of each tensor.

    Raises:
        ValueError: If the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown range method. Allowed: {METHODS}. Received: {method!r}")
    low = min(float(part.low.min()) for part in statistics)
    high = max(float(part.high.max()) for part in statistics)
    if method == "moving_average":
        low = min(_moving_average(part.batch_low) for part in statistics)
        high = max(_moving_average(part.batch_high) for part in statistics)
    low, high = widen(low, high)
    if method in ("min_max", "moving_average"):
        return QuantParams.from_range(low, high)
    if method == "percentile":
        return QuantParams.from_range(*widen(*_percentiles(*_flat(statistics))))
    if method == "entropy":
        return QuantParams.from_range(*_entropy_range(*_flat(statistics), low, high))
    points = [
        _points(part, consumer, method)
        for part, consumer in zip(statistics, consumers, strict=True)
    ]
    return QuantParams.from_range(*_search(points, low, high))


def _moving_average(values: list[float]) -> float:
    average = values[0]
    for value in values[1:]:
        average = MOMENTUM * average + (1 - MOMENTUM) * value
    return average


def _flat(statistics):
    """Returns all values of the samples, and how many places each stands for."""
    values = [part.sample.reshape(-1) for part in statistics]
    weights = [np.repeat(part.weights, part.sample.shape[1]) for part in statistics]
    return np.concatenate(values), np.concatenate(weights)


def _percentiles(values, weights):
    order = _order(values)
    shares = np.cumsum(weights[order], dtype=np.float64)
    shares /= shares[-1]
    tail = 1 - PERCENTILE / 100
    positions = np.searchsorted(shares, [tail, 1 - tail])
    return values[order[np.minimum(positions, len(order) - 1)]]


def _round(values, low, high):
    scale = np.float32((high - low) / LEVELS)
    # A float64 scalar would make all that follows float64.
    zero = np.float32(np.round(-low / scale))
    return np.clip(np.floor(values / scale + np.float32(0.5)), -zero, LEVELS - zero) * scale


class _Scores:
    """Weighted rows of scores, and what their rounding does to the probabilities.

    Only the largest scores of an image matter, so the range may cut the others off.
    """

    def __init__(self, rows, weights):
        self.rows, self.weights = rows, weights
        self.exact = self._softmax(rows)

    @staticmethod
    def _softmax(rows):
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def error(self, low, high):
        difference = self._softmax(_round(self.rows, low, high)) - self.exact
        return float(self.weights @ np.sum(difference * difference, axis=1))


class _Points:
    """Weighted values that stand for a tensor, and the error that their rounding makes."""

    def __init__(self, values, weights, slopes, function):
        self.values, self.weights, self.slopes = values, weights, slopes
        self.function = function
        self.exact = self._apply(values)

    def _apply(self, values):
        if self.function == "identity":
            return values
        if self.function == "hard_swish":
            return values * np.clip(values + 3, 0, 6) / 6
        gates = 1 / (1 + np.exp(-np.clip(values * self.slopes, -30, 30)))
        if self.function == "sigmoid":
            return gates
        return (self.values if self.function == "gate" else values) * gates

    def error(self, low, high):
        difference = self._apply(_round(self.values, low, high)) - self.exact
        return float(np.dot(difference * difference, self.weights))


def _points(statistics, consumer, method):
    sample = statistics.sample
    plain = method == "mse"
    if consumer.function == "softmax" and not plain:
        return _Scores(sample, statistics.weights)
    order = _order(sample)
    if order.size > SEARCH_POINTS:
        middle = order[TAIL_POINTS:-TAIL_POINTS]
        stride = -(-middle.size // (SEARCH_POINTS - 2 * TAIL_POINTS))
        chosen = np.concatenate(
            [order[:TAIL_POINTS], middle[stride // 2 :: stride], order[-TAIL_POINTS:]]
        )
        thinning = np.ones(len(chosen), np.float32)
        thinning[TAIL_POINTS:-TAIL_POINTS] = stride
    else:
        chosen, thinning = order, 1.0
    rows, channels = np.divmod(chosen, sample.shape[1])
    weights = statistics.weights[rows] * thinning
    values = sample.reshape(-1)[chosen]
    if plain:
        return _Points(values, weights, 1.0, "identity")
    weights = weights * consumer.importance[channels].astype(np.float32)
    return _Points(values, weights, consumer.slope[channels].astype(np.float32), consumer.function)


def _order(values):
    """Returns the stable order of finite values, as indices into the flat array.

    One sort of integers made of value and index: faster than a stable `np.argsort`, and unlike its
    default the same on every processor, also where values are equal.
    """
    bits = np.add(values, np.float32(0), dtype=np.float32).reshape(-1).view(np.int32)  # No -0.
    # The magnitude of negative numbers runs the other way.
    ascending = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    return np.sort((ascending << 32) | np.arange(bits.size)) & 0xFFFFFFFF


def _search(points, low, high):
    """Returns the bounds of the least error.

    Zero is one of the levels, so a bound near it cannot move alone: between zero and about -0.28,
    where a swish ends, there are but one or two steps. As a function of the bounds the error is
    full of dents, in which a search that moves one bound after the other is caught. So pairs of
    bounds are tried, ever closer to the best, and in the end steps and zero points.
    """

    def step(lower, upper):
        scale = (upper * high - lower * low) / LEVELS
        return scale, round(-lower * low / scale) if scale > 0 else 0

    @functools.cache
    def error(scale, zero):
        if not (scale > 0 and 0 <= zero <= LEVELS):
            return np.inf
        return sum(part.error(-zero * scale, (LEVELS - zero) * scale) for part in points)

    pairs = list(itertools.product(LOWER_SHARES, UPPER_SHARES))
    for zoom in ZOOMS:
        pairs = sorted(pairs, key=lambda pair: error(*step(*pair)))[:BEST_PAIRS]
        pairs = [pair * np.array(both) for pair in pairs for both in itertools.product(zoom, zoom)]
    scale, zero = min((step(*pair) for pair in pairs), key=lambda pair: error(*pair))
    around = itertools.product(STEP_FACTORS * scale, np.add(ZERO_MOVES, zero))
    scale, zero = min(around, key=lambda pair: error(*pair))
    return -zero * scale, (LEVELS - zero) * scale


def _entropy_range(values, weights, low, high):
    """Returns the range whose 256 levels keep the most information (TensorRT's method).

    The distribution clipped to a range, with the clipped mass in its outermost bins, is compared
    with the same distribution merged into 256 levels, by the Kullback-Leibler divergence.
    """
    counts, edges = np.histogram(values, ENTROPY_BINS, (low, high), weights=weights)
    best, smallest = (low, high), np.inf
    zero = int(np.clip(np.searchsorted(edges, 0.0) - 1, 0, ENTROPY_BINS - 1))
    for share in np.linspace(0.1, 1, 91):
        first = int(zero - share * zero)
        last = int(zero + share * (ENTROPY_BINS - zero))
        if last - first < 256:
            continue
        reference = counts[first:last].astype(np.float64)
        kept = reference.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        groups = np.arange(last - first) * 256 // (last - first)
        mass = np.bincount(groups, kept, 256)
        filled = np.bincount(groups, kept > 0, 256)
        merged = np.where(kept > 0, (mass / np.maximum(filled, 1))[groups], 0.0)
        p, q = reference / reference.sum(), merged / max(merged.sum(), 1)
        used = p > 0
        divergence = float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))))
        if divergence < smallest:
            smallest, best = divergence, (float(edges[first]), float(edges[last]))
    return widen(*best)
