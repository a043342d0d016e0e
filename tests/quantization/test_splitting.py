"""Splitting: the sides of a swish add up to it, have bound scales, and share their kernel."""

import keras
import numpy as np
import pytest
from hand_made import (
    copy_of,
    folded,
    functional,
    integers_of_file,
    integers_of_model,
    layers,
    network,
    pixels,
    predict,
)

from keras_effnet.export.int8_onnx import convert_quantized as convert_to_onnx
from keras_effnet.quantization import (
    QuantizationConfig,
    analyze,
    load_calibration,
    quantize_model,
    save_calibration,
    settle,
    splitting,
)
from keras_effnet.quantization.build import build_model
from keras_effnet.quantization.calibration import calibration_batches, collect
from keras_effnet.quantization.fake_quant import OneSided
from keras_effnet.quantization.graph import kernel_owner
from keras_effnet.quantization.lowering import read_quantized, tensor_params
from keras_effnet.quantization.params import INT8_MAX, INT8_MIN, fake_quantize, kernel_scales
from keras_effnet.quantization.quantize import TRAINED
from keras_effnet.quantization.scheme import SUM_STEPS
from keras_effnet.quantization.sides import FINER, NEGATIVE, POSITIVE, sides
from keras_effnet.quantization.splitting import (
    lobes_are_shallow,
    split_candidates,
    split_swishes,
)
from keras_effnet.quantization.ties import MAX_RATIO

SPLIT = ("swish_splitting",)
CONFIG = QuantizationConfig(corrections=SPLIT)


@pytest.fixture(scope="module", autouse=True)
def small_models_are_split():
    """The blocks of small models lie at a half of the input's resolution, and reach not far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "REDUCTION", 2)
        patch.setattr(splitting, "lobes_are_shallow", lambda statistics: True)
        yield


@pytest.fixture(scope="module")
def quantized(tiny, tiny_images):
    return quantize_model(tiny, tiny_images, verbose=False)


@pytest.fixture(scope="module")
def graph(quantized):
    return read_quantized(quantized)


def split_graph(model):
    graph = folded(model)
    names = split_candidates(graph)
    split_swishes(graph, names)
    return graph, names


def without_excitation(x):
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="swish")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="swish", name="dw")(x)
    x = layers.Conv2D(6, 1, name="project")(x)
    return layers.GlobalAveragePooling2D()(x)


# --- The graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [network, without_excitation])
def test_in_float_nothing_changes(body):
    model = functional(16, body)
    graph, names = split_graph(model)
    assert len(names) == 1
    images = pixels(4)
    expected, found = predict(model, images), predict(build_model(graph, quantized=False), images)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_both_sides_are_told_from_the_structure(tiny):
    graph, (swish,) = split_graph(tiny)
    pairs = sides(graph)
    assert pairs[f"{swish}_negative"] == swish
    assert sorted(graph[name].op for name in pairs) == ["conv", "global_avg", "mul", "mul"]
    for negative, positive in pairs.items():
        assert graph[negative].op == graph[positive].op
        assert graph[negative].layer == graph[positive].layer
    assert [node.attrs["part"] for node in graph if "part" in node.attrs] == [POSITIVE, NEGATIVE]
    project = next(node for node in graph if "kernel_of" in node.attrs)
    np.testing.assert_array_equal(
        project.weights["bias"], graph[kernel_owner(project)].weights["bias"]
    )


def test_the_statistics_are_those_of_the_split_tensors(tiny, tiny_images):
    def measured(graph):
        batches, total = calibration_batches(tiny_images, graph, 8, minimum=2)
        return collect(graph, batches, total, verbose=False)

    graph = folded(tiny)
    statistics = measured(graph)
    split_swishes(graph, split_candidates(graph), statistics)
    exact = measured(graph)
    assert set(exact) <= set(statistics)
    for name, positive in sides(graph).items():
        # Of a squeeze no row tells the sides; its scale is that of the whole.
        loose = graph[name].op == "global_avg"
        for side in (name, positive):
            width = np.max(exact[side].high) - np.min(exact[side].low)
            for key in ("low", "high", "mean"):
                np.testing.assert_allclose(
                    getattr(statistics[side], key),
                    getattr(exact[side], key),
                    atol=(0.5 if loose else 1e-4) * width,
                    err_msg=f"{side} {key}",
                )


def _kept(x, **project):
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="swish")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="swish")(x)
    x = layers.Conv2D(8, name="project", **{"kernel_size": 1, **project})(x)
    return layers.GlobalAveragePooling2D()(x)


@pytest.mark.parametrize(
    "project",
    [{"kernel_size": 3}, {"strides": 2}, {"groups": 2}, {"activation": "relu"}],
    ids=str,
)
def test_other_readers_are_left_alone(project):
    assert split_candidates(folded(functional(16, lambda x: _kept(x)))) != []
    model = functional(16, lambda x: _kept(x, **project))
    graph = folded(model)
    graph["project"].attrs["activation"] = project.get("activation", "linear")
    assert split_candidates(graph) == []


def test_large_images_outputs_and_what_stays_float_are_left_alone(tiny, monkeypatch):
    (swish,) = split_candidates(folded(tiny))
    project = split_graph(tiny)[0]
    layer = next(node.layer for node in project if "kernel_of" in node.attrs)
    assert split_candidates(folded(tiny, keep_float=(layer,))) == []
    between = tiny.get_layer(swish.removesuffix("_silu")).output
    assert split_candidates(folded(keras.Model(tiny.input, [tiny.output, between]))) == []
    monkeypatch.setattr(splitting, "REDUCTION", 4)
    assert split_candidates(folded(tiny)) == []


@pytest.mark.parametrize("reach, shallow", [(5.5, False), (5.7, True)])
def test_only_swishes_that_reach_far_are_split(reach, shallow):
    def body(x):
        x = layers.DepthwiseConv2D(3, strides=2, activation="swish", name="dw")(x)
        return layers.GlobalAveragePooling2D()(layers.Conv2D(2, 1)(x))

    graph = folded(functional(16, body))
    (name,) = split_candidates(graph)
    images = pixels(4)
    batches, total = calibration_batches(images, graph, 2, minimum=2)
    found = collect(graph, batches, total, verbose=False)[name]
    found.low[:], found.high[:] = -0.28, reach
    assert lobes_are_shallow(found) == shallow


# --- The quantized model ----------------------------------------------------------------------


def test_the_sides_have_bound_scales(graph):
    pairs = sides(graph)
    assert len(pairs) == 4
    for negative, positive in pairs.items():
        below, above = graph[negative].params, graph[positive].params
        assert above.scale / below.scale == pytest.approx(FINER, rel=1e-6)
        if graph[negative].op != "conv":
            assert below.zero_point == INT8_MAX and above.zero_point == INT8_MIN


def test_no_rounding_of_the_sides_has_ties(graph):
    def scale(name):
        return np.float64(tensor_params(graph, name).scale)

    ratios = []
    for node in (graph[name] for pair in sides(graph).items() for name in pair):
        if node.op == "mul":
            ratios.append(scale(node.name) / np.prod([scale(name) for name in node.inputs]))
        elif node.op == "global_avg":
            places = np.prod(graph[node.inputs[0]].shape[:2])
            ratios.append(scale(node.name) * places / scale(node.inputs[0]))
        else:
            steps = scale(node.inputs[0]) * kernel_scales(node.weights["limits"])
            ratios.extend(scale(node.name) / steps)
            (total,) = graph.consumers(node.name)
            ratios.append(SUM_STEPS * scale(total.name) / scale(total.inputs[1]))
    ratios = np.asarray(ratios)
    np.testing.assert_allclose(ratios, np.round(ratios), rtol=1e-4)
    assert np.all(np.round(ratios) % 2 == 1) and ratios.max() <= MAX_RATIO


def test_the_model_and_litert_agree_bit_for_bit(quantized, tiny_images):
    features = keras.Model(quantized.input, quantized.get_layer("top_activation_range").output)
    expected = integers_of_model(features, tiny_images)
    np.testing.assert_array_equal(integers_of_file(features, tiny_images), expected)


def test_saved_and_loaded_it_is_the_same(quantized, graph, tiny_images, tmp_path):
    quantized.save(tmp_path / "split.keras")
    loaded = keras.models.load_model(tmp_path / "split.keras")
    np.testing.assert_array_equal(predict(loaded, tiny_images), predict(quantized, tiny_images))
    again = read_quantized(loaded)
    assert sides(again) == sides(graph)
    for node in graph:
        assert again[node.name].params == node.params
        assert kernel_owner(again[node.name]) == kernel_owner(node)


def test_files_hold_the_kernel_once(quantized, graph):
    from keras_effnet.export._optional import import_tflite_schema
    from keras_effnet.export.int8_tflite import convert_quantized

    (shared,) = (kernel_owner(node) for node in graph if "kernel_of" in node.attrs)
    schema = import_tflite_schema()
    file = schema.ModelT.InitFromPackedBuf(convert_quantized(quantized), 0).subgraphs[0]
    names = [tensor.name.decode() for tensor in file.tensors]
    assert names.count(f"{shared}/kernel") == 1
    readers = [op for op in file.operators if names.index(f"{shared}/kernel") in op.inputs]
    assert len(readers) == 2
    onnx, _ = convert_to_onnx(quantized)
    shape = graph[shared].weights["kernel"].transpose(3, 2, 0, 1).shape
    stored = [item.name for item in onnx.initializer if tuple(item.dims) == shape]
    assert stored == [f"{shared}/kernel/integers"]


def test_ranges_can_be_saved_and_used_again(tiny, tiny_images, tmp_path):
    quantized = quantize_model(tiny, tiny_images, CONFIG, verbose=False)
    save_calibration(quantized, tmp_path / "ranges.json")
    again = quantize_model(
        tiny, tiny_images, CONFIG, verbose=False, ranges=load_calibration(tmp_path / "ranges.json")
    )
    np.testing.assert_array_equal(predict(again, tiny_images), predict(quantized, tiny_images))


def test_a_trained_model_gives_its_file(tiny_images, quantized):
    trained = copy_of(quantized)
    trained.compile("sgd", "categorical_crossentropy", jit_compile=False)
    labels = np.eye(6)[np.arange(len(tiny_images)) % 6]
    trained.fit(tiny_images, labels, epochs=2, verbose=0)
    settle(trained)
    features = keras.Model(trained.input, trained.get_layer("top_activation_range").output)
    assert not np.array_equal(predict(trained, tiny_images), predict(quantized, tiny_images))
    expected = integers_of_model(features, tiny_images)
    np.testing.assert_array_equal(integers_of_file(features, tiny_images), expected)


@pytest.mark.parametrize("ranges", ["moving_average", "learned"])
def test_trained_ranges_keep_their_side(tiny, tiny_images, ranges):
    config = QuantizationConfig(corrections=SPLIT, training_ranges=ranges)
    trained = quantize_model(tiny, tiny_images, config, verbose=False)
    trained.compile("adam", "categorical_crossentropy", jit_compile=False)
    labels = np.eye(6)[np.arange(len(tiny_images)) % 6]
    trained.fit(tiny_images, labels, epochs=2, verbose=0)
    for node in read_quantized(trained):
        if node.attrs.get("part") == POSITIVE:
            assert node.params.min == 0
        elif node.attrs.get("part") == NEGATIVE:
            assert node.params.max == 0


def test_lobes_keep_levels():
    """A mean over an image of small negative values beside a channel that fires."""

    def body(x):
        x = layers.Conv2D(2, 1, strides=2, name="stem")(x)
        x = layers.DepthwiseConv2D(1, activation="swish", name="dw")(x)
        return layers.GlobalAveragePooling2D()(layers.Conv2D(2, 1, name="project")(x))

    model = functional(16, body)
    model.get_layer("stem").set_weights([np.eye(3)[None, None, :, :2], np.zeros(2)])
    model.get_layer("dw").set_weights([np.ones((1, 1, 2, 1)), np.zeros(2)])
    model.get_layer("project").set_weights([np.diag([100.0, 1.0])[None, None], np.zeros(2)])
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.05, (16, 16, 16, 3)) + rng.uniform(-2, -0.5, (16, 1, 1, 3))
    images[..., 1] = rng.uniform(0, 60, images.shape[:3])
    images = images.astype("float32")
    exact = predict(model, images)[:, 0]
    errors = {}
    for corrections in ((), SPLIT):
        config = QuantizationConfig(corrections=corrections)
        quantized = quantize_model(model, images, config, verbose=False)
        features = keras.Model(quantized.input, quantized.get_layer("project_range").output)
        found = predict(features, images)[..., 0].mean(axis=(1, 2))
        errors[corrections] = np.std(found - exact)
    assert errors[SPLIT] < 0.5 * errors[()]


def test_analysis_knows_the_sides(tiny, tiny_images, quantized, graph):
    report = analyze(tiny, quantized, tiny_images[:8], layers=None, verbose=False)
    rows = {(row.name, row.kind): row for row in report.rows}
    (shared,) = (kernel_owner(node) for node in graph if "kernel_of" in node.attrs)
    assert (shared, "kernel") in rows
    for negative, positive in sides(graph).items():
        assert (negative, "kernel") not in rows
        below, above = rows[negative, "tensor"], rows[positive, "tensor"]
        assert below.layer == above.layer
        if graph[negative].op == "mul":
            assert below.high == 0 and above.low == 0
            assert below.sqnr > 20 and above.sqnr > 20


def test_a_trained_batch_norm_is_not_split(tiny, tiny_images):
    config = QuantizationConfig(corrections=SPLIT, batch_norm=TRAINED)
    assert sides(read_quantized(quantize_model(tiny, tiny_images, config, verbose=False))) == {}


def test_one_side_is_kept():
    values = np.array([[-2.0, 0.0, 3.0]], "float32")
    np.testing.assert_array_equal(OneSided(1)(values), [[0, 0, 3]])
    np.testing.assert_array_equal(OneSided(-1)(values), [[-2, 0, 0]])
    with pytest.raises(ValueError, match=r"`sign` must be 1 or -1. Received: 2"):
        OneSided(2)


def test_the_two_ranges_round_what_one_would_clip(graph):
    """Quantizing to a range that ends at 0 is rounding and keeping one side."""
    values = np.linspace(-0.3, 4, 500, dtype=np.float32)
    for node in graph:
        if "part" in node.attrs:
            low, high = node.params.min, node.params.max
            whole = fake_quantize(values, low, high)
            side = node.attrs["part"] * np.maximum(node.attrs["part"] * values, 0)
            np.testing.assert_array_equal(whole, fake_quantize(side, low, high))
