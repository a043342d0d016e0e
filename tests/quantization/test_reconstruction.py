"""Kernel reconstruction against NumPy's regression, and on a network whose inputs are distorted."""

import keras
import numpy as np
import pytest
from eager import predict
from hand_made import (
    folded,
    functional,
    integers_of_file,
    integers_of_model,
    layers,
    network,
    pixels,
    values,
)

from keras_effnet.quantization import (
    QuantizationConfig,
    quantize,
    quantize_model,
    reconstruction,
    rescaling,
    splitting,
)
from keras_effnet.quantization.boundaries import quantized_tensor
from keras_effnet.quantization.build import build_model
from keras_effnet.quantization.graph import Node
from keras_effnet.quantization.lowering import read_quantized
from keras_effnet.quantization.params import kernel_scales
from keras_effnet.quantization.reconstruction import (
    PLACES_PER_IMAGE,
    _Regression,
    _Tape,
    _Tapes,
    reconstruct_kernels,
    reconstructed,
)
from keras_effnet.quantization.sides import POSITIVE_SUFFIX

ON, OFF = (QuantizationConfig(corrections=names) for names in (("kernel_reconstruction",), ()))


def regression(size=6, channels=4, seed=0):
    """Rows near a large mean, and outputs that are linear in them but for some noise."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(100, 1, (5, 7, 3, size)).astype("float32")
    kernel = rng.normal(size=(size, channels))
    outputs = inputs @ kernel + 3 + 0.1 * rng.normal(size=(5, 7, 3, channels))
    return inputs, outputs.astype("float32"), kernel


def projection(kernel, limit=4.0):
    """A node with a 1 x 1 kernel of the shape (inputs, outputs)."""
    channels = kernel.shape[1]
    weights = {"kernel": kernel[None, None], "limits": np.full(channels, limit, np.float32)}
    return Node("project", "conv", [], (7, 3, channels), "project", weights=weights)


def solved(node, inputs, outputs, images):
    """The kernel and the bias that are fitted near those of a node, and the step of the kernel."""
    fit = _Regression(node)
    for x, y in zip(np.split(inputs, images), np.split(outputs, images), strict=True):
        fit.add(x, y)
    found, bias = fit.solve()
    step = float(kernel_scales(node.weights["limits"])[0])
    assert found.shape == node.weights["kernel"].shape
    np.testing.assert_allclose(found / step, np.round(found / step), atol=1e-4)
    return found, bias, step


def fitted(inputs, outputs, kernel, limit=4.0, images=5):
    found, bias, step = solved(projection(kernel, limit), inputs, outputs, images)
    return found[0, 0], bias, step


def plain_regression(inputs, outputs):
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    return np.linalg.lstsq(design, outputs.reshape(len(rows), -1), rcond=None)[0][:-1]


def test_it_is_the_rounded_regression():
    inputs, outputs, kernel = regression()
    found, bias, step = fitted(inputs, outputs, np.zeros_like(kernel))
    expected = plain_regression(inputs, outputs)
    # Damped by a thousandth of the variance, and rounded, not always to the nearest step.
    assert np.abs(found - expected).max() < 1.5 * step
    missing = outputs - inputs @ found.astype(np.float64) - bias
    np.testing.assert_allclose(missing.mean(axis=(0, 1, 2)), 0, atol=1e-5)


def test_outputs_of_chance_are_not_learned():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 3, 3, 12)).astype("float32")
    kernel = rng.normal(size=(12, 4))
    outputs = (inputs @ kernel + 5 + 30 * rng.normal(size=(40, 3, 3, 4))).astype("float32")
    found, _, step = fitted(inputs, outputs, kernel)
    learned = plain_regression(inputs, outputs)
    assert np.linalg.norm(found - kernel) < 0.2 * np.linalg.norm(learned - kernel)


def test_one_image_changes_the_bias_alone():
    inputs, outputs, kernel = regression()
    found, bias, step = fitted(inputs[:1], outputs[:1], kernel + 1, images=1)
    np.testing.assert_allclose(found, kernel + 1, atol=1.5 * step)
    expected = (outputs[0] - inputs[0].astype(np.float64) @ found).mean(axis=(0, 1))
    np.testing.assert_allclose(bias, expected, atol=1e-4)


def test_a_kernel_stays_where_the_data_say_nothing():
    inputs, outputs, kernel = regression()
    inputs[..., 2] = 100
    found, _, step = fitted(inputs, outputs, kernel + 1)
    np.testing.assert_allclose(found[2], kernel[2] + 1, atol=step / 2 + 1e-6)
    np.testing.assert_allclose(found[3], kernel[3], atol=0.1)


def test_limits_that_are_too_narrow_make_it_no_worse():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(40, 3, 3, 1))
    inputs = (common + 0.01 * rng.normal(size=(40, 3, 3, 2))).astype("float32")
    # The best weights are large and of different signs; clipped they would be 0 together.
    outputs = (inputs @ np.array([[100.0], [-99.0]])).astype("float32")
    given = np.array([[1.0], [0.0]])
    found, bias, _ = fitted(inputs, outputs, given, limit=1.0)
    errors = [np.var(outputs - inputs @ kernel) for kernel in (found, given)]
    assert errors[0] <= errors[1]


def test_large_images_count_by_some_of_their_places():
    fit = _Regression(projection(np.zeros((3, 3))))
    fit.add(values(2, 32), values(2, 32, seed=1))
    rows = sum(group.rows for group in fit.groups)
    assert rows == 2 * PLACES_PER_IMAGE["conv"] < 2 * 32 * 32


def depthwise(side=8, channels=3, limit=4.0, **options):
    """A depthwise layer with random weights, and the node that its kernel is fitted near."""
    layer = functional(side, layers.DepthwiseConv2D(3, **options), channels).layers[-1]
    attrs = {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation": layer.dilation_rate,
        "activation": "linear",
    }
    weights = {
        "kernel": np.zeros(layer.kernel.shape, np.float32),
        "limits": np.full(channels, limit, np.float32),
    }
    node = Node("depthwise", "depthwise", [], layer.output.shape[1:], "", attrs, weights)
    return layer, node


@pytest.mark.parametrize(
    "options",
    [{"padding": "same"}, {"strides": 2, "padding": "same"}, {"dilation_rate": 2}, {"strides": 2}],
    ids=str,
)
def test_a_depthwise_kernel_is_found_again(options):
    layer, node = depthwise(**options)
    inputs = values(12, 8) + 5
    found, bias, step = solved(node, inputs, np.asarray(layer(inputs)), images=4)
    # Damped by a thousandth of the variance, and rounded, not always to the nearest step.
    np.testing.assert_allclose(found, np.asarray(layer.kernel), atol=1.5 * step)
    missing = layer(inputs) - keras.ops.depthwise_conv(
        inputs, found, layer.strides, layer.padding, dilation_rate=layer.dilation_rate
    )
    np.testing.assert_allclose(bias, np.mean(missing, axis=(0, 1, 2)), atol=1e-4)


def test_each_depthwise_channel_has_a_damping_of_its_own():
    layer, node = depthwise(padding="same")
    inputs = values(40, 8)
    outputs = np.array(layer(inputs))
    outputs[..., 1] = 30 * values(40, 8, seed=1)[..., 1]
    inputs[..., 2] = 7
    found, bias, step = solved(node, inputs, outputs, images=4)
    np.testing.assert_allclose(found[:, :, 0], np.asarray(layer.kernel)[:, :, 0], atol=1.5 * step)
    # Chance and a channel that is constant but for the padding at its border tell little.
    patches = np.stack([np.roll(inputs[..., 1], shift, (1, 2)) for shift in np.ndindex(3, 3)], -1)
    learned = plain_regression(patches, outputs[..., 1:2])
    assert np.linalg.norm(found[:, :, 1]) < 0.3 * np.linalg.norm(learned)
    assert np.all(np.isfinite(found)) and np.all(np.isfinite(bias))


FITTED = ("depthwise_1", "project_1", "depthwise_2", "project_2")


@pytest.fixture(scope="module")
def model():
    """Two blocks behind each other; clipped ranges distort what reaches their projections."""

    def body(x):
        x = layers.Conv2D(8, 3, strides=2, padding="same", activation="swish")(x)
        for number in (1, 2):
            x = layers.Conv2D(24, 1, activation="swish", name=f"expand_{number}")(x)
            x = layers.DepthwiseConv2D(
                3, padding="same", activation="swish", name=f"depthwise_{number}"
            )(x)
            x = layers.Conv2D(6, 1, name=f"project_{number}")(x)
        x = layers.Conv2D(12, 1, activation="swish", name="top")(x)
        return layers.Dense(4)(layers.GlobalAveragePooling2D()(x))

    return functional(16, body)


@pytest.fixture
def clipped(monkeypatch):
    """Ranges of which a third is missing."""
    from keras_effnet.quantization.params import QuantParams

    find = quantize.find_range

    def narrow(*arguments):
        found = find(*arguments)
        return QuantParams.from_range(found.min * 2 / 3, found.max * 2 / 3)

    monkeypatch.setattr(quantize, "find_range", narrow)


def errors(model, quantized, images, names=FITTED, divisors=None):
    """Relative squared errors of the outputs of convolutions."""
    found = {}
    graph = folded(model)
    for name in names:
        exact = predict(build_model(graph, quantized=False, observed=(name,)), images)
        exact = exact / (divisors or {}).get(name, 1)
        tensor = quantized.get_layer(name).output
        missing = predict(keras.Model(quantized.inputs[0], tensor), images) - exact
        found[name] = np.mean(missing**2) / np.var(exact)
    return found


def test_outputs_come_nearer_to_the_float_model_on_other_images(model, clipped):
    images, others = values(16), values(16, seed=1)
    before, after = (
        errors(model, quantize_model(model, images, config, verbose=False), others)
        for config in (OFF, ON)
    )
    # Each is fitted behind those before it, as they are now.
    for name in FITTED:
        assert after[name] < 0.7 * before[name], name


def test_only_depthwise_kernels_and_projections_change(model, clipped):
    plain, changed = (
        read_quantized(quantize_model(model, values(), config, verbose=False))
        for config in (OFF, ON)
    )
    for node in plain.kernel_nodes():
        same = np.array_equal(node.weights["kernel"], changed[node.name].weights["kernel"])
        assert same == (node.name not in FITTED), node.name
        limits = changed[node.name].weights["limits"]
        if node.op == "depthwise":
            limits = limits[:, None]
        if node.op != "dense":
            assert np.all(np.abs(changed[node.name].weights["kernel"]) <= limits * (1 + 1e-6))


def test_layers_in_float_and_expansions_are_left_out(model):
    graph = folded(model)
    assert tuple(reconstructed(graph, graph)) == FITTED
    kept = folded(model, keep_float=("project_1", "depthwise_2"))
    assert list(reconstructed(kept, kept)) == ["depthwise_1", "project_2"]


@pytest.mark.parametrize("correction", ["swish_equalization", "swish_rescaling"])
def test_depthwise_outputs_are_fitted_in_the_units_of_the_quantized_model(
    correction, model, clipped, monkeypatch
):
    divisors = {}
    fit = quantize.reconstruct_kernels

    def noted(teacher, graph, *arguments):
        for node in graph:
            divisors[node.name] = node.weights.get("divisors", 1)
        fit(teacher, graph, *arguments)

    monkeypatch.setattr(quantize, "reconstruct_kernels", noted)
    monkeypatch.setattr(rescaling, "LEAST_GAIN", -1.0)
    plain, changed = (
        quantize_model(
            model, values(16), QuantizationConfig(corrections=names, equalize="all"), verbose=False
        )
        for names in ((correction,), (correction, "kernel_reconstruction"))
    )
    assert np.ptp(divisors["depthwise_1"]) > 0
    before, after = (
        errors(model, each, values(16, seed=1), divisors=divisors) for each in (plain, changed)
    )
    for name in FITTED:
        assert after[name] < before[name], name


def test_a_depthwise_kernel_may_read_a_boundary(clipped):
    """As in blocks without expansion."""

    def body(x):
        x = layers.Conv2D(6, 1, name="project_0")(layers.Conv2D(8, 3, activation="swish")(x))
        x = layers.DepthwiseConv2D(3, activation="swish", name="depthwise_1")(x)
        x = layers.Conv2D(6, 1, name="project_1")(x)
        return layers.Dense(4)(layers.GlobalAveragePooling2D()(x))

    model = functional(16, body)
    before, after = (
        errors(
            model,
            quantize_model(model, values(16), config, verbose=False),
            values(16, seed=1),
            ("depthwise_1", "project_1"),
        )
        for config in (OFF, ON)
    )
    assert all(after[name] < before[name] for name in after)


def test_nothing_to_fit_is_no_error():
    model = functional(8, lambda x: layers.Conv2D(4, 3, activation="relu")(x))
    assert reconstructed(folded(model), folded(model)) == {}
    quantize_model(model, values(side=8), ON, verbose=False)


def test_an_image_counts_once_in_any_batches(model):
    whole, parts = (
        quantize_model(model, values(16), config, verbose=False)
        for config in (
            ON,
            QuantizationConfig(corrections=("kernel_reconstruction",), batch_size=4),
        )
    )
    for name in ("project_1", "project_2"):
        np.testing.assert_allclose(
            whole.get_layer(name).real_kernel(), parts.get_layer(name).real_kernel(), atol=1e-3
        )


# The floats of a boundary, 8 x 8 x 6, and of the input of a projection, 8 x 8 x 24.
BOUNDARY, INSIDE = 8 * 8 * 6, 8 * 8 * 24


@pytest.mark.parametrize(
    "kept", [2 * BOUNDARY, BOUNDARY + INSIDE], ids=["boundaries", "all positions"]
)
def test_each_model_goes_on_from_its_own_tensors(kept, model, clipped, monkeypatch):
    teacher = folded(model)
    graph = read_quantized(quantize_model(model, values(), OFF, verbose=False))
    batches = [values(4), values(4, seed=1)]
    monkeypatch.setattr(reconstruction, "BYTES_KEPT", 4 * 8 * kept)
    tapes = _Tapes(teacher, graph, batches)
    models = [tape.model for tape in (tapes.teacher, tapes.student)]
    positions = []
    for name in ("project_1", "project_2"):
        inputs = graph[name].inputs
        found = list(tapes.run(name, inputs))
        positions.append((tapes.teacher.live, tapes.student.live))
        tensors = [models[0].get_layer(name).output, quantized_tensor(models[1], *inputs)]
        for each, batch in zip(found, batches, strict=True):
            for own, tensor, whole in zip(each, tensors, models, strict=True):
                exact = predict(keras.Model(whole.inputs[0], tensor), batch)
                # A value near a half of a step may be rounded the other way.
                assert np.mean(np.abs(own - exact) > 1e-5) < 0.01
        of_float = models[0].get_layer(*inputs).output
        exact = predict(keras.Model(models[0].inputs[0], of_float), batch)
        assert np.mean(np.abs(each[1] - exact)) > 1e-3, "or both would be the float model"
    inside = [([name], graph[name].inputs) for name in ("project_1", "project_2")]
    # Without the room they stay at the images, and then at the first boundary.
    outside = [([], []), (["project_1"], ["project_1"])]
    assert positions == (outside if kept == 2 * BOUNDARY else inside)


def test_what_passes_a_layer_by_is_kept():
    """The other side of a sum, and what is read twice."""
    graph, images = folded(functional(8, residual)), values(2, 8)
    tape = _Tape(graph, False, [images])
    before, inside, total = (
        predict(keras.Model(tape.model.inputs[0], tape.model.get_layer(name).output), images)
        for name in ("before", "inside", "sum")
    )
    assert list(tape.run(["inside"], tape.position(["inside"]))) == [[pytest.approx(inside)]]
    assert tape.live == ["before", "inside"]
    np.testing.assert_array_equal(tape.kept[0][0], before)
    assert list(tape.run(["sum"], tape.position(["sum"]))) == [[pytest.approx(total)]]
    assert tape.live == ["sum"]


def residual(x):
    before = layers.Conv2D(4, 3, padding="same", name="before")(x)
    inside = layers.Conv2D(8, 1, activation="relu", name="inside")(before)
    inside = layers.Conv2D(4, 1, name="project")(inside)
    return layers.Conv2D(2, 1, name="after")(layers.Add(name="sum")([before, inside]))


def test_of_many_images_every_nth_batch_is_kept(model, monkeypatch):
    graph = read_quantized(quantize_model(model, values(), OFF, verbose=False))
    seen = []
    add = _Regression.add
    monkeypatch.setattr(
        _Regression, "add", lambda self, x, y: (seen.append(len(x)), add(self, x, y))
    )
    batches = [values(2, seed=seed) for seed in range(6)]
    # The tensors of the first boundary, 8 x 8 x 6 floats of both models, for 5 of 12 images.
    monkeypatch.setattr(reconstruction, "BYTES_KEPT", 5 * 2 * 4 * 8 * 8 * 6)
    reconstruct_kernels(folded(model), graph, batches, verbose=False)
    assert seen == [2, 2] * len(FITTED)


@pytest.mark.parametrize("shallow", [True, False])
def test_both_sides_of_a_split_projection_share_the_fit(shallow, monkeypatch):
    monkeypatch.setattr(splitting, "REDUCTION", 2)
    monkeypatch.setattr(splitting, "lobes_are_shallow", lambda statistics: shallow)
    model, images = functional(16, network), pixels(16)
    names = "swish_equalization", "swish_splitting", "kernel_reconstruction"
    plain, changed = (
        quantize_model(model, images, QuantizationConfig(corrections=kept), verbose=False)
        for kept in (names[:2], names)
    )
    fitted_ones = {
        name: owner
        for name, owner in reconstructed(folded(model), read_quantized(changed)).items()
        if isinstance(model.get_layer(name), layers.Conv2D)
    }
    assert any(name.endswith(POSITIVE_SUFFIX) for name in fitted_ones.values()) == shallow
    before, after = (errors(model, each, images, fitted_ones) for each in (plain, changed))
    for name, owner in fitted_ones.items():
        assert after[name] < before[name]
        moved = changed.get_layer(owner).real_kernel() != plain.get_layer(owner).real_kernel()
        assert moved.any()
    np.testing.assert_array_equal(
        integers_of_model(changed, images), integers_of_file(changed, images)
    )
