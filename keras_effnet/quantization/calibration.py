"""What calibration data say about the tensors of a graph, in one streaming pass.

The statistics stay small however many images there are: for each tensor the extremes and means of
its channels, the extremes of each batch, and a bounded sample of rows, a row being the values of
all channels at one place of one image. Range methods and corrections work on these alone.
"""

import dataclasses
import zlib
from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

from .build import build_model, in_float32
from .graph import Graph
from .scheme import OUTPUT_RULES, OWN, expects_pixels

# Values of one tensor taken from one image, and kept in all (4 bytes each).
VALUES_PER_IMAGE = 8192
VALUES_KEPT = 2**19


@dataclasses.dataclass
class TensorStatistics:
    """Statistics of one tensor over the calibration data.

    The sample is drawn at random places and so misses what is rare, but a channel that fires for a
    few images alone may decide their class. So it also holds the extremes of every image, with the
    weight of the one place that they stand for.

    Attributes:
        low: Smallest value of each channel, shape (channels,).
        high: Largest value of each channel, shape (channels,).
        mean: Mean of each channel, shape (channels,).
        batch_low: Smallest value of each batch.
        batch_high: Largest value of each batch.
        sample: Rows of channel values, shape (rows, channels).
        weights: How many places each row stands for, shape (rows,).
        images: Number of the image that each row comes from, shape (rows,).
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    batch_low: list[float]
    batch_high: list[float]
    sample: np.ndarray
    weights: np.ndarray
    images: np.ndarray

    def divided_by(self, factors: np.ndarray) -> "TensorStatistics":
        """Returns the statistics of the tensor divided by positive factors of its channels."""
        low, high = self.low / factors, self.high / factors
        # The extremes of a batch are not kept by channel; those of all the data are.
        return TensorStatistics(
            low,
            high,
            self.mean / factors,
            [float(low.min())] * len(self.batch_low),
            [float(high.max())] * len(self.batch_high),
            self.sample / factors,
            self.weights,
            self.images,
        )


class _Rows:
    """Every `stride`-th row of a stream; when they are too many, every other one goes."""

    def __init__(self):
        self.parts, self.stride, self.seen = [], 1, 0

    def add(self, rows):
        first = -self.seen % self.stride
        self.seen += len(rows)
        self.parts.append(np.array(rows[first :: self.stride], np.float32))
        if sum(part.size for part in self.parts) > VALUES_KEPT:
            self.parts = [np.concatenate(self.parts)[::2]]
            self.stride *= 2

    def result(self):
        """Returns the rows kept, and the number of each in the stream."""
        rows = np.concatenate(self.parts)
        return rows, np.arange(len(rows)) * self.stride


class _Accumulator:
    def __init__(self, places, sampled):
        self.places, self.sampled = places, sampled
        self.low = self.high = self.total = None
        self.images = 0
        self.batch_low, self.batch_high = [], []
        self.rows, self.extremes = _Rows(), _Rows()

    def update(self, low, high, mean, sample):
        total = np.sum(mean, axis=0, dtype=np.float64)
        if self.low is None:
            self.low, self.high, self.total = low.min(axis=0), high.max(axis=0), total
        else:
            self.low = np.minimum(self.low, low.min(axis=0))
            self.high = np.maximum(self.high, high.max(axis=0))
            self.total = self.total + total
        self.images += len(low)
        self.batch_low.append(float(low.min()))
        self.batch_high.append(float(high.max()))
        self.rows.add(sample.reshape(-1, sample.shape[-1]))
        if self.sampled < self.places:
            # One row for an image, so that thinning drops both of its extremes or none.
            self.extremes.add(np.concatenate([low, high], axis=1))

    def result(self):
        rows, numbers = self.rows.result()
        images = numbers // self.sampled
        weights = np.full(len(rows), self.rows.stride * self.places / self.sampled, np.float32)
        if self.extremes.parts:
            extremes, numbers = self.extremes.result()
            extremes = extremes.reshape(2 * len(extremes), -1)
            rows = np.concatenate([rows, extremes])
            images = np.concatenate([images, np.repeat(numbers, 2)])
            stride = np.float32(self.extremes.stride)
            weights = np.concatenate([weights, np.full(len(extremes), stride)])
        return TensorStatistics(
            self.low,
            self.high,
            self.total / self.images,
            self.batch_low,
            self.batch_high,
            rows,
            weights,
            images,
        )


class _Observe(keras.layers.Layer):
    """Reduces a tensor to the minimum, maximum and mean of its channels and a sample of rows."""

    def __init__(self, name, shape):
        super().__init__(name=name)
        self.channels = shape[-1]
        self.places = int(np.prod(shape[:-1], dtype=int))
        wanted = max(4, VALUES_PER_IMAGE // self.channels)
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        if self.places <= wanted:
            self.chosen = np.arange(self.places)
        else:
            self.chosen = np.sort(generator.choice(self.places, wanted, replace=False))

    def call(self, inputs):
        rows = ops.reshape(inputs, (ops.shape(inputs)[0], -1, self.channels))
        return [
            ops.min(rows, axis=1),
            ops.max(rows, axis=1),
            ops.mean(rows, axis=1),
            ops.take(rows, self.chosen, axis=1),
        ]

    def compute_output_spec(self, inputs):
        # One object for each output: Keras knows tensors by identity.
        extremes_and_mean = [keras.KerasTensor((None, self.channels)) for _ in range(3)]
        return [*extremes_and_mean, keras.KerasTensor((None, len(self.chosen), self.channels))]


def observed_nodes(graph: Graph) -> list[str]:
    """Returns the names of the nodes whose ranges calibration finds."""
    return [node.name for node in graph if OUTPUT_RULES[node.op] == OWN or node.is_float]


@in_float32()
def collect(
    graph: Graph, images: Iterable[np.ndarray], total: int | None, verbose: bool
) -> dict[str, TensorStatistics]:
    """Runs a folded graph in float over the calibration images and collects statistics.

    Args:
        graph: The folded graph.
        images: Batches as `calibration_batches` yields them.
        total: Number of batches, if it is known, for the progress bar.
        verbose: Whether to show progress.

    Returns:
        Statistics by the name of the node.

    Raises:
        ValueError: If a tensor is not finite; the message names its layer.
    """
    names = observed_nodes(graph)
    model = build_model(graph, quantized=False, observed=tuple(names))
    observers = [_Observe(f"{name}_observe", graph[name].shape) for name in names]
    outputs = [layer(tensor) for layer, tensor in zip(observers, model.outputs, strict=True)]
    observer = keras.Model(model.inputs[0], outputs)
    accumulators = {
        name: _Accumulator(layer.places, len(layer.chosen))
        for name, layer in zip(names, observers, strict=True)
    }
    progress = keras.utils.Progbar(total, verbose=1 if verbose else 0, unit_name="batch")
    for batch in images:
        results = observer.predict_on_batch(batch)
        for name, (low, high, mean, sample) in zip(names, results, strict=True):
            if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
                raise ValueError(
                    f"Layer {graph[name].layer!r} gives NaN or infinite values on the calibration "
                    "data; a model must be finite in float32 to be quantized."
                )
            accumulators[name].update(low, high, mean, sample)
        progress.add(1)
    return {name: accumulator.result() for name, accumulator in accumulators.items()}


def calibration_batches(
    data, graph: Graph, batch_size: int, minimum: int
) -> tuple[Iterable[np.ndarray], int | None]:
    """Returns checked float32 batches of the calibration images, and their number if known.

    Args:
        data: An array of images (images, height, width, channels); or an iterable of batches,
            which may be tuples whose first element is the batch, such as a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a list.
        graph: The graph as it was read, before folding.
        batch_size: Images in a batch, when `data` is one array.
        minimum: Smallest number of images that the method needs.

    Raises:
        TypeError: If `data` is neither an array nor an iterable.
        ValueError: While it is iterated: if images are empty, constant, NaN, of the wrong shape or
            scale, or too few.
    """
    # Asked now: the batches are checked while they are drawn, when the scaling is folded away.
    pixels = expects_pixels(graph)
    if hasattr(data, "shape") and hasattr(data, "dtype"):
        array = np.asarray(data)
        if array.ndim != len(graph[graph.input].shape) + 1:
            raise ValueError(
                "Calibration images must have the shape (images, "
                f"{', '.join(map(str, graph[graph.input].shape))}). Received: {array.shape}"
            )
        starts = range(0, len(array), batch_size)
        source = (array[start : start + batch_size] for start in starts)
        return _checked(source, graph, minimum, pixels), len(starts)
    sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, (str, bytes, dict)) or not (hasattr(data, "__iter__") or sequence):
        raise TypeError(
            "Calibration data must be an array of images or an iterable of batches (a list, "
            f"a generator, a `tf.data.Dataset`). Received: {type(data).__name__}"
        )
    if hasattr(data, "num_batches"):  # keras.utils.PyDataset
        source = (data[index] for index in range(len(data)))
        return _checked(source, graph, minimum, pixels), len(data)
    total = len(data) if hasattr(data, "__len__") else None
    return _checked(iter(data), graph, minimum, pixels), total


def _checked(source, graph, minimum, pixels):
    shape = graph[graph.input].shape
    count, low, high = 0, np.inf, -np.inf
    for item in source:
        item = item[0] if isinstance(item, (tuple, list)) else item
        batch = np.asarray(ops.convert_to_numpy(item), np.float32)
        if batch.shape[1:] != shape:
            raise ValueError(
                f"Calibration batches must have the shape (images, {', '.join(map(str, shape))}). "
                f"Received: {batch.shape}"
            )
        if not np.all(np.isfinite(batch)):
            raise ValueError("Calibration images must be finite. Received: NaN or infinite values")
        if len(batch) == 0:
            continue
        count += len(batch)
        low, high = min(low, float(batch.min())), max(high, float(batch.max()))
        _check_scale(pixels, low, high)
        yield batch
    if count < minimum:
        raise ValueError(
            f"Calibration needs at least {minimum} image(s); 100 to 200 varied photographs are "
            f"usual. Received: {count}"
        )
    if low == high:
        raise ValueError(
            f"Calibration images must differ. Received: {count} image(s), all values {low}"
        )


def _check_scale(pixels, low, high):
    if pixels and high > low and (high <= 1.5 or low < -1):
        raise ValueError(
            "The model scales pixels itself and wants them in 0..255; the calibration images look "
            "scaled already. Give the pixels as they are. "
            f"Received: values in [{low:g}, {high:g}]"
        )
    if pixels and high > 256:
        raise ValueError(
            f"The model wants pixels in 0..255 (8 bits). Received: values in [{low:g}, {high:g}]"
        )
