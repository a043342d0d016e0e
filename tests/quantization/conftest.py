"""A small network of the family, quantized once for all tests."""

import pytest
from hand_made import functional, network, pixels

from keras_effnet.quantization import quantize_model


@pytest.fixture(scope="session")
def tiny_images():
    return pixels(24, side=16)


@pytest.fixture(scope="session")
def tiny():
    return functional(16, network)


@pytest.fixture(scope="session")
def tiny_weights(tiny):
    """The weights of the network before it was quantized."""
    return [weight.copy() for weight in tiny.get_weights()]


@pytest.fixture(scope="session")
def tiny_quantized(tiny, tiny_weights, tiny_images):
    return quantize_model(tiny, tiny_images, verbose=False)
