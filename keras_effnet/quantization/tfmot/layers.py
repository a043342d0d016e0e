"""tf_keras layers and activations that a twin needs and tf_keras lacks.

Importing this module needs tf_keras and tensorflow-model-optimization; see `_packages`.
"""

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.clustering.keras import ClusterableLayer
from tensorflow_model_optimization.sparsity.keras import PrunableLayer

from ..params import INT8_MAX, INT8_MIN

_register = tf_keras.utils.register_keras_serializable(package="keras_effnet")


@_register
def relu6(x):
    """ReLU that ends at 6."""
    return tf.nn.relu6(x)


@_register
def hard_swish(x):
    """x * relu6(x + 3) / 6 (Howard et al., 2019, https://arxiv.org/abs/1905.02244)."""
    return x * tf.nn.relu6(x + 3) * (1 / 6)


@_register
def relu6_sigmoid(x):
    """relu6(x + 3) / 6: the hard sigmoid of Keras 3, which is steeper than that of tf_keras."""
    return tf.nn.relu6(x + 3) * (1 / 6)


class _Untouched(PrunableLayer, ClusterableLayer):
    """A layer that pruning and clustering leave as it is; unknown ones they refuse."""

    def get_prunable_weights(self):
        return []

    def get_clusterable_weights(self):
        return []


@_register
class Rescaling(_Untouched, tf_keras.layers.Rescaling):
    """`tf_keras.layers.Rescaling` in models that are pruned or clustered."""


@_register
class Normalization(_Untouched, tf_keras.layers.Normalization):
    """`tf_keras.layers.Normalization` in models that are pruned or clustered."""


@_register
class PixelShift(_Untouched, tf_keras.layers.Layer):
    """Adds integers to 8-bit pixels; see `fake_quant.PixelShift`.

    Args:
        offsets: Integers, one for each channel.
        name: Name of the layer.
    """

    def __init__(self, offsets, **kwargs):
        super().__init__(**kwargs)
        self.offsets = [int(offset) for offset in offsets]

    def call(self, inputs):
        # Integers of scale 1: the converter by itself would choose another scale and round them.
        middle = (min(self.offsets) + max(self.offsets)) // 2
        zero_point = int(np.clip(-middle, INT8_MIN, INT8_MAX))
        constant = tf.quantization.fake_quant_with_min_max_args(
            tf.constant(self.offsets, inputs.dtype),
            min=INT8_MIN - zero_point,
            max=INT8_MAX - zero_point,
        )
        return inputs + constant

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "offsets": self.offsets}


@_register
class ChannelScale(_Untouched, tf_keras.layers.Layer):
    """Multiplies each channel by a positive constant of 8 bits; see `fake_quant.ChannelScale`.

    Args:
        factors: Positive numbers, one for each channel.
        name: Name of the layer.
    """

    def __init__(self, factors, **kwargs):
        super().__init__(**kwargs)
        self.factors = [float(factor) for factor in factors]

    def call(self, inputs):
        factors = tf.constant(self.factors, inputs.dtype)
        high = max(self.factors)
        return inputs * tf.quantization.fake_quant_with_min_max_args(factors, min=0, max=high)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "factors": self.factors}
