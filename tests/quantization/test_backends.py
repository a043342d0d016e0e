"""Quantization and training under JAX and PyTorch: the same integers as under TensorFlow."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from hand_made import functional, integers_of_file, integers_of_model, network, pixels, predict

from keras_effnet.quantization import quantize_model
from keras_effnet.quantization.lowering import integer_bias, integer_kernel, read_quantized

BACKEND_CHECK = Path(__file__).with_name("quantize_backend_check.py")
# Backends sum in other orders, so statistics differ in the last places of float32 and a value that
# lies at a boundary of rounding goes the other way; learned rounding then makes up for it in the
# weights that follow. That concerns few integers, and moves them by one step or two.
KERNEL_STEPS, KERNEL_SHARE = 2, 0.02
SCALE_TOLERANCE = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_integers(backend, tmp_path):
    if not os.environ.get("CI"):
        pytest.importorskip(backend)
    model, images = functional(16, network), pixels(16)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    expected = read_quantized(quantize_model(model, images, verbose=False))
    subprocess.run(
        [sys.executable, str(BACKEND_CHECK), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": backend},
        check=True,
    )
    results = np.load(tmp_path / "results.npz")
    assert str(results["backend"]) == backend
    # What the other backend quantized and saved is loaded and exported here.
    quantized = keras.models.load_model(tmp_path / "quantized.keras")
    found = read_quantized(quantized)
    assert list(found.nodes) == list(expected.nodes)
    for node in found:
        other = expected[node.name]
        if node.params is not None:
            assert node.params.zero_point == other.params.zero_point
            assert node.params.scale == pytest.approx(other.params.scale, rel=SCALE_TOLERANCE)
        if "limits" in node.weights:
            difference = integer_kernel(node)[0].astype(int) - integer_kernel(other)[0]
            assert abs(difference).max() <= KERNEL_STEPS, node.name
            assert np.mean(difference != 0) <= KERNEL_SHARE, node.name
            (bias, steps), (other_bias, _) = (
                integer_bias(graph, part) for graph, part in ((found, node), (expected, other))
            )
            # Bias correction moves with the kernel; a bias is about as fine as the output's steps.
            assert abs((bias - other_bias) * steps).max() <= 0.5 * node.params.scale
    # The check can fail: with the kernels of another channel they differ.
    kernel = integer_kernel(found.kernel_nodes()[0])[0]
    assert np.mean(np.roll(kernel, 1, axis=-1) != kernel) > KERNEL_SHARE
    np.testing.assert_array_equal(predict(quantized, images), results["outputs"])
    np.testing.assert_array_equal(
        integers_of_file(quantized, images), integers_of_model(quantized, images)
    )
    # Trained there, saved, loaded and exported here: the file computes what the model predicted.
    for name in ("moving_average", "learned", "distilled"):
        trained = keras.models.load_model(tmp_path / f"{name}.keras")
        losses = results[f"{name}_losses"]
        assert np.all(np.isfinite(losses)) and losses[-1] < losses[0], name
        assert np.any(results[name] != results["outputs"])
        np.testing.assert_array_equal(predict(trained, images), results[name], err_msg=name)
        np.testing.assert_array_equal(
            integers_of_file(trained, images), integers_of_model(trained, images), err_msg=name
        )
