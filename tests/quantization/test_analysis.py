"""`analyze` and selective precision, on a network small enough to quantize in a second."""

import json

import keras
import numpy as np
import pytest

from keras_effnet.export import TFLiteRunner
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.quantization import (
    QuantizationConfig,
    analyze,
    fewest_float_layers,
    quantize_model,
)
from keras_effnet.quantization.lowering import read_quantized

CONFIG = QuantizationConfig(corrections=("swish_equalization",))
PLAIN = QuantizationConfig(method="min_max", corrections=())
# Of float arithmetic in another order.
ROUNDING = 1e-5
# Two steps of the softmax output: integer kernels round products once more than float does.
OUTPUT_TOLERANCE = 2 / 256


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((16, 16, 3), name="images")
    x = layers.Rescaling(1 / 255, name="rescaling")(images)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(x)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = start = layers.Activation("swish", name="stem_swish")(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(name="depthwise_bn")(x)
    x = layers.Activation("swish", name="depthwise_swish")(x)
    x = layers.Conv2D(8, 1, use_bias=False, name="project")(x)
    x = layers.BatchNormalization(name="project_bn")(x)
    x = layers.Activation("swish", name="project_swish")(x)
    x = layers.Dropout(0.2, name="drop")(x)
    x = layers.Add(name="add")([x, start])
    x = layers.Conv2D(16, 1, name="top")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(5, activation="softmax", name="predictions")(x)
    model = keras.Model(images, x, name="small")
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    # Scores far enough apart that images differ in their class.
    dense = model.get_layer("predictions")
    dense.set_weights([8 * dense.get_weights()[0], dense.get_weights()[1]])
    return model


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(1)
    colours = random.uniform(0, 255, (24, 1, 1, 3))
    return np.clip(random.normal(colours, 30, (24, 16, 16, 3)), 0, 255).round().astype("float32")


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize_model(model, images, CONFIG, verbose=False)


@pytest.fixture(scope="module")
def analysis(model, quantized, images):
    return analyze(model, quantized, images, verbose=False)


def broken(quantized, name, factor):
    """The quantized model with one range shrunk."""
    changed = keras.models.clone_model(quantized)
    changed.set_weights(quantized.get_weights())
    layer = changed.get_layer(f"{name}_range")
    layer.minimum.assign(layer.minimum * factor)
    layer.maximum.assign(layer.maximum * factor)
    return changed


def test_there_is_a_row_for_each_kernel_and_range(analysis, quantized):
    graph = read_quantized(quantized)
    kernels = {row.name for row in analysis.rows if row.kind == "kernel"}
    tensors = {row.name for row in analysis.rows if row.kind == "tensor"}
    assert kernels == {node.name for node in graph.kernel_nodes()}
    assert tensors == {node.name for node in graph if node.params is not None}
    assert analysis.images == 24
    for row in analysis.rows:
        assert row.sqnr > 15, row
        assert 0 <= row.clipped < 0.2 and 0 <= row.dead_levels < 256, row
        if row.kind == "tensor":
            assert (row.scale, row.zero_point) == (
                graph[row.name].params.scale,
                graph[row.name].params.zero_point,
            )


def test_ratio_of_a_kernel_equals_the_reference(model, images):
    quantized = quantize_model(model, images, PLAIN, verbose=False)
    row = next(
        row
        for row in analyze(model, quantized, images, layers=(), verbose=False).rows
        if (row.name, row.kind) == ("predictions", "kernel")
    )
    kernel = model.get_layer("predictions").get_weights()[0].astype("float64")
    error = keras.ops.convert_to_numpy(quantized.get_layer("predictions").quantized_kernel())
    expected = 10 * np.log10(np.sum(kernel**2) / np.sum((error - kernel) ** 2))
    assert row.sqnr == pytest.approx(expected, rel=1e-4)
    assert row.high == pytest.approx(kernel.max(), rel=1e-6)


def test_total_is_the_difference_of_the_two_models(analysis, model, quantized, images):
    exact, found = (m.predict(images, verbose=0).astype("float64") for m in (model, quantized))
    changed = np.mean(exact.argmax(-1) != found.argmax(-1))
    assert analysis.total.agreement_loss == pytest.approx(changed)
    noise = np.sum((found - exact) ** 2) / np.sum(exact**2)
    assert analysis.total.noise == pytest.approx(noise, rel=0.02, abs=ROUNDING)
    assert analysis.total.noise > 0


@pytest.mark.parametrize("name, layer", [("top", "top"), ("depthwise", "depthwise")])
def test_a_collapsed_range_is_found(model, quantized, images, analysis, name, layer):
    changed = broken(quantized, name, 0.05)
    found = analyze(model, changed, images, verbose=False)
    assert found.worst()[0] == layer
    rows = {(row.name, row.kind): row for row in found.rows}
    before = {(row.name, row.kind): row for row in analysis.rows}
    assert rows[name, "tensor"].clipped > 0.3 > before[name, "tensor"].clipped
    assert rows[name, "tensor"].sqnr < before[name, "tensor"].sqnr - 10
    assert found.total.noise > 3 * analysis.total.noise


def test_the_equalized_model_alone_loses_nothing(model, quantized, analysis):
    # Factors taken for errors would show as a loss of layers whose rounding is tiny.
    losses = {loss.layer: loss for loss in analysis.losses}
    assert losses["images"].noise < ROUNDING


def test_layers_can_be_chosen(model, quantized, images):
    found = analyze(model, quantized, images, layers=["top"], verbose=False)
    assert [loss.layer for loss in found.losses] == ["top"]
    with pytest.raises(ValueError, match="names of quantized layers.*predictions.*'nowhere'"):
        analyze(model, quantized, images, layers=["nowhere"], verbose=False)


def test_another_model_is_refused(model, quantized, images):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    with pytest.raises(ValueError, match="was made of another model"):
        analyze(keras.Model(inputs, x), quantized, images, verbose=False)
    with pytest.raises(ValueError, match="is not quantized"):
        analyze(model, model, images, verbose=False)


def test_table_and_json(analysis, tmp_path):
    table = analysis.table()
    assert len(table.splitlines()) == len(analysis.rows) + 2
    assert "depthwise_swish" in table
    analysis.save(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["model"] == "small"
    assert len(written["rows"]) == len(analysis.rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_plot(analysis, tmp_path):
    pytest.importorskip("matplotlib")
    analysis.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- Selective precision -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        ("depthwise",),
        ("depthwise_bn",),
        ("predictions",),
        ("drop",),
        ("project", "project_swish"),
        ("stem_swish",),
    ],
)
def test_layers_kept_in_float_predict_and_run(kept, model, images, tmp_path):
    config = QuantizationConfig(
        method="min_max", corrections=("swish_equalization", "bias_correction"), keep_float=kept
    )
    quantized = quantize_model(model, images, config, verbose=False)
    graph = read_quantized(quantized)
    floats = {node.name for node in graph if node.is_float}
    expected = {"depthwise_bn": "depthwise"}.get(kept[0], kept[0])
    assert expected in floats
    found = quantized.predict(images, verbose=0)
    assert np.abs(found - model.predict(images, verbose=0)).max() < 0.2
    path = tmp_path / "m.tflite"
    path.write_bytes(convert_quantized(quantized, "uint8"))
    assert np.abs(TFLiteRunner(path).predict(images) - found).max() <= OUTPUT_TOLERANCE
    # The analysis knows such models too: what is float has no kernel to analyze.
    rows = analyze(model, quantized, images, layers=(), verbose=False).rows
    assert floats.isdisjoint(row.name for row in rows if row.kind == "kernel")


def test_nothing_is_kept_where_nothing_is_needed(model, images):
    assert fewest_float_layers(model, images, images, 0.1, PLAIN, verbose=False) == ()


def test_the_worst_layer_is_kept_first(model, images, monkeypatch):
    calls = []

    def quantize(model, data, config, verbose):
        calls.append(config.keep_float)
        quantized = quantize_model(model, data, config, verbose)
        return quantized if "top" in config.keep_float else broken(quantized, "top", 0.01)

    monkeypatch.setattr("keras_effnet.quantization.analysis.quantize_model", quantize)
    found = fewest_float_layers(model, images, images, 0.9, PLAIN, verbose=False)
    assert found == ("top",)
    assert calls == [(), ("top",)]


def test_out_of_reach_names_the_best(model, images, monkeypatch):
    def quantize(model, data, config, verbose):
        return broken(quantize_model(model, data, config, verbose), "predictions", 0.01)

    monkeypatch.setattr("keras_effnet.quantization.analysis.quantize_model", quantize)
    with pytest.raises(ValueError, match="is out of reach. The best, .*%, is reached with"):
        fewest_float_layers(model, images, images, 1.0, PLAIN, most=0, verbose=False)


def test_bad_requests_are_named(model, images):
    with pytest.raises(ValueError, match="`agreement` must be a share.*98"):
        fewest_float_layers(model, images, images, 98)
    with pytest.raises(ValueError, match="`most` must be"):
        fewest_float_layers(model, images, images, 0.9, most=-1)
    with pytest.raises(TypeError, match="`evaluation_data` are read several times"):
        fewest_float_layers(model, images, iter([images]), 0.9)
