"""How tensorflow-model-optimization quantizes the layers of the family.

The rules are those of `scheme.py`: every tensor that the integer kernels write has a range of its
own or a fixed one, kernels are symmetric with one scale for each output channel.

Importing this module needs tf_keras and tensorflow-model-optimization; see `_packages`.
"""

import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import (
    QuantizeLayer,
)
from tensorflow_model_optimization.quantization.keras import (
    QuantizeConfig,
    QuantizeLayoutTransform,
    QuantizeRegistry,
    QuantizeScheme,
    QuantizeWrapperV2,
)
from tensorflow_model_optimization.quantization.keras.quantizers import (
    LastValueQuantizer,
    MovingAverageQuantizer,
)

_register = tf_keras.utils.register_keras_serializable(package="keras_effnet")

# Layers with a kernel: the attribute that holds it and the axis of its output channels.
KERNELS = {
    "Conv2D": ("kernel", 3),
    "DepthwiseConv2D": ("depthwise_kernel", 2),
    "Dense": ("kernel", None),
}


@_register
class TensorQuantizer(MovingAverageQuantizer):
    """Rounds a tensor to the 256 levels of one range.

    Args:
        minimum: Smallest real value at first, at most 0.
        maximum: Largest real value at first, at least 0.
        moving: Whether the range follows the moving average of what training shows, as that of
            tfmot's own quantizer does; otherwise it stays.
    """

    def __init__(self, minimum, maximum, moving=False):
        super().__init__(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.moving = moving

    def build(self, tensor_shape, name, layer):
        return {
            f"{end}_var": layer.add_weight(
                f"{name}_{end}",
                initializer=tf_keras.initializers.Constant(value),
                trainable=False,
            )
            for end, value in (("min", self.minimum), ("max", self.maximum))
        }

    def __call__(self, inputs, training, weights, **kwargs):
        return super().__call__(inputs, training and self.moving, weights, **kwargs)

    def get_config(self):
        return {"minimum": self.minimum, "maximum": self.maximum, "moving": self.moving}


class KernelQuantizer(LastValueQuantizer):
    """Rounds a kernel to integers in [-127, 127]; while it trains, its limits follow it.

    Args:
        kernel: The variable; its present values set the first limits and the mask.
        axis: Axis of the output channels, each with a scale of its own; None for one scale.
        preserve_sparsity: Whether weights that are zero now stay zero.
    """

    def __init__(self, kernel, axis, preserve_sparsity):
        per_axis = axis is not None
        super().__init__(num_bits=8, per_axis=per_axis, symmetric=True, narrow_range=True)
        self.kernel, self.axis = kernel, axis
        self.preserve_sparsity = preserve_sparsity

    def build(self, tensor_shape, name, layer):
        values = self.kernel.numpy()
        axes = tuple(axis for axis in range(values.ndim) if axis != self.axis)
        limits = np.abs(values).max(axis=axes if self.per_axis else None)
        # A dead channel may take any limit: it holds zeros.
        limits = np.where(limits > 0, limits, 1.0).astype(np.float32)
        found = {
            "min_var": self._add(layer, f"{name}_min", -limits),
            "max_var": self._add(layer, f"{name}_max", limits),
        }
        if self.preserve_sparsity:
            found["mask"] = self._add(layer, f"{name}_mask", (values != 0).astype(np.float32))
        return found

    def _add(self, layer, name, values):
        initializer = tf_keras.initializers.Constant(values)
        return layer.add_weight(name, shape=values.shape, initializer=initializer, trainable=False)

    def __call__(self, inputs, training, weights, **kwargs):
        if self.preserve_sparsity:
            inputs = inputs * weights["mask"]
        low, high = weights["min_var"], weights["max_var"]
        if training:
            axes = [axis for axis in range(inputs.shape.rank) if axis != self.axis]
            limits = tf.reduce_max(tf.abs(inputs), axis=axes if self.per_axis else None)
            limits = tf.where(limits > 0, limits, tf.ones_like(limits))
            low, high = low.assign(-limits), high.assign(limits)
        if not self.per_axis:
            return tf.quantization.fake_quant_with_min_max_vars(
                inputs, low, high, narrow_range=True
            )
        # TensorFlow's operation takes the channels from the last axis alone.
        order = list(range(inputs.shape.rank))
        order[self.axis], order[-1] = order[-1], order[self.axis]
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            tf.transpose(inputs, order), low, high, narrow_range=True
        )
        return tf.transpose(rounded, order)


@_register
class LayerConfig(QuantizeConfig):
    """How one layer is quantized: its kernel, if it has one, and its output.

    Args:
        minimum: Smallest real value of the output at first.
        maximum: Largest real value of the output at first.
        moving: See `TensorQuantizer`.
        preserve_sparsity: See `KernelQuantizer`.
    """

    def __init__(self, minimum, maximum, moving=False, preserve_sparsity=False):
        self.output = TensorQuantizer(minimum, maximum, moving)
        self.preserve_sparsity = preserve_sparsity

    def get_weights_and_quantizers(self, layer):
        if type(layer).__name__ not in KERNELS:
            return []
        name, axis = KERNELS[type(layer).__name__]
        kernel = getattr(layer, name)
        return [(kernel, KernelQuantizer(kernel, axis, self.preserve_sparsity))]

    def set_quantize_weights(self, layer, quantize_weights):
        for weight in quantize_weights:
            setattr(layer, KERNELS[type(layer).__name__][0], weight)

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        pass  # They stay: the output is quantized behind them.

    def get_output_quantizers(self, layer):
        return [self.output]

    def get_config(self):
        return {**self.output.get_config(), "preserve_sparsity": self.preserve_sparsity}


# AutoGraph has nothing to convert in the calls below, and takes most of the time that building a
# model needs to find that out.
_as_it_is = tf.autograph.experimental.do_not_convert


@_register
class InputQuantizer(QuantizeLayer):
    """tfmot's layer that quantizes the image; it can be loaded from `.keras` files."""

    def build(self, input_shape):
        # Loading builds a second time, and would not find its second variables in the file.
        if not self.built:
            super().build(input_shape)
            self.built = True

    @_as_it_is
    def call(self, inputs, training=None):
        return super().call(inputs, training=training)


@_register
class Quantized(QuantizeWrapperV2):
    """tfmot's wrapper of a quantized layer; it can be frozen, and loaded from `.keras` files."""

    def build(self, input_shape):
        if not self.layer.built:
            # The wrapper lists the weights that the layer has now.
            with tf.name_scope(self.layer.name):
                self.layer.build(input_shape)
            self.layer.built = True
        super().build(input_shape)

    @_as_it_is
    def call(self, inputs, training=None, **kwargs):
        return super().call(inputs, training=training, **kwargs)

    # tfmot's wrapper trains its kernel whatever `trainable` says.

    @property
    def trainable_weights(self):
        return super().trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self):
        frozen = [] if self.trainable else super().trainable_weights
        return self._dedup_weights(frozen + super().non_trainable_weights)


class _Registry(QuantizeRegistry):
    """Nothing is left to look up: the layout transform wraps every layer itself."""

    def supports(self, layer):
        return False

    def get_quantize_config(self, layer):
        raise ValueError(f"Layer {layer.name!r} is wrapped by the layout transform.")


class _Layout(QuantizeLayoutTransform):
    def __init__(self, transform):
        self.transform = transform

    def apply(self, model, layer_quantize_map):
        names = {
            layer.name
            for layer in model.layers
            if not isinstance(layer, tf_keras.layers.InputLayer)
        }
        bare = sorted(names - set(layer_quantize_map))
        own = sorted(
            name for name, found in layer_quantize_map.items() if found.get("quantize_config")
        )
        if bare or own:
            raise ValueError(
                "The EfficientNet scheme quantizes whole models by its own rules: annotate the "
                "model with `quantize_annotate_model`. Received: layers without annotation "
                f"{bare}, layers with a configuration of their own {own}"
            )
        return self.transform(model), {}


class EfficientNetScheme(QuantizeScheme):
    """The scheme of the family for `tfmot.quantization.keras.quantize_apply`.

    Args:
        transform: Function that turns the annotated model, without its annotations, into one
            whose layers are folded and wrapped.
    """

    def __init__(self, transform):
        self.transform = transform

    def get_layout_transformer(self):
        return _Layout(self.transform)

    def get_quantize_registry(self):
        return _Registry()
