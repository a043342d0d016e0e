"""Equalization is exact in float, and its statistics are those of the new tensors."""

import numpy as np
import pytest
from hand_made import compute, folded, functional, layers, ops, predict, values

from keras_effnet.quantization.calibration import TensorStatistics, collect
from keras_effnet.quantization.equalization import (
    FACTOR_STEPS,
    RANGES,
    SMALLEST_STEPS,
    Factors,
    _squared_errors,
    best_swishes,
    equalize_swish,
    search_factors,
    swish_candidates,
)

# Kernels and biases are rounded to float32 once more.
FLOAT_TOLERANCE = 5e-5
SIDE = 8


def uneven(model, name, factors):
    """Makes the output channels of a layer as large as `factors`."""
    layer = model.get_layer(name)
    kernel, bias = layer.get_weights()
    shape = (-1, 1) if kernel.shape[-1] == 1 else (-1,)
    layer.set_weights([kernel * np.reshape(factors, shape), bias * factors])
    return model


GAINS = np.array([0.05, 0.2, 1.0, 8.0])


def block(x):
    """An MBConv block with squeeze-and-excite and a residual sum."""
    x = residual = layers.Conv2D(4, 3, padding="same", name="stem")(x)
    x = layers.Conv2D(4, 1, activation="swish", name="expand")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="swish", name="depthwise")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(2, 1, activation="swish", name="reduce")(gate)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="expand_gate")(gate)
    x = layers.Multiply(name="excite")([x, gate])
    x = layers.Add(name="sum")([residual, layers.Conv2D(4, 1, name="project")(x)])
    return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))


@pytest.fixture
def model():
    model = functional(SIDE, block)
    for name in ("stem", "expand", "depthwise", "project"):
        uneven(model, name, GAINS)
    return model


def statistics_of(graph):
    images = values(12, side=SIDE)
    return collect(graph, [images[:6], images[6:]], 2, verbose=False)


def assert_the_same(moved, anew):
    assert set(moved) == set(anew)
    for name in anew:
        for field in ("low", "high", "mean"):
            np.testing.assert_allclose(
                getattr(moved[name], field),
                getattr(anew[name], field),
                atol=FLOAT_TOLERANCE * max(abs(anew[name].high).max(), 1),
                rtol=1e-3,
                err_msg=f"{field} of {name}",
            )


def test_it_is_exact_and_its_statistics_are_those_collected_anew(model):
    graph = folded(model)
    statistics = statistics_of(graph)
    before = {name: part.low for name, part in statistics.items()}
    changed = ops(graph)
    equalize_swish(graph, statistics, swish_candidates(graph))
    # One product for each of the two swishes outside squeeze-and-excite.
    assert sorted(ops(graph)) == sorted([*changed, "scale", "scale"])
    images = values(8, side=SIDE, seed=1)
    expected = predict(model, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(compute(graph, images), expected, atol=FLOAT_TOLERANCE, rtol=1e-4)
    assert_the_same(statistics, statistics_of(graph))
    # Both checks can fail: something was divided, and one channel that is not taken back shows.
    assert any(not np.allclose(before[name], statistics[name].low) for name in before)
    statistics["expand"] = statistics["expand"].divided_by(np.array([2.0, 1, 1, 1]))
    with pytest.raises(AssertionError, match="of expand"):
        assert_the_same(statistics, statistics_of(graph))
    graph["expand"].weights["kernel"] = graph["expand"].weights["kernel"] * np.float32(1.1)
    assert abs(compute(graph, images) - expected).max() > 10 * FLOAT_TOLERANCE


def test_swishes_that_can_be_equalized(model):
    graph = folded(model)
    candidates = swish_candidates(graph)
    sources = [graph[name].inputs[0] for name in candidates]
    assert sources == ["expand", "depthwise"]  # Not that inside squeeze-and-excite.
    with pytest.raises(ValueError, match="Only a swish directly behind a convolution.*'head'"):
        equalize_swish(graph, statistics_of(graph), ["head"])


def test_a_share_takes_what_saves_most_for_each_element(model, monkeypatch):
    graph = folded(model)
    statistics, names = statistics_of(graph), swish_candidates(graph)
    first, second = names
    # Three times as many elements as the first.
    graph[second].shape = (3 * SIDE, SIDE, graph[second].shape[-1])
    gains = {first: 0.2, second: 0.3}
    sources = {id(statistics[graph[name].inputs[0]]): name for name in names}

    def search(of_source, importance):
        gain = gains[sources[id(of_source)]]
        return Factors(np.ones(1, np.float32), 0.5 - gain, 0.5)

    monkeypatch.setattr("keras_effnet.quantization.equalization.search_factors", search)
    assert best_swishes(graph, statistics, names, 1.0) == names
    # The second saves more, but not for each element.
    assert best_swishes(graph, statistics, names, 0.75) == [first]
    assert best_swishes(graph, statistics, names, 0.2) == []
    # Where the best does not fit, another one may.
    gains[second] = 0.9
    assert best_swishes(graph, statistics, names, 0.75) == [second]
    assert best_swishes(graph, statistics, names, 0.3) == [first]
    gains[first] = -0.1
    assert best_swishes(graph, statistics, names, 1.0) == [second]


# --- The search of the factors ----------------------------------------------------------------


def statistics(rows, images):
    rows = rows.astype(np.float32)
    return TensorStatistics(
        *(rows.min(axis=0), rows.max(axis=0), rows.mean(axis=0)),
        *([float(rows.min())], [float(rows.max())]),
        *(rows, np.ones(len(rows), np.float32), images),
    )


def rows_of(gains, images=16, places=64, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(images * places, len(gains))) * gains
    return rows, np.repeat(np.arange(images), places)


def test_uneven_channels_get_uneven_factors():
    gains = np.geomspace(0.5, 50, 16)
    found = search_factors(statistics(*rows_of(gains)), importance=1 / gains**2)
    assert found.noise < 0.5 * found.noise_without
    assert found.values[-1] > 5 * found.values[0]
    # 8 bits hold them: multiples of the largest / 255, none below 2 of these.
    steps = found.values / found.values.max() * FACTOR_STEPS
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert steps.min() >= SMALLEST_STEPS - 1e-3
    assert found.values.dtype == np.float32


def test_a_channel_that_fires_on_half_of_the_images_is_not_shrunk():
    # Every small channel reaches 40 on images of one half (even or odd numbers) alone. Factors
    # that fit what it does on the other half would clip it there.
    count = 16
    gains = np.full(count, 0.5)
    gains[0] = 50.0
    rows, images = rows_of(gains, images=32)
    importance = np.ones(count)
    quiet = search_factors(statistics(rows, images), importance)
    assert quiet.values[1:].max() < 0.5 * quiet.values[0]
    firing = rows.copy()
    for channel in range(1, count):
        firing[(images % 2 == channel % 2) & (np.arange(len(rows)) % 8 == 0), channel] = 40.0
    found = search_factors(statistics(firing, images), importance)
    assert np.all(found.values > 10 * SMALLEST_STEPS / FACTOR_STEPS * found.values.max())
    assert found.values[1:].min() * 1.2 > 40 * 0.5


@pytest.mark.parametrize("factor", [0.25, 1.0, 7.0])
def test_errors_behind_the_swish_are_those_of_both_roundings(factor):
    values = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)
    exact = values / (1 + np.exp(-values))
    below, below_behind, above = RANGES
    step, step_behind = (below + above) / 255 * factor, (below_behind + above) / 255 * factor
    zero, zero_behind = round(below * factor / step), round(below_behind * factor / step_behind)
    inputs = np.clip(np.round(values / step), -zero, 255 - zero) * step
    swish = inputs / (1 + np.exp(-inputs))
    outputs = np.clip(np.round(swish / step_behind), -zero_behind, 255 - zero_behind) * step_behind
    found = _squared_errors(values, exact, np.float32(factor))
    np.testing.assert_allclose(found, (outputs - exact) ** 2, rtol=1e-4, atol=1e-8)
