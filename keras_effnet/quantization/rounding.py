"""Learned rounding: kernels rounded so that the errors of their weights cancel each other.

Rounding each weight to the nearest step is not best for the output of a layer: its inputs are
correlated, so the error of one weight can be made up for by the next ones. Column by column, a
weight is rounded, and what its error does to the output is taken back, as well as possible, by the
weights that are not rounded yet (the method of Optimal Brain Surgeon). What that needs is
the covariance of the layer's inputs, as the integers hold them, on unlabelled photographs.

Sources: Frantar et al., 2022, Optimal Brain Compression, section 5
(https://arxiv.org/abs/2208.11580); Frantar et al., 2023, GPTQ, section 3
(https://arxiv.org/abs/2210.17323).
"""

from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

from .build import build_model, in_float32
from .folding import same_padding
from .graph import Graph, Node, kernel_owner
from .lowering import tensor_params
from .params import KERNEL_MAX, QuantParams, kernel_scales

# Part of the mean variance that is added to every variance: directions that the photographs hardly
# show keep their weights. With a tenth of it the kernels suit other photographs less.
DAMPING = 0.1
# Places of one image whose inputs are looked at, at most. Four times as many change nothing.
PLACES_PER_IMAGE = 64


class _Moments(keras.layers.Layer):
    """Sums of the products and the mean of the rounded patches that a kernel reads.

    Patches are vectors of all values that meet the weights of one output channel. A depthwise
    kernel has its own patches for each channel, the others one set for all.
    """

    def __init__(self, node: Node, params: list[QuantParams], shape, name):
        super().__init__(name=name)
        self.depthwise, self.dense = node.op == "depthwise", node.op == "dense"
        self.kernel_size = node.weights["kernel"].shape[:2]
        self.attrs, self.params, self.output_size = node.attrs, params, node.shape[:2]
        self.channels = shape[-1]
        if self.dense:
            self.sets, self.size, places = 1, self.channels, int(np.prod(shape[:-1], dtype=int))
        else:
            taps = int(np.prod(self.kernel_size))
            self.sets = self.channels if self.depthwise else 1
            self.size = taps if self.depthwise else taps * self.channels
            places = int(np.prod(node.shape[:2]))
        generator = np.random.default_rng(places)
        self.chosen = np.arange(places)
        if places > PLACES_PER_IMAGE:
            self.chosen = np.sort(generator.choice(places, PLACES_PER_IMAGE, replace=False))
        self.places = len(self.chosen)

    def call(self, inputs):
        sides = [
            keras.quantizers.fake_quant_with_min_max_vars(side, params.min, params.max)
            for side, params in zip(inputs, self.params, strict=True)
        ]
        # A kernel that is applied to both sides of a tensor meets their sum.
        rounded = self._patches(sum(sides[1:], sides[0]))
        # About the mean of the batch: float32 loses a variance that is small beside the mean.
        mean = ops.mean(rounded, axis=1, keepdims=True)
        products = ops.matmul(ops.transpose(rounded - mean, (0, 2, 1)), rounded - mean)
        # The leading 1 lets `predict_on_batch` return sums, which have no batch.
        return [ops.expand_dims(products, 0), ops.expand_dims(mean[:, 0], 0)]

    def _patches(self, inputs):
        """Returns patches of the shape (sets, images * places, size)."""
        if self.dense:
            taps = [ops.reshape(inputs, (ops.shape(inputs)[0], -1, self.channels))]
        else:
            taps = [self._tap(inputs, row, column) for row, column in np.ndindex(self.kernel_size)]
        rows = ops.stack([ops.take(tap, self.chosen, axis=1) for tap in taps], axis=2)
        if self.depthwise:
            rows = ops.reshape(rows, (-1, self.size, self.channels))
            return ops.transpose(rows, (2, 0, 1))
        return ops.reshape(rows, (1, -1, self.size))

    def _tap(self, inputs, row, column):
        """Returns what one weight of the kernel meets at every place, (images, places, channels).

        `ops.image.extract_patches` would do it by a convolution, a thousand times slower.
        """
        strides, dilation = self.attrs["strides"], self.attrs["dilation"]
        starts, sizes = (row, column), self.output_size
        if self.attrs["padding"] == "same":
            pads = [
                same_padding(size, kernel, stride, step)
                for size, kernel, stride, step in zip(
                    inputs.shape[1:3], self.kernel_size, strides, dilation, strict=True
                )
            ]
            inputs = ops.pad(inputs, ((0, 0), *pads, (0, 0)))
        rows, columns = (
            slice(start * step, start * step + (size - 1) * stride + 1, stride)
            for start, step, size, stride in zip(starts, dilation, sizes, strides, strict=True)
        )
        return ops.reshape(inputs[:, rows, columns, :], (ops.shape(inputs)[0], -1, self.channels))

    def compute_output_spec(self, inputs):
        return [
            keras.KerasTensor((1, self.sets, self.size, self.size)),
            keras.KerasTensor((1, self.sets, self.size)),
        ]


@in_float32()
def collect_covariances(
    graph: Graph, batches: Iterable[np.ndarray], total: int | None, verbose: bool
) -> dict[str, np.ndarray]:
    """Runs a graph in float over calibration images and collects how the inputs of kernels vary.

    Args:
        graph: The folded graph with the `params` of its tensors.
        batches: Images.
        total: Number of batches, if it is known, for the progress bar.
        verbose: Whether to show progress.

    Returns:
        Covariances of the rounded patches by the name of the node, shape (sets, size, size).
    """
    nodes = [node for node in graph.kernel_nodes() if _is_covered(node)]
    read = {
        node.name: [other.inputs[0] for other in graph.applications(node.name)] for node in nodes
    }
    sources = sorted({name for names in read.values() for name in names})
    model = build_model(graph, quantized=False, observed=tuple(sources))
    tensors = dict(zip(sources, model.outputs, strict=True))
    layers, outputs = [], []
    for node in nodes:
        names = read[node.name]
        params = [tensor_params(graph, name) for name in names]
        layer = _Moments(node, params, graph[names[0]].shape, f"{node.name}_moments")
        layers.append(layer)
        outputs.append(layer([tensors[name] for name in names]))
    observer = keras.Model(model.inputs[0], outputs)
    sums: list = [None] * len(nodes)
    images = 0
    progress = keras.utils.Progbar(total, verbose=1 if verbose else 0, unit_name="batch")
    for batch in batches:
        images += len(batch)
        results = observer.predict_on_batch(batch)
        # Keras takes the one list off when there is one layer alone.
        results = results if len(nodes) > 1 else [results]
        for index, parts in enumerate(results):
            products, mean = (np.asarray(part[0], np.float64) for part in parts)
            count = len(batch) * layers[index].places
            parts = [products + count * mean[:, :, None] * mean[:, None, :], count * mean]
            if sums[index] is None:
                sums[index] = parts
            else:
                for total_part, part in zip(sums[index], parts, strict=True):
                    total_part += part
        progress.add(1)
    found = {}
    for node, layer, (products, rounded) in zip(nodes, layers, sums, strict=True):
        mean = rounded / (images * layer.places)
        covariance = products / (images * layer.places)
        found[node.name] = covariance - mean[:, :, None] * mean[:, None, :]
    return found


def round_kernel(
    weights: np.ndarray, scales: np.ndarray, covariance: np.ndarray, damping: float = DAMPING
) -> np.ndarray:
    """Rounds weights so that the variance of their error at the output is small.

    Args:
        weights: Shape (sets, rows, size): `rows` output channels for each set of patches.
        scales: Steps of the rows, shape (sets, rows).
        covariance: Of the patches, shape (sets, size, size).
        damping: Part of the mean variance that is added to every variance.

    Returns:
        Integers in [-127, 127], shape (sets, rows, size), as float64.
    """
    sets, _, size = weights.shape
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    # Large variances first: their errors are the dearest, and all the others can make up for them.
    order = np.argsort(-variance, axis=1, kind="stable")
    index = np.arange(sets)[:, None]
    damped = covariance[index[:, :, None], order[:, :, None], order[:, None, :]].astype(np.float64)
    extra = np.maximum(damping * variance.mean(axis=1), 1e-12)
    damped[:, np.arange(size), np.arange(size)] += extra[:, None]
    # The upper Cholesky factor of the inverse holds, in row i, how the columns behind i answer. It
    # is the inverse of the factor of the matrix itself, taken from the last row to the first.
    lower = np.linalg.cholesky(damped[:, ::-1, ::-1])
    upper = np.linalg.inv(lower[:, ::-1, ::-1])
    left = np.take_along_axis(weights.astype(np.float64), order[:, None, :], axis=2)
    integers = np.empty_like(left)
    for column in range(size):
        steps = np.clip(np.round(left[:, :, column] / scales), -KERNEL_MAX, KERNEL_MAX)
        integers[:, :, column] = steps
        error = (left[:, :, column] - steps * scales) / upper[:, column, column, None]
        left[:, :, column + 1 :] -= error[:, :, None] * upper[:, None, column, column + 1 :]
    back = np.argsort(order, axis=1)
    return np.take_along_axis(integers, back[:, None, :], axis=2)


def round_kernels(graph: Graph, covariances: dict[str, np.ndarray]) -> None:
    """Replaces the kernels of a graph, in place, by the real values of integers that fit them.

    Args:
        graph: The folded graph with "limits" on its kernels.
        covariances: From `collect_covariances`.
    """
    for name, covariance in covariances.items():
        node = graph[name]
        rows, scales = kernel_rows(node, node.weights["kernel"]), row_steps(node)
        integers = round_kernel(rows, scales, covariance)
        kernel = kernel_of(node, integers * scales[:, :, None])
        for other in graph.applications(name):
            other.weights["kernel"] = kernel


def _is_covered(node: Node) -> bool:
    is_own = kernel_owner(node) == node.name
    return is_own and not node.is_float and node.attrs.get("groups", 1) == 1


def row_steps(node: Node) -> np.ndarray:
    """Returns the steps of the rows of a kernel, shape (sets, rows)."""
    sets, rows, _ = kernel_rows(node, node.weights["kernel"]).shape
    scales = kernel_scales(node.weights["limits"]).astype(np.float64)
    return np.broadcast_to(scales, sets * rows).reshape(sets, rows)


def kernel_rows(node: Node, kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel of a node in the order of its patches, (sets, rows, size), as float64."""
    kernel = kernel.astype(np.float64)
    if node.op == "dense":
        return kernel.T[None]
    if node.op == "depthwise":
        return kernel[..., 0].reshape(-1, kernel.shape[2]).T[:, None, :]
    return kernel.reshape(-1, kernel.shape[3]).T[None]


def kernel_of(node: Node, rows: np.ndarray) -> np.ndarray:
    """Returns rows in the shape of the kernel of a node, as float32."""
    columns = rows[:, 0, :].T if node.op == "depthwise" else rows[0].T
    return columns.reshape(node.weights["kernel"].shape).astype(np.float32)
