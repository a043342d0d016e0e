"""Kernel reconstruction: projections fitted to the inputs that integers bring them.

What reaches a layer of the quantized model is off already: rounded, clipped, of a swish that was
rescaled. Its kernel was made for exact inputs. The kernel and bias with which its outputs come
nearest to the float model's, from the inputs as they are, are those of a linear regression. The
projections at the ends of the blocks are fitted so, one after the other, each behind those that
have been; what the noise of a block has in common with its signal ends there.

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
from .graph import Graph, Node, is_projection, kernel_owner
from .lowering import dequantized_kernel
from .params import kernel_scales
from .rounding import round_kernel

# Parts of the inputs' mean variance that are tried as what is added to every variance: directions
# that the photographs hardly show then keep their weights. With the last one, all do.
DAMPINGS = (*np.geomspace(1e-3, 10, 9), np.inf)
# Groups of images by which the damping is chosen.
GROUPS = 4
# Places of one image that are looked at, at most.
PLACES_PER_IMAGE = 196
# Bytes of the tensors at one boundary that are kept; of more images every second one, third one ...
# is left out.
BYTES_KEPT = 2**31


@in_float32()
def reconstruct_kernels(
    teacher: Graph, graph: Graph, batches: Iterable[np.ndarray], verbose: bool
) -> None:
    """Fits the projections of a graph to the outputs of the float model, in place.

    Args:
        teacher: The float graph, folded.
        graph: The graph to quantize, with the `params` of its tensors and the "limits" of its
            kernels, which stay as they are.
        batches: Calibration images; they are iterated twice.
        verbose: Whether to show progress.
    """
    projections = reconstructed(teacher, graph)
    if not projections:
        return
    models = [
        build_model(teacher, quantized=False, observed=teacher.outputs),
        build_model(graph, quantized=True, observed=graph.outputs),
    ]
    tapes = _Tapes(models, boundaries(teacher, graph), batches)
    place = {node.name: number for number, node in enumerate(teacher)}
    progress = keras.utils.Progbar(
        len(projections), verbose=1 if verbose else 0, unit_name="projection"
    )
    for name, owner in projections.items():
        tapes.advance([end for end in tapes.ahead if place[end] < place[name]])
        sides = graph.applications(owner)
        fit = _Regression()
        for outputs, *inputs in tapes.run([name], [side.inputs[0] for side in sides]):
            # A kernel that is applied to both sides of a tensor meets their sum.
            fit.add(reduce(add, inputs), outputs)
        kernel, bias = fit.solve(graph[owner])
        # Each side adds the bias.
        fitted = {"kernel": kernel, "bias": (bias / len(sides)).astype(np.float32)}
        for side in sides:
            side.weights.update(fitted)
        models[1].get_layer(owner).set_real(**fitted)
        progress.add(1)


def reconstructed(teacher: Graph, graph: Graph) -> dict[str, str]:
    """Returns the convolutions of the float graph that are fitted, and the owners of their kernels.

    Those are 1 x 1 convolutions without activation whose output has the same units in both graphs.
    """
    found = {}
    for node in teacher:
        if node.name not in graph.nodes or not keeps_units(teacher, node.name):
            continue
        twin = graph[node.name]
        # The sum of both sides, where the projection was split.
        parts = [graph[name] for name in twin.inputs] if twin.op == "add" else [twin]
        owners = {kernel_owner(part) for part in parts}
        if len(owners) == 1 and all(is_projection(part) for part in (node, *parts)):
            found[node.name] = owners.pop()
    return found


class _Tapes:
    """The tensors at one boundary, of the float and of the quantized model, batch by batch.

    So no layer is computed for all that follow it: the time is that of a few passes over the
    images, however many layers there are.
    """

    def __init__(self, models: list[keras.Model], ends: list[str], batches):
        self.models, self.ahead, self.start = models, ends, None
        largest = max(
            (int(np.prod(models[0].get_layer(name).output.shape[1:])) for name in ends), default=1
        )
        images = sum(len(batch) for batch in batches)
        stride = -(-images * 2 * 4 * largest // BYTES_KEPT)
        self.kept = [[batch, batch] for batch in itertools.islice(batches, 0, None, stride)]

    def advance(self, passed: list[str]) -> None:
        """Moves to the last of the boundaries that were passed."""
        if not passed:
            return
        end = passed[-1]
        for batch, outputs in zip(self.kept, self.run([end], [end]), strict=True):
            batch[:] = outputs
        self.start, self.ahead = end, self.ahead[len(passed) :]

    def run(self, teachers: list[str], students: list[str]):
        """Yields the tensors of the float model and then those of the quantized one, by batch."""
        parts = [
            keras.Model(self._tensor(which, self.start), [self._tensor(which, n) for n in names])
            for which, names in enumerate((teachers, students))
        ]
        for part in parts:
            # Each runs but once over few batches: compiling it would take longer.
            part.run_eagerly = True
        for batch in self.kept:
            outputs = [
                part.predict_on_batch(values) for part, values in zip(parts, batch, strict=True)
            ]
            # A single output comes without its list.
            yield [np.asarray(value) for value in keras.tree.flatten(outputs)]

    def _tensor(self, which, name):
        model = self.models[which]
        if name is None:
            return model.inputs[0]
        return quantized_tensor(model, name) if which else model.get_layer(name).output


class _Moments:
    """Sums over rows of inputs and outputs, and over their products, about a fixed offset."""

    def __init__(self, size: int):
        self.rows, self.sum, self.products = 0, np.zeros(size), np.zeros((size, size))

    def add(self, rows: np.ndarray) -> None:
        """Adds rows, shape (rows, size)."""
        self.rows += len(rows)
        self.sum += rows.sum(axis=0)
        self.products += rows.T @ rows

    def __add__(self, other: "_Moments") -> "_Moments":
        total = _Moments(len(self.sum))
        total.rows = self.rows + other.rows
        total.sum, total.products = self.sum + other.sum, self.products + other.products
        return total

    def covariance(self) -> np.ndarray:
        """Returns the covariance of inputs and outputs."""
        mean = self.sum / self.rows
        return self.products / self.rows - np.outer(mean, mean)

    def bias(self, kernel: np.ndarray) -> np.ndarray:
        """Returns the bias that goes with a kernel: it leaves the mean error 0."""
        inputs, outputs = np.split(self.sum / self.rows, [len(kernel)])
        return outputs - inputs @ kernel

    def error(self, kernel: np.ndarray, bias: np.ndarray) -> float:
        """Returns the mean squared error of a row's outputs, summed over the channels."""
        weights = np.concatenate([-kernel, np.eye(len(bias))])
        linear = self.sum / self.rows @ weights
        quadratic = np.sum(weights * (self.products / self.rows @ weights))
        return float(quadratic - 2 * linear @ bias + bias @ bias)


class _Regression:
    """A damped linear regression of outputs on inputs, from moments of groups of images.

    How much damping is best depends on the number of images, on their variety and on the noise. It
    is found by cross-validation: each group is predicted from all others.
    """

    def __init__(self):
        self.groups: list[_Moments] = []
        self.offset = None
        self.generator = np.random.default_rng(0)

    def add(self, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Adds a batch, shapes (images, ..., channels)."""
        both = np.concatenate([inputs, outputs], axis=-1)
        rows = both.reshape(len(both), -1, both.shape[-1])
        if rows.shape[1] > PLACES_PER_IMAGE:
            chosen = self.generator.choice(rows.shape[1], PLACES_PER_IMAGE, replace=False)
            rows = rows[:, np.sort(chosen)]
        rows = rows.astype(np.float64)
        if self.offset is None:
            # About a mean: a variance that is small beside its mean would be lost.
            self.offset = rows.mean(axis=(0, 1))
            self.groups = [_Moments(rows.shape[-1]) for _ in range(GROUPS)]
        for image in rows - self.offset:
            min(self.groups, key=lambda group: group.rows).add(image)

    def solve(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kernel and the bias that fit best, near those of a node, the kernel rounded.

        Where the limits of the kernel are too narrow for a better one, the bias alone is new.
        """
        given = node.weights["kernel"][0, 0].astype(np.float64)
        groups = [group for group in self.groups if group.rows]
        errors = np.zeros(len(DAMPINGS))
        for held in groups if len(groups) > 1 else ():
            others = reduce(add, (group for group in groups if group is not held))
            fits = self._fits(others, given)
            errors += [held.error(kernel, others.bias(kernel)) for kernel in fits]
        whole = reduce(add, groups)
        # One image alone tells nothing of others.
        best = int(np.argmin(errors)) if errors.any() else len(DAMPINGS) - 1
        kernel = list(self._fits(whole, given))[best]
        scales = np.broadcast_to(kernel_scales(node.weights["limits"]), kernel.shape[1:])
        covariance = whole.covariance()[: len(kernel), : len(kernel)]
        integers = round_kernel(kernel.T[None], scales[None], covariance[None])
        kernels = integers[0].T * scales, dequantized_kernel(node)[0, 0]
        kernel = min(kernels, key=lambda kernel: whole.error(kernel, whole.bias(kernel)))
        inputs, outputs = np.split(self.offset, [len(kernel)])
        bias = whole.bias(kernel) + outputs - inputs @ kernel
        return kernel[None, None].astype(np.float32), bias

    def _fits(self, moments: _Moments, kernel: np.ndarray):
        """Yields the kernel for each damping."""
        size = len(kernel)
        covariance = moments.covariance()
        inputs = covariance[:size, :size]
        variances, directions = np.linalg.eigh(inputs)
        missing = directions.T @ (covariance[:size, size:] - inputs @ kernel)
        for damping in DAMPINGS:
            damped = np.maximum(variances, 0) + max(damping * np.diag(inputs).mean(), 1e-12)
            yield kernel + directions @ (missing / damped[:, None])
