"""Range methods on statistics made by hand."""

import numpy as np
import pytest

from keras_effnet.quantization.calibration import TensorStatistics
from keras_effnet.quantization.params import QuantParams
from keras_effnet.quantization.ranges import METHODS, Consumer, _order, find_range


def statistics(rows, batches=1):
    """The statistics of rows (places, channels) that were all seen, in equal batches."""
    rows = np.asarray(rows, np.float32)
    parts = np.split(rows, batches)
    return TensorStatistics(
        rows.min(axis=0),
        rows.max(axis=0),
        rows.mean(axis=0, dtype=np.float64),
        [float(part.min()) for part in parts],
        [float(part.max()) for part in parts],
        rows,
        np.ones(len(rows), np.float32),
        np.arange(len(rows)),
    )


def consumer(function="identity", importance=(1.0,), slope=None):
    importance = np.array(importance)
    return Consumer(function, importance, np.ones_like(importance) if slope is None else slope)


def found(rows, method, reader=None, batches=1):
    return find_range([statistics(rows, batches)], method, [reader or consumer()])


def long_tailed(count=20000, seed=0):
    """Values around 0, and one in a thousand of about 60."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 1))
    values[::1000] = 60 + rng.normal(size=values[::1000].shape)
    return values


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def swish(values):
    return values * sigmoid(values)


def squared_error(rows, params, function):
    rows = np.asarray(rows, np.float64)
    steps = np.clip(np.round(rows / params.scale) + params.zero_point, -128, 127)
    return np.mean((function((steps - params.zero_point) * params.scale) - function(rows)) ** 2)


def test_min_max_by_hand():
    # 255 steps from -1 to 4.1 are 0.02 each; zero is step 50.
    params = found([[-1.0], [0.5], [4.1]], "min_max")
    assert params.scale == pytest.approx(0.02)
    assert params.zero_point == -78


def test_moving_average_by_hand():
    # Highest of the batches: 1, then 0.9 * 1 + 0.1 * 11 = 2; lowest 0 in both.
    params = found([[0.0], [1.0], [0.0], [11.0]], "moving_average", batches=2)
    assert params.max == pytest.approx(2.0, rel=1e-6)
    assert params.zero_point == -128


def test_percentile_by_hand():
    # 0.01 % of 30,000 values are 3: the three of 1000 are left out, as far as 255 steps show it.
    values = np.linspace(0, 1, 30000)[:, None]
    values[-3:] = 1000
    assert found(values, "percentile").max == pytest.approx(1.0, rel=1e-3)
    values[-6:] = 1000
    assert found(values, "percentile").max == pytest.approx(1000, rel=1e-3)


def test_percentile_counts_what_a_row_stands_for():
    part = statistics(np.array([[1.0], [5.0]]))
    part.weights = np.array([1e6, 1.0], np.float32)
    assert find_range([part], "percentile", [consumer()]).max == pytest.approx(1.0)
    part.weights = np.array([1.0, 1.0], np.float32)
    assert find_range([part], "percentile", [consumer()]).max == pytest.approx(5.0)


def test_mse_clips_a_far_tail_and_no_uniform_values():
    values = np.random.default_rng(0).normal(size=(200_000, 1))
    values[0] = 40.0
    clipped = found(values, "mse")
    # The bound m costs (40 - m)^2 / 200,000 for the clipped value and ((m + 4.5) / 255)^2 / 12
    # for the steps; the sum is least at m = 31. The search is about 3 % fine.
    assert clipped.max == pytest.approx(31, rel=0.05)
    assert squared_error(values, clipped, np.array) < squared_error(
        values, found(values, "min_max"), np.array
    )
    # Values that fill their range are not clipped by more than a step or two.
    uniform = np.linspace(-1, 3, 5001)[:, None]
    assert found(uniform, "mse").max == pytest.approx(3, abs=2 * 4 / 255)


def test_entropy_clips_a_far_tail_and_no_uniform_values():
    values = np.random.default_rng(0).normal(size=(50_000, 1))
    values[:2] = [[40.0], [-40.0]]
    assert 2 < found(values, "entropy").max < 25
    uniform = np.linspace(-1, 3, 50_001)[:, None]
    assert found(uniform, "entropy").max > 2.9


@pytest.mark.parametrize("function, apply", [("sigmoid", sigmoid), ("swish", swish)])
def test_consumer_search_looks_behind_the_reader(function, apply):
    values = long_tailed()
    if function == "swish":
        values = -values  # A swish is flat below, a sigmoid on both sides.
    searched = found(values, "consumer", consumer(function))
    plain = found(values, "min_max")
    # 60 of min_max's range hold one value in a thousand. Behind a sigmoid it is 1 from 10 on.
    assert squared_error(values, searched, apply) < 0.1 * squared_error(values, plain, apply)
    assert searched.scale < 0.5 * plain.scale
    # The reader decides: behind the identity the tail is worth its range.
    alone = found(values, "consumer", consumer("identity"))
    assert alone.scale > 0.9 * plain.scale


@pytest.mark.parametrize("reach", [3, 8, 15])
def test_a_search_finds_the_best_of_all_ranges(reach):
    # The output of a swish ends at -0.28, but a step or two below zero where one channel reaches
    # far; the other channel, small and important, wants as many as it can get.
    importance = np.array([300.0, 1.0])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        small, large = rng.normal(size=3000) - 1, rng.standard_t(3, size=3000) * reach
        rows = swish(np.stack([small, np.maximum(large, -50)], axis=1))

        def error(params, rows=rows):
            steps = np.clip(np.round(rows / params.scale) + params.zero_point, -128, 127)
            squares = ((steps - params.zero_point) * params.scale - rows) ** 2
            return np.mean(squares * importance)

        searched = found(rows, "consumer", consumer(importance=importance))
        scales = np.geomspace(0.003, 1, 150) * rows.max() / 255
        best = min(error(QuantParams(scale, zero - 128)) for scale in scales for zero in range(13))
        assert error(searched) < 1.1 * best


def test_the_order_of_values_is_stable():
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=(70, 120)), 1).astype(np.float32)
    assert np.any(np.signbit(values) & (values == 0))
    for part in (values, values[:, ::2]):
        np.testing.assert_array_equal(_order(part), np.argsort(part, axis=None, kind="stable"))


def test_consumer_search_weighs_the_channels():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, 2)) * [1.0, 100.0]
    even = found(rows, "consumer", consumer(importance=[1.0, 1.0]))
    # What nobody reads of the second channel may be clipped.
    first = found(rows, "consumer", consumer(importance=[1.0, 1e-9]))
    assert first.max < 0.1 * even.max
    assert first.max == pytest.approx(found(rows[:, :1], "min_max").max, rel=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_one_range_holds_all_tensors_that_share_it(method):
    small = np.linspace(-1, 1, 2001)[:, None]
    large = np.linspace(-2, 8, 2001)[:, None]
    params = find_range([statistics(small), statistics(large)], method, [consumer()] * 2)
    assert params.max == pytest.approx(8, rel=0.05)
    assert params.min == pytest.approx(-2, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_tensors_are_represented_exactly(method, value):
    params = found(np.full((64, 2), value), method, consumer(importance=[1.0, 1.0]))
    assert squared_error(np.full(1, value), params, np.array) < 1e-10


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="Unknown range method.*'magic'"):
        found([[1.0]], "magic")
    assert isinstance(found([[1.0]], "min_max"), QuantParams)


def softmax(rows):
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_scores_are_measured_behind_the_softmax():
    # Negative throughout, and two of five decide: a range for swishes would cut those off.
    generator = np.random.default_rng(0)
    rows = generator.normal(-30, 3, (200, 5))
    rows[:, 0] = generator.uniform(-12, -8, 200)
    rows[:, 1] = rows[:, 0] - generator.uniform(0, 4, 200)
    params = found(rows, "consumer", consumer("softmax", np.ones(5)))
    tried = [QuantParams.from_range(low, 0.0) for low in np.linspace(-42, -2, 81)]
    errors = [squared_error(rows, each, softmax) for each in tried]
    assert squared_error(rows, params, softmax) < 1.1 * min(errors)
    # Neither the squared error of the scores themselves nor a swish's finds it.
    for function in ("identity", "swish"):
        other = found(rows, "consumer", consumer(function, np.ones(5)))
        assert squared_error(rows, other, softmax) > 1.5 * min(errors)
