"""What reads a tensor, found in the graph."""

import numpy as np
import pytest
from hand_made import folded, functional, layers

from keras_effnet.quantization.importance import consumer_of


def network(x):
    x = layers.Conv2D(4, 3, activation="swish", name="swished")(x)
    x = layers.Conv2D(4, 1, activation="hard_swish", name="hard")(x)
    x = layers.Conv2D(4, 1, name="plain")(x)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(x)
    x = layers.GlobalAveragePooling2D()(layers.Multiply()([x, gate]))
    return layers.Dense(3, activation="softmax", name="scores")(x)


@pytest.fixture(scope="module")
def graph():
    return folded(functional(8, network))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("swished", "swish"),
        ("hard", "hard_swish"),
        ("gate", "sigmoid"),
        ("scores", "softmax"),
    ],
)
def test_the_error_of_a_tensor_is_measured_behind_its_function(graph, name, function):
    assert consumer_of(graph, name).function == function


def test_importance_is_the_energy_of_the_kernels_that_read_the_channels(graph):
    kernel = graph["hard"].weights["kernel"].astype(np.float64)
    energy = np.sum(kernel**2, axis=(0, 1, 3))
    importance = consumer_of(graph, "swished").importance
    np.testing.assert_allclose(importance, energy / energy.mean(), rtol=1e-6)


@pytest.mark.parametrize("activation", ["linear", "relu", "relu6", "hard_swish", "swish"])
def test_a_depthwise_convolution_passes_importance_on_channel_by_channel(activation):
    def separable(x):
        other = layers.Conv2D(4, 3, name="other")(x)
        x = layers.Conv2D(4, 1, name="expand")(x)
        x = layers.DepthwiseConv2D(3, name="deep")(x)
        # Behind a sum, so that no kernel takes the activation in.
        x = layers.Activation(activation)(layers.Add()([x, other]))
        return layers.Conv2D(5, 1, name="project")(x)

    graph = folded(functional(8, separable))
    kernels = [graph[name].weights["kernel"].astype(np.float64) for name in ("deep", "project")]
    energy = np.sum(kernels[0] ** 2, axis=(0, 1, 3)) * np.sum(kernels[1] ** 2, axis=(0, 1, 3))
    importance = consumer_of(graph, "expand").importance
    np.testing.assert_allclose(importance, energy / energy.mean(), rtol=1e-6)
