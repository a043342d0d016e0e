"""Kernel reconstruction: kernels fitted to the inputs that integers bring them.

What reaches a layer of the quantized model is off already: rounded, clipped, of a swish that was
rescaled. Its kernel was made for exact inputs. The kernel and bias with which its outputs come
nearest to the float model's, from the inputs as they are, are those of a linear regression. The
depthwise kernels and the projections at the ends of the blocks are fitted so, one after the other,
each behind those that have been; what the noise of a block has in common with its signal ends
there. Expansions read the ends of blocks, which have just been brought near.

Bias correction (`bias.py`) does this for the means alone, and learned rounding (`rounding.py`) for
the errors of the kernel itself.

Sources: He et al., 2017, Channel Pruning for Accelerating Very Deep Neural Networks, section 3.1
(https://arxiv.org/abs/1707.06168), which fits layer by layer to the outputs of the original model;
Li et al., 2025, GPTAQ, section 3 (https://arxiv.org/abs/2504.02692), for quantized inputs.
"""

import itertools
from collections.abc import Iterable
from functools import reduce
from operator import add

import keras
import numpy as np

from .boundaries import boundaries, keeps_units, quantized_tensor
from .build import build_model, in_float32
from .folding import same_padding
from .graph import Graph, Node, is_projection, kernel_owner
from .lowering import dequantized_kernel
from .rounding import kernel_of, kernel_rows, round_kernel, row_steps

# Parts of the inputs' mean variance that are tried as what is added to every variance: directions
# that the photographs hardly show then keep their weights. With the first one, all do.
DAMPINGS = (np.inf, *np.geomspace(10, 1e-3, 9))
# Taken for the variance of what is constant.
LEAST_VARIANCE = 1e-12
# Groups of images by which the damping is chosen.
GROUPS = 4
# Places of one image that are looked at, at most, by kind of kernel: few weights need few.
PLACES_PER_IMAGE = {"conv": 196, "depthwise": 64}
# Bytes of the tensors of both models that are kept at a time. Where one boundary has more, every
# second batch of images, third one ... alone is used.
BYTES_KEPT = 2**31


@in_float32()
def reconstruct_kernels(
    teacher: Graph, graph: Graph, batches: Iterable[np.ndarray], verbose: bool
) -> None:
    """Fits kernels of a graph to the outputs of the float model, in place.

    Args:
        teacher: The float graph, folded.
        graph: The graph to quantize, with the `params` of its tensors and the "limits" of its
            kernels, which stay as they are.
        batches: Calibration images; they are iterated twice.
        verbose: Whether to show progress.
    """
    layers = reconstructed(teacher, graph)
    if not layers:
        return
    tapes = _Tapes(teacher, graph, batches)
    progress = keras.utils.Progbar(len(layers), verbose=1 if verbose else 0, unit_name="kernel")
    for name, owner in layers.items():
        sides = graph.applications(owner)
        fit = _Regression(graph[owner])
        divisors = graph[owner].weights.get("divisors", np.float32(1))
        for outputs, *inputs in tapes.run(name, [side.inputs[0] for side in sides]):
            # A kernel that is applied to both sides of a tensor meets their sum.
            fit.add(reduce(add, inputs), outputs / divisors)
        kernel, bias = fit.solve()
        # Each side adds the bias.
        fitted = {"kernel": kernel, "bias": (bias / len(sides)).astype(np.float32)}
        for side in sides:
            side.weights.update(fitted)
        tapes.student.model.get_layer(owner).set_real(**fitted)
        progress.add(1)


def reconstructed(teacher: Graph, graph: Graph) -> dict[str, str]:
    """Returns the convolutions of the float graph that are fitted, and the owners of their kernels.

    Those are depthwise convolutions, and 1 x 1 convolutions whose output has the same units in both
    graphs, without activation.
    """
    found = {}
    for node in teacher:
        if node.name not in graph.nodes or not _is_fitted(teacher, node):
            continue
        twin = graph[node.name]
        # The sum of both sides, where a projection was split.
        parts = [graph[name] for name in twin.inputs] if twin.op == "add" else [twin]
        owners = {kernel_owner(part) for part in parts}
        if len(owners) == 1:
            found[node.name] = owners.pop()
    return found


def _is_fitted(teacher: Graph, node: Node) -> bool:
    if node.op == "depthwise":
        return node.attrs["activation"] == "linear" and not node.is_float
    return is_projection(node) and keeps_units(teacher, node.name)


class _Tape:
    """What one model has computed of the images, batch by batch: the tensors that are still read.

    Attributes:
        model: The model of the graph; kernels of it may change that nothing computed depends on.
        live: Names of the tensors that are kept, in the order of the graph; none if it is the
            images.
        kept: Those tensors, by batch.
    """

    def __init__(self, graph: Graph, quantized: bool, batches: list[np.ndarray]):
        self.graph, self.quantized = graph, quantized
        self.model = build_model(graph, quantized, observed=graph.outputs)
        self.readers = {node.name: graph.consumers(node.name) for node in graph}
        self.computed: set[str] = set()
        self.live: list[str] = []
        self.kept = [[batch] for batch in batches]

    def position(self, names: list[str]) -> tuple[set[str], list[str]]:
        """Returns what is computed and what of it is still read, once tensors are known."""
        computed, pending = set(self.computed), list(names)
        while pending:
            name = pending.pop()
            if name not in computed:
                computed.add(name)
                pending += self.graph[name].inputs
        return computed, [
            name
            for name, readers in self.readers.items()
            if name in computed and any(reader.name not in computed for reader in readers)
        ]

    def bytes_of(self, names: list[str]) -> int:
        """Returns the bytes of tensors for one image."""
        return 4 * sum(int(np.prod(self._tensor(name).shape[1:])) for name in names)

    def run(self, names: list[str], position: tuple[set[str], list[str]]):
        """Yields tensors by batch, computed from what is kept, and moves to a position."""
        computed, live = position
        moves = computed != self.computed
        outputs = list(dict.fromkeys([*live, *names] if moves else names))
        # Keras takes no input of a model as its output.
        same = keras.layers.Identity()
        part = keras.Model(
            [self._tensor(name) for name in self.live] or self.model.inputs,
            [same(self._tensor(name)) for name in outputs],
        )
        # It runs but once over few batches: compiling it would take longer.
        part.run_eagerly = True
        for number, batch in enumerate(self.kept):
            # A single output comes without its list.
            values = map(np.asarray, keras.tree.flatten(part.predict_on_batch(batch)))
            found = dict(zip(outputs, values, strict=True))
            if moves:
                self.kept[number] = [found[name] for name in live]
            yield [found[name] for name in names]
        self.computed, self.live = computed, live

    def _tensor(self, name):
        if self.quantized:
            return quantized_tensor(self.model, name)
        return self.model.get_layer(name).output


class _Tapes:
    """The tapes of the float and of the quantized model.

    So no layer is computed for all that follow it: the time is that of one pass over the images,
    however many layers there are. Where tensors inside a block are too large to be kept, both
    models stay at the boundary before it.
    """

    def __init__(self, teacher: Graph, student: Graph, batches: Iterable[np.ndarray]):
        self.boundaries = boundaries(teacher, student)
        largest = max(
            (4 * int(np.prod(teacher[name].shape)) for name in self.boundaries), default=4
        )
        images = sum(len(batch) for batch in batches)
        stride = -(-images * 2 * largest // BYTES_KEPT)
        kept = list(itertools.islice(batches, 0, None, stride))
        self.images = sum(len(batch) for batch in kept)
        self.teacher, self.student = _Tape(teacher, False, kept), _Tape(student, True, kept)

    def run(self, name: str, inputs: list[str]):
        """Yields a tensor of the float model and then tensors of the quantized one, by batch.

        Args:
            name: Tensor of the float model.
            inputs: Tensors of the quantized model; what it computes from them may change next.
        """
        tapes, wanted = (self.teacher, self.student), ([name], inputs)
        positions = [tape.position(names) for tape, names in zip(tapes, wanted, strict=True)]
        size = sum(tape.bytes_of(live) for tape, (_, live) in zip(tapes, positions, strict=True))
        if size * self.images > BYTES_KEPT:
            passed = [end for end in self.boundaries if end in positions[0][0] and end != name]
            positions = [tape.position(passed[-1:]) for tape in tapes]
        runs = map(_Tape.run, tapes, wanted, positions)
        for outputs, values in zip(*runs, strict=True):
            yield [*outputs, *values]


class _Moments:
    """Sums over rows of inputs and outputs, and over their products, about a fixed offset.

    All arrays have a leading axis of sets (`_Regression`).
    """

    def __init__(self, sets: int, size: int):
        self.rows, self.sum, self.products = 0, np.zeros((sets, size)), np.zeros((sets, size, size))

    def add(self, rows: np.ndarray) -> None:
        """Adds rows, shape (sets, size, rows)."""
        self.rows += rows.shape[2]
        self.sum += rows.sum(axis=2)
        self.products += rows @ rows.swapaxes(1, 2)

    def __add__(self, other: "_Moments") -> "_Moments":
        total = _Moments(*self.sum.shape)
        total.rows = self.rows + other.rows
        total.sum, total.products = self.sum + other.sum, self.products + other.products
        return total

    def covariance(self) -> np.ndarray:
        """Returns the covariances of inputs and outputs."""
        mean = self.sum / self.rows
        return self.products / self.rows - mean[:, :, None] * mean[:, None, :]

    def bias(self, kernel: np.ndarray) -> np.ndarray:
        """Returns the bias, (sets, outputs), of a kernel: it leaves the mean error 0."""
        inputs, outputs = np.split(self.sum / self.rows, [kernel.shape[1]], axis=1)
        return outputs - _products(inputs, kernel)

    def error(self, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Returns the mean squared errors of the outputs of a row, summed in each set."""
        outputs = np.broadcast_to(np.eye(kernel.shape[2]), (len(kernel), *kernel.shape[2:] * 2))
        weights = np.concatenate([-kernel, outputs], axis=1)
        linear = _products(self.sum / self.rows, weights)
        quadratic = np.sum(weights * (self.products / self.rows @ weights), axis=(1, 2))
        return quadratic - 2 * np.sum(linear * bias, axis=1) + np.sum(bias**2, axis=1)


def _products(rows: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns the products of one row of each set, (sets, size), with the kernel of the set."""
    return (rows[:, None, :] @ kernel)[:, 0]


class _Regression:
    """A damped linear regression of a layer's outputs on its inputs, from groups of images.

    A projection has one set of inputs for all of its outputs, a depthwise kernel has one for each.

    How much damping is best depends on the number of images, on their variety and on the noise. It
    is found for each set by cross-validation: each group is predicted from all others.
    """

    def __init__(self, node: Node):
        self.node = node
        self.groups: list[_Moments] = []
        self.offset = None
        self.generator = np.random.default_rng(0)

    def add(self, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Adds a batch, shapes (images, rows, columns, channels)."""
        places = np.arange(int(np.prod(outputs.shape[1:3])))
        most = PLACES_PER_IMAGE[self.node.op]
        if len(places) > most:
            places = np.sort(self.generator.choice(places, most, replace=False))
        for image in zip(inputs, outputs, strict=True):
            rows = np.concatenate(_rows(self.node, *image, places), axis=1, dtype=np.float64)
            if self.offset is None:
                # About a mean: a variance that is small beside its mean would be lost.
                self.offset = rows.mean(axis=2)
                self.groups = [_Moments(*self.offset.shape) for _ in range(GROUPS)]
            group = min(self.groups, key=lambda group: group.rows)
            group.add(rows - self.offset[:, :, None])

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kernel and the bias that fit best near those of the node, the kernel rounded.

        Where the limits of a kernel are too narrow for a better one, the bias alone is new.
        """
        node = self.node
        given, before = (
            kernel_rows(node, kernel).swapaxes(1, 2)
            for kernel in (node.weights["kernel"], dequantized_kernel(node))
        )
        sets, size, _ = given.shape
        groups = [group for group in self.groups if group.rows]
        errors = np.zeros((len(DAMPINGS), sets))
        # One image alone tells nothing of others.
        for held in groups if len(groups) > 1 else ():
            others = reduce(add, (group for group in groups if group is not held))
            fits = self._fits(others, given)
            errors += [held.error(kernel, others.bias(kernel)) for kernel in fits]
        whole = reduce(add, groups)
        fits = np.stack(list(self._fits(whole, given)))
        kernel = fits[errors.argmin(axis=0), np.arange(sets)]
        scales = row_steps(node)
        covariance = whole.covariance()[:, :size, :size]
        integers = round_kernel(kernel.swapaxes(1, 2), scales, covariance)
        kernel = integers.swapaxes(1, 2) * scales[:, None, :]
        error, error_before = (whole.error(kept, whole.bias(kept)) for kept in (kernel, before))
        kernel = np.where((error <= error_before)[:, None, None], kernel, before)
        inputs, outputs = np.split(self.offset, [size], axis=1)
        bias = whole.bias(kernel) + outputs - _products(inputs, kernel)
        return kernel_of(node, kernel.swapaxes(1, 2)), bias.reshape(-1)

    def _fits(self, moments: _Moments, kernel: np.ndarray):
        """Yields the kernels, shape (sets, size, outputs), for each damping."""
        size = kernel.shape[1]
        covariance = moments.covariance()
        inputs = covariance[:, :size, :size]
        variances, directions = np.linalg.eigh(inputs)
        missing = directions.swapaxes(1, 2) @ (covariance[:, :size, size:] - inputs @ kernel)
        mean = np.maximum(variances.mean(axis=1, keepdims=True), LEAST_VARIANCE)
        for damping in DAMPINGS:
            damped = np.maximum(variances, 0) + np.maximum(damping * mean, LEAST_VARIANCE)
            yield kernel + directions @ (missing / damped[:, :, None])


def _rows(node: Node, inputs: np.ndarray, outputs: np.ndarray, places: np.ndarray):
    """Returns what the weights of a kernel meet at places, and the outputs there.

    Args:
        node: A 1 x 1 convolution or a depthwise one.
        inputs: One image, shape (rows, columns, channels).
        outputs: Likewise.
        places: Places of the outputs, counted row by row.

    Returns:
        Shapes (sets, size, places) and (sets, outputs of a set, places).
    """
    outputs = outputs.reshape(-1, outputs.shape[-1]).T[:, places]
    if node.op != "depthwise":
        return inputs.reshape(-1, inputs.shape[-1]).T[None, :, places], outputs[None]
    kernel_size = node.weights["kernel"].shape[:2]
    strides, dilation = node.attrs["strides"], node.attrs["dilation"]
    if node.attrs["padding"] == "same":
        axes = zip(inputs.shape[:2], kernel_size, strides, dilation, strict=True)
        inputs = np.pad(inputs, [*(same_padding(*axis) for axis in axes), (0, 0)])
    channels = np.ascontiguousarray(np.moveaxis(inputs, 2, 0))
    top, left = np.divmod(places, node.shape[1])
    taps = [
        channels[:, top * strides[0] + row * dilation[0], left * strides[1] + column * dilation[1]]
        for row, column in np.ndindex(kernel_size)
    ]
    return np.stack(taps, axis=1), outputs[:, None]
