"""What training a quantized model needs beside `fit`: frozen ranges, and an end.

The result of `quantize_model` compiles and fits as it is: kernels and biases are trained through
the rounding by the straight-through gradient. Training leaves biases between the steps of their
accumulators, kernels beyond their limits, and scales with ties; `settle` removes all three.

Source: Jacob et al., 2018, section 3 (https://arxiv.org/abs/1712.05877).
"""

import contextlib
from collections.abc import Iterator

import keras
import numpy as np

from .build import RANGE_SUFFIX
from .fake_quant import MOVING_AVERAGE, QUANTIZED_KERNELS, FakeQuant
from .lowering import is_quantized, read_quantized
from .scheme import shared_ranges
from .ties import remove_ties, round_biases

# A range that training has shrunk below this part of its calibrated width clips nearly everything.
COLLAPSED = 1 / 32


class _Freeze(keras.callbacks.Callback):
    """Freezes some layers after a number of the optimizer's steps."""

    def __init__(self, steps: int):
        super().__init__()
        if steps < 0:
            raise ValueError(f"`steps` must be at least 0. Received: {steps}")
        self.steps = steps

    def on_train_begin(self, logs=None):
        require_quantized(self.model, type(self).__name__)
        self.layers = [layer for layer in layers_of(self.model) if self._follows(layer)]
        if not self.layers:
            raise ValueError(
                f"{type(self).__name__} needs {self.what} that follow the batches; this model has "
                f"none. Quantize it with `QuantizationConfig({self.option})`, or leave the "
                "callback out."
            )
        self._freeze_if_due()

    def on_train_batch_end(self, batch, logs=None):
        self._freeze_if_due()

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs[self.log] = self._moving()

    def _freeze_if_due(self):
        if int(self.model.optimizer.iterations) >= self.steps and self._moving():
            for layer in self.layers:
                layer.freeze()

    def _moving(self):
        return sum(layer.is_moving for layer in self.layers)


class FreezeRanges(_Freeze):
    """Freezes the ranges that follow the batches (`training_ranges="moving_average"`).

    Ranges that move until the end never let the kernels settle. The epoch's logs tell as
    `moving_ranges` how many ranges still move.

    Args:
        steps: Steps of the optimizer until the ranges are frozen, at least 0. They are counted
            by the optimizer, so a training that is resumed counts on.

    Raises:
        ValueError: If `steps` is negative; at the start of training, if the model is not
            quantized or none of its ranges follows the batches.

    Source: Jacob et al., 2018, section 3.1 (activation ranges are learned and then frozen).
    """

    what, option, log = "ranges", 'training_ranges="moving_average"', "moving_ranges"

    def _follows(self, layer):
        return isinstance(layer, FakeQuant) and layer.ranges == MOVING_AVERAGE


class FreezeBatchNorms(_Freeze):
    """Freezes the moments of batch norms that are trained (`batch_norm="trained"`).

    From then on training sees the folded kernels that the file will hold. The epoch's logs tell as
    `moving_batch_norms` how many still follow the batches.

    Args:
        steps: Steps of the optimizer until the moments are frozen, at least 0.

    Raises:
        ValueError: If `steps` is negative; at the start of training, if the model is not
            quantized or has no such batch norms.

    Source: Krishnamoorthi, 2018, section 3.2.2 (https://arxiv.org/abs/1806.08342).
    """

    what, option, log = "batch norms", 'batch_norm="trained"', "moving_batch_norms"

    def _follows(self, layer):
        return isinstance(layer, QUANTIZED_KERNELS) and layer.batch_norm


def settle(model: keras.Model) -> None:
    """Makes a trained quantized model hold, in place, what an integer file can hold.

    Kernels are clipped to their limits, biases rounded to the steps of their accumulators, and
    scales that training moved are freed of ties (`ties.py`), so that the file and the model give
    the same integers. Batch norms are folded. Settling twice
    changes nothing more. Ranges and batch norms are frozen.

    Args:
        model: A model made by `quantize_model`, as it is or trained.

    Raises:
        ValueError: If the model is not quantized, or a weight or a range is not finite or has
            collapsed (the layer is named).
    """
    require_quantized(model, "`settle`")
    layers = list(layers_of(model))
    for layer in layers:
        if not all(np.all(np.isfinite(value)) for value in layer.get_weights()):
            raise ValueError(
                f"The weights of layer {layer.name!r} must be finite. Received: NaN or infinity. "
                "Load the last good weights and train with a lower learning rate."
            )
    ranges = [layer for layer in layers if isinstance(layer, FakeQuant) and not layer.fixed]
    for layer in ranges:
        low, high = layer.real_range()
        if high - low < COLLAPSED * (layer.initial_maximum - layer.initial_minimum):
            raise ValueError(
                f"The range of {layer.name!r} has collapsed in training, from "
                f"[{layer.initial_minimum:g}, {layer.initial_maximum:g}] to [{low:g}, {high:g}]. "
                'Train with a lower learning rate, or with `training_ranges="fixed"`.'
            )
    graph = read_quantized(model)
    remove_ties(graph, shared_ranges(graph))
    round_biases(graph, again=True)
    for layer in ranges:
        params = graph[layer.name.removesuffix(RANGE_SUFFIX)].params
        # Bounds that were computed from the scale again would be off by float32's rounding.
        if params != layer.params:
            layer.set_range(params.min, params.max)
        layer.freeze()
    for layer in layers:
        if isinstance(layer, QUANTIZED_KERNELS):
            weights = graph[layer.name].weights
            limits = layer.along_kernel(weights["limits"])
            kernel = np.clip(weights["kernel"], -limits, limits)
            layer.set_real(kernel, weights["bias"], weights["limits"])
            layer.freeze()


@contextlib.contextmanager
def without_dropout(model: keras.Model) -> Iterator[None]:
    """Trains a student without dropout and drop path: it repeats a teacher, which drops nothing.

    What it drops in training it learns to do without, so that it becomes another function. To be
    entered before the first training step.
    """
    rates = {layer: layer.rate for layer in layers_of(model) if hasattr(layer, "noise_shape")}
    try:
        for layer in rates:
            layer.rate = 0.0
        yield
    finally:
        for layer, rate in rates.items():
            layer.rate = rate


@contextlib.contextmanager
def unrounded_outputs(model: keras.Model) -> Iterator[None]:
    """Lets a loss see a classifier's outputs, and its scores, before they are rounded.

    A probability of less than 1/512 is rounded to 0 and a score beyond its range is clipped, where
    the loss has no gradient though it is large, and tells states apart that are equal but for a
    step. Their ranges are not learned, since the loss does not see them. To be entered before the
    model is compiled or called.

    Args:
        model: A model made by `quantize_model`.
    """
    graph = read_quantized(model)
    output = graph[graph.outputs[0]]
    names = [output.name, *(output.inputs if output.op in ("softmax", "sigmoid") else ())]
    suffixed = {name + RANGE_SUFFIX for name in names}
    ranges = {layer: layer.trainable for layer in layers_of(model) if layer.name in suffixed}
    try:
        for layer in ranges:
            layer.rounds = layer.trainable = False
        yield
    finally:
        for layer, trainable in ranges.items():
            layer.rounds, layer.trainable = True, trainable


def layers_of(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields the layers of a model and of the models in it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)
        else:
            yield layer


def require_quantized(model: keras.Model, name: str) -> None:
    """Raises a ValueError if a model was not quantized by `quantize_model`."""
    if not is_quantized(model):
        raise ValueError(
            f"{name} needs a model made by `quantize_model`. Received the float model "
            f"{getattr(model, 'name', model)!r}; quantize it first."
        )
