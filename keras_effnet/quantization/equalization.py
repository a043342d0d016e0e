"""Channel equalization: channels of very different ranges brought closer, exactly.

One scale serves all channels of an activation tensor, so a channel that reaches 80 leaves few
levels to the others that stay near 1. Dividing each channel by a factor s evens them out, and the
layers that read the tensor take s into their kernels.

A swish stands in between, which is not homogeneous: with x' = x / s from the convolution,
swish(x) / s = x' * sigmoid(x' * s). So the product x' * s is computed by one more integer
multiplication by a constant vector, on the side of the sigmoid alone, where values beyond about
+-8 may be clipped for nothing. This is exact, and costs that multiplication.

Between linear layers (the projections of MBConv blocks and their sums) factors would cost nothing.
Tensors that are added need the same ones, and their channels are more even than those of a swish:
beside equalization they take 4 to 8 % off the noise of V1-B0 (four choices of the factors, standard
error 6 %) and 3 (3) % off V2-B0's; where swishes are rescaled instead (`rescaling`), about 20 (6) %
off V1-B0's (two trials). They are left out: what lies between blocks would have other units than in
the float model (`boundaries`).

The gates of squeeze-and-excite could take factors for nothing too, being vectors. On the
calibration images that takes a third off the noise of V2-B0, on images held back nothing: behind
the gates of its last blocks, where most of the noise is, how far a channel reaches on 100 images
does not tell how far on 100 others. On V1-B0 four choices of the factors added 7 (7) to 110 %:
probably since a gate is rounded once for a whole channel of an image, which no mean over places
takes back.

Nor does it gain anything to leave the factors out and to compute channels of like ranges in integer
tensors of their own, from the expansion through the gates, with the sum of two projections behind
them: V1-B0 is then as slow as with a quarter of its swishes equalized and the others rescaled, with
as much noise (1.1 % of the power of its scores).

Source of the idea for ReLU networks: Nagel et al., 2019, Data-Free Quantization Through Weight
Equalization and Bias Correction, section 4.1 (https://arxiv.org/abs/1906.04721).
"""

import dataclasses

import numpy as np

from .calibration import TensorStatistics
from .graph import Graph, Node
from .importance import energy
from .scheme import OUTPUT_RULES, OWN

# A factor takes one of this many steps, since an integer kernel holds it in 8 bits.
FACTOR_STEPS = 255
SMALLEST_STEPS = 2
# Noise-to-signal ratio that equalizing one swish must save to be worth a multiplication: the
# whole network has some hundredths, in some forty swishes.
LEAST_GAIN = 2e-3
# Rows of the sample that the search of the factors looks at, and as many rows of extremes.
SEARCH_ROWS = 512
# Factors tried for each channel, relative to the reach of the largest.
RELATIVE_FACTORS = np.geomspace(SMALLEST_STEPS / FACTOR_STEPS, 1.5, 24)
# Quantiles of the reaches of all channels that are tried as the smallest factor; 1 is the same
# factor for all, which is no equalization.
FLOORS = (0.0, 0.5, 0.9, 0.98, 1.0)
# The range of the convolution's output and of the swish's output in the search, in units of the
# factors: lower bound of either, upper bound of both.
RANGES = (0.5, 0.17, 1.0)
# A swish is flat below about this, so smaller values matter no more than their half.
FLAT_BELOW = -3.0


def swish_candidates(graph: Graph) -> list[str]:
    """Returns the names of the swishes (their MUL nodes) through which a graph can be equalized.

    Those are the swishes behind a convolution whose readers can all absorb the factors. The
    vectors inside squeeze-and-excite are left alone: they lose too little to be worth it.
    """
    found = []
    for node in graph:
        if node.op == "mul" and swish_source(graph, node) and absorb(graph, node.name, None):
            found.append(node.name)
    return found


def swish_source(graph: Graph, node: Node) -> Node | None:
    """Returns the layer with a kernel before the swish `node`, or None if it is no such swish."""
    gates = [graph[name] for name in node.inputs if graph[name].op == "sigmoid"]
    for gate in gates:
        source = graph[gate.inputs[0]]
        readers = graph.consumers(source.name)
        if (
            source.op in ("conv", "depthwise")
            and set(node.inputs) == {source.name, gate.name}
            and len(readers) == 2
            and graph.only_consumer(gate.name) is node
            and source.name not in graph.outputs
            and source.attrs["activation"] == "linear"
            and source.shape[:-1] != (1, 1)
            and not (source.is_float or node.is_float or gate.is_float)
        ):
            return source
    return None


def equalize_swish(
    graph: Graph,
    statistics: dict[str, TensorStatistics],
    names: list[str],
    least_gain: float | None = None,
) -> None:
    """Equalizes the tensors around some swishes, in the graph and in its statistics.

    Args:
        graph: The folded graph, changed in place.
        statistics: Statistics of the float graph, changed in place to those of the new tensors.
        names: Swishes, out of `swish_candidates`.
        least_gain: Swishes whose noise-to-signal ratio would fall by less are left as they are, to
            save the multiplication; None equalizes all.

    Raises:
        ValueError: If a name is not a candidate.
    """
    for name in names:
        if name not in graph.nodes or not swish_source(graph, graph[name]):
            raise ValueError(
                "Only a swish directly behind a convolution can be equalized. "
                f"Allowed: {swish_candidates(graph)}. Received: {name!r}"
            )
        node = graph[name]
        source = swish_source(graph, node)
        found = search_factors(statistics[source.name], energy(graph, name))
        if least_gain is not None and found.noise_without - found.noise < least_gain:
            continue
        factors = found.values
        divide_outputs(source, factors)
        gate = next(graph[other] for other in node.inputs if graph[other].op == "sigmoid")
        scale = Node(
            graph.unique(f"{name}_scale"),
            "scale",
            [source.name],
            source.shape,
            node.layer,
            weights={"factors": factors},
        )
        graph.add(scale, after=source.name)
        gate.inputs = [scale.name]
        statistics[scale.name] = statistics[source.name]
        statistics[source.name] = statistics[source.name].divided_by(factors)
        for changed in absorb(graph, name, factors):
            statistics[changed] = statistics[changed].divided_by(factors)


def divide_outputs(source: Node, factors: np.ndarray) -> None:
    """Divides the output channels of a convolution by factors, in place, and notes that it did."""
    kernel = source.weights["kernel"]
    shape = (-1, 1) if source.op == "depthwise" else (-1,)
    source.weights["kernel"] = (kernel / factors.reshape(shape)).astype(np.float32)
    for key in ("bias", "mean", "deviation"):
        if key in source.weights:
            source.weights[key] = (source.weights[key] / factors).astype(np.float32)
    source.weights["divisors"] = source.weights.get("divisors", np.float32(1)) * factors


def best_swishes(
    graph: Graph, statistics: dict[str, TensorStatistics], names: list[str], share: float
) -> list[str]:
    """Returns the swishes that save the most noise for the multiplications that they may cost.

    A multiplication takes time in proportion to the elements of its tensor, so those come first
    that save most for each element: late layers, whose tensors are small.

    Args:
        graph: The folded graph, as it is before any swish is equalized.
        statistics: Statistics of the float graph.
        names: Swishes, out of `swish_candidates`.
        share: Largest share of the elements of all these swishes, in 0..1.

    Returns:
        Some of the names, in the order of the graph.
    """
    elements, value = {}, {}
    for name in names:
        source = swish_source(graph, graph[name])
        found = search_factors(statistics[source.name], energy(graph, name))
        elements[name] = int(np.prod(graph[name].shape))
        value[name] = (found.noise_without - found.noise) / elements[name]
    left, chosen = share * sum(elements.values()), set()
    for name in sorted(names, key=value.get, reverse=True):
        if value[name] > 0 and elements[name] <= left:
            left -= elements[name]
            chosen.add(name)
    return [name for name in names if name in chosen]


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of a swish, and what they are good for.

    Attributes:
        values: float32, shape (channels,), multiples of their maximum / FACTOR_STEPS.
        noise: Noise-to-signal ratio behind the swish, measured on images that the factors were not
            fitted to.
        noise_without: The same without equalization.
    """

    values: np.ndarray
    noise: float
    noise_without: float


def search_factors(statistics: TensorStatistics, importance: np.ndarray) -> Factors:
    """Returns the factors that make the rounding errors behind a swish smallest.

    For given ranges of the two integer tensors x / s and swish(x) / s the channels do not depend
    on each other, so each takes the best of its candidates.

    A channel that is small on the calibration images need not be so on others: late channels of a
    network fire for a few classes alone. So no factor is smaller than a quantile of the reaches of
    all channels, and that quantile is chosen by two-fold cross-validation over the images.

    Args:
        statistics: Statistics of the convolution's output.
        importance: Weight of the squared error of each channel, shape (channels,).

    Returns:
        The factors. Where no equalization did better they are all the same.
    """
    values, exact, rows, images = search_rows(statistics)
    # A swish is flat below, so what lies there matters less.
    low = np.minimum(-FLAT_BELOW, -statistics.low) / 2
    reach = np.maximum(np.maximum(statistics.high, low), 1e-6)
    candidates = np.append(reach.max() * RELATIVE_FACTORS, reach.max()).astype(np.float32)
    importance = importance / max(importance.mean(), 1e-30)
    # Weighted errors and signals of both halves of the images, shape (2, candidates, channels).
    errors = np.empty((2, len(candidates), len(reach)))
    for number in (0, 1):
        half = images % 2 == number
        of_half = values[half], exact[half]
        for index, factor in enumerate(candidates):
            errors[number, index] = (rows[half] @ _squared_errors(*of_half, factor)) * importance
    signal = float((rows @ exact**2) @ importance)

    def choose(of_errors, floor):
        allowed = np.where(candidates[:, None] >= floor, of_errors, np.inf)
        return allowed.argmin(axis=0)

    channels = np.arange(len(reach))
    floors = [np.quantile(reach, quantile) if quantile else 0.0 for quantile in FLOORS]
    noises = [
        sum(errors[1 - half][choose(errors[half], floor), channels].sum() for half in (0, 1))
        / max(signal, 1e-30)
        for floor in floors
    ]
    best = int(np.argmin(noises))
    factors = candidates[choose(errors.sum(axis=0), floors[best])]
    step = factors.max() / FACTOR_STEPS
    values = (np.maximum(np.round(factors / step), SMALLEST_STEPS) * step).astype(np.float32)
    without = errors[:, -1].sum() / max(signal, 1e-30)
    return Factors(values, float(noises[best]), float(without))


def search_rows(statistics):
    """Returns a bounded choice of rows: values, swishes, weights and numbers of the images."""
    extreme = statistics.weights < statistics.weights.max()
    kept, weights = [], []
    for part in (np.flatnonzero(~extreme), np.flatnonzero(extreme)):
        stride = max(1, len(part) // SEARCH_ROWS)
        kept.append(part[::stride])
        weights.append(statistics.weights[part[::stride]] * np.float32(stride))
    chosen = np.concatenate(kept)
    values = statistics.sample[chosen]
    return values, swish(values), np.concatenate(weights), statistics.images[chosen]


def _squared_errors(values, exact, factor):
    """Returns what rounding in the units of a factor does to the output of a swish, squared."""
    low_in, low_out, high = RANGES
    scale, zero = levels_of(low_in, high)
    # The input has 256 values, so has the output.
    inputs = (np.arange(256, dtype=np.float32) - zero) * scale * factor
    outputs = round_to(swish(inputs) / factor, low_out, high) * factor
    levels = values / (factor * scale)
    np.rint(levels, out=levels)
    levels += zero
    errors = np.take(outputs, levels.astype(np.intp), mode="clip")
    errors -= exact
    return np.square(errors, out=errors)


def swish(values):
    return values / (1 + np.exp(-np.clip(values, -80, 80)))


def levels_of(low, high):
    """Returns the step of 256 levels from -low to high, and the number of the one for zero."""
    scale = np.float32((high + low) / 255)
    return scale, np.round(low / scale)


def round_to(values, low, high):
    scale, zero = levels_of(low, high)
    return np.clip(np.round(values / scale), -zero, 255 - zero) * scale


# Operations that commute with positive factors of the channels.
_PASSING = ("global_avg", "global_max", "avg_pool", "max_pool", "dropout", "pad")


def absorb(graph: Graph, name: str, factors: np.ndarray | None) -> list[str] | None:
    """Lets all readers of a tensor that was divided by `factors` multiply by them again.

    Args:
        graph: The graph.
        name: The tensor.
        factors: The factors; None only asks whether it is possible.

    Returns:
        The names of the tensors with statistics that are divided too, `name` first; or None if
        a reader cannot absorb factors.
    """
    divided = [name]
    if name in graph.outputs:
        return None
    for reader in graph.consumers(name):
        if reader.is_float:
            return None
        if reader.op in ("conv", "depthwise", "dense"):
            if reader.op == "conv" and reader.attrs["groups"] != 1:
                return None
            if factors is not None:
                kernel = reader.weights["kernel"] * factors[:, None]
                reader.weights["kernel"] = kernel.astype(np.float32)
        elif reader.op in _PASSING or (reader.op == "mul" and _is_gated(graph, reader, name)):
            further = absorb(graph, reader.name, factors)
            if further is None:
                return None
            # Operations that only pass values on have no statistics of their own.
            divided.extend(further if OUTPUT_RULES[reader.op] == OWN else further[1:])
        else:
            return None
    return divided


def _is_gated(graph: Graph, node: Node, name: str) -> bool:
    """Whether `node` multiplies the tensor `name` by a vector for the image, such as SE gates."""
    others = [other for other in node.inputs if other != name]
    return len(others) == 1 and graph[others[0]].shape[:-1] == (1, 1)
