"""Where a quantized model loses accuracy: `analyze`, and the layers to keep in float for it.

The float computation is put into the form of the quantized graph: the same nodes, the same
equalization, so that each tensor is compared with itself. It predicts what the float model
predicts. The quantized kernels and ranges are switched on in it, all at once or for one layer.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence

import keras
import numpy as np
from keras import ops

from .build import RANGE_SUFFIX, build_model, in_float32
from .calibration import calibration_batches
from .fake_quant import FakeQuant
from .files import write_json
from .folding import fold
from .graph import KERNEL_OPS, Graph, Node, kernel_owner, read_model
from .lowering import dequantized_kernel, integer_kernel, read_quantized
from .params import KERNEL_MAX, UNIT_INTERVAL, kernel_scales
from .quantize import QuantizationConfig, quantize_model
from .sides import POSITIVE, is_negative_side
from .splitting import split_candidates, split_swishes

LEVELS = 256
# Images in a batch, when the data are one array: two models' tensors are held at once.
BATCH_SIZE = 8
# An 8-bit output of 0 stands for probabilities up to half a step. Smaller ones count as that in the
# divergence, which would be infinite otherwise.
SMALLEST_PROBABILITY = UNIT_INTERVAL.scale / 2
# SQNR of a tensor that quantization does not change, in the table and the plot.
EXACT = math.inf

TENSOR, KERNEL = "tensor", "kernel"

_SQNR_COLOUR, _LOSS_COLOUR = "#0072B2", "#D55E00"


@dataclasses.dataclass(frozen=True)
class AnalysisRow:
    """What quantization does to one tensor or one kernel.

    Attributes:
        layer: Name of the layer of the float model that it belongs to.
        name: Name of the node of the quantized model.
        kind: "tensor" or "kernel".
        sqnr: Ratio of the power of the float values to that of their error in the quantized
            model, in dB. It is infinite where there is no error, and counts what earlier layers
            did to a tensor.
        low: Smallest value in float.
        high: Largest value in float.
        minimum: Smallest value that the 8 bits hold.
        maximum: Largest value that the 8 bits hold.
        scale: Size of one step; of a kernel with a scale for each channel the largest.
        zero_point: The integer that stands for 0.
        clipped: Share of the values outside the range: in the quantized model, before rounding.
        dead_levels: How many of the 256 levels (kernels: 255) no value used.
    """

    layer: str
    name: str
    kind: str
    sqnr: float
    low: float
    high: float
    minimum: float
    maximum: float
    scale: float
    zero_point: int
    clipped: float
    dead_levels: int


@dataclasses.dataclass(frozen=True)
class LayerLoss:
    """What the output loses when one layer (or the whole model) is quantized, and nothing else.

    Attributes:
        layer: Name of the layer of the float model.
        agreement_loss: Share of the images whose largest output is another one than in float; None
            if the first output is no vector.
        divergence: Mean Kullback-Leibler divergence of the outputs from those in float, in nats;
            None if the first output is no softmax.
        noise: Power of the error of the outputs, relative to that of the float outputs.
    """

    layer: str
    agreement_loss: float | None
    divergence: float | None
    noise: float

    @property
    def badness(self) -> float:
        """The figure by which layers are compared: the divergence, else the noise."""
        return self.noise if self.divergence is None else self.divergence


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Result of `analyze`.

    Attributes:
        model: Name of the float model.
        images: Number of images.
        rows: One row for each tensor and kernel, in the order of the graph.
        losses: What each layer costs alone, in the order of the graph.
        total: What the whole quantized model costs.
    """

    model: str
    images: int
    rows: tuple[AnalysisRow, ...]
    losses: tuple[LayerLoss, ...]
    total: LayerLoss

    def worst(self) -> tuple[str, ...]:
        """Returns the names of the layers whose loss was measured, the worst first."""
        ranked = sorted(self.losses, key=lambda loss: loss.badness, reverse=True)
        return tuple(loss.layer for loss in ranked)

    def table(self) -> str:
        """Returns the analysis as text, one line for each tensor and kernel."""
        losses = {loss.layer: loss for loss in self.losses}
        head = ("layer", "node", "kind", "SQNR dB", "low", "high", "minimum", "maximum")
        head += ("scale", "zero", "clipped", "dead", "agreement loss", "divergence", "noise")
        lines = [head]
        previous = None
        for row in self.rows:
            lines.append(
                (
                    row.layer,
                    row.name,
                    row.kind,
                    "exact" if row.sqnr == EXACT else f"{row.sqnr:.1f}",
                    *(f"{value:.4g}" for value in (row.low, row.high, row.minimum, row.maximum)),
                    f"{row.scale:.3g}",
                    str(row.zero_point),
                    f"{row.clipped:.2%}",
                    str(row.dead_levels),
                    # A layer's own loss stands once, beside its first row.
                    *_loss_cells(losses.get(row.layer) if row.layer != previous else None),
                )
            )
            previous = row.layer
        lines.append(("whole model", *[""] * 11, *_loss_cells(self.total)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        texts = []
        for line in lines:
            cells = [
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            texts.append("  ".join(cells).rstrip())
        return "\n".join(texts)

    def as_json(self) -> dict:
        """Returns the analysis as a dictionary for JSON; an infinite SQNR is None."""
        data = dataclasses.asdict(self)
        for row in data["rows"]:
            row["sqnr"] = row["sqnr"] if math.isfinite(row["sqnr"]) else None
        return data

    def save(self, path: str | os.PathLike) -> None:
        """Writes the analysis as JSON, whole or not at all; an existing file is replaced.

        Args:
            path: The file to write.

        Raises:
            OSError: If the file cannot be written.
        """
        write_json(path, self.as_json())

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the SQNR of each tensor and kernel, and the loss of each layer, as a picture.

        Args:
            path: The picture to write; its suffix is the format, such as .png or .svg.

        Raises:
            ImportError: If matplotlib is not installed; the message says how to install it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"`matplotlib` is needed to draw ({error}). "
                'Install it with: pip install "keras-effnet[plot]"'
            ) from error
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        places = {layer: place for place, layer in enumerate(layers)}
        # Each layer has a line of its own, so the picture grows with the model.
        figure = Figure(figsize=(11, 1.8 + 0.16 * len(layers)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, marker in ((TENSOR, "o"), (KERNEL, "x")):
            chosen = [row for row in self.rows if row.kind == kind and math.isfinite(row.sqnr)]
            left.plot(
                [row.sqnr for row in chosen],
                [places[row.layer] for row in chosen],
                linestyle="none",
                marker=marker,
                markersize=4,
                color=_SQNR_COLOUR,
                label=f"{kind}s",
            )
        left.set_yticks(range(len(layers)), layers, fontsize=7)
        left.set_ylim(len(layers) - 0.4, -0.6)
        left.set_xlabel("signal to quantization noise, dB (less is worse)")
        left.legend(loc="lower right", fontsize=8)
        right.barh(
            [places[loss.layer] for loss in self.losses],
            [loss.badness for loss in self.losses],
            height=0.7,
            color=_LOSS_COLOUR,
        )
        unit = "relative output noise" if self.total.divergence is None else "divergence, nats"
        right.set_xlabel(f"loss of the layer alone: {unit}")
        for axes in (left, right):
            axes.grid(color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Quantization of {self.model}, {self.images} images", weight="bold")
        figure.savefig(path, dpi=110)


@in_float32()
def analyze(
    model: keras.Model,
    quantized: keras.Model,
    data: Iterable | np.ndarray,
    *,
    layers: Sequence[str] | None = None,
    verbose: bool = True,
) -> Analysis:
    """Measures what quantization does to every tensor, kernel and layer of a model.

    The rows take two passes of the data through the model. The losses take one more for each
    layer, so choose `layers`, or few images, for a large model.

    Args:
        model: The float model that `quantized` was made of.
        quantized: The model that `quantize_model` returned, as it is or trained further.
        data: Images as the model takes them: an array (images, height, width, channels), or an
            iterable of batches (of tuples whose first element is the batch). They are streamed.
        layers: Names of layers of `model` whose losses are measured, each quantized alone; by
            default all that are quantized. `()` measures none.
        verbose: Whether to show progress.

    Returns:
        The analysis.

    Raises:
        TypeError: If a model is not Functional, or the data are neither an array nor an iterable.
        ValueError: If `quantized` is not quantized or was made of another model, if `layers` names
            an unknown layer or one that is not quantized, or if the images are empty, constant,
            not finite, or of the wrong shape or scale.
    """
    graph = read_quantized(quantized)
    exact, pixels_graph = _float_twin(model, graph)
    names = {node.name: exact[node.name].layer for node in graph}
    groups = _groups(graph, names)
    chosen = list(groups) if layers is None else list(layers)
    unknown = [name for name in chosen if name not in groups]
    if isinstance(layers, str) or unknown:
        raise ValueError(
            "`layers` must be a sequence of names of quantized layers. "
            f"Allowed: {list(groups)}. Received: {layers!r}"
        )
    batches, total = calibration_batches(data, pixels_graph, BATCH_SIZE, minimum=1)
    ranged = [node.name for node in graph if node.params is not None]
    single = _Switched(exact, graph, ranged) if chosen else None
    observer = _Observer(exact, graph, ranged)
    statistics = {name: _Sums() for name in ranged}
    meters = {layer: _Meter(graph) for layer in chosen}
    meter = _Meter(graph)
    images = 0
    steps = None if total is None else total * (1 + len(chosen))
    progress = keras.utils.Progbar(steps, verbose=1 if verbose else 0, unit_name="pass")
    for batch in batches:
        images += len(batch)
        expected, rounded, sums = observer.observe(batch)
        for name, parts in sums.items():
            statistics[name].update(*parts)
        meter.update(expected, rounded)
        progress.add(1)
        for layer in chosen:
            meters[layer].update(expected, single.predict(batch, groups[layer]))
            progress.add(1)
    rows = []
    for node in graph:
        own_kernel = node.op in KERNEL_OPS and kernel_owner(node) == node.name
        if own_kernel and not node.is_float:
            rows.append(_kernel_row(names[node.name], node, exact[node.name]))
        if node.params is not None:
            rows.append(statistics[node.name].row(names[node.name], node))
    rows = sorted(rows, key=lambda row, order=tuple(groups): order.index(row.layer))
    losses = tuple(meters[layer].result(layer) for layer in chosen)
    return Analysis(model.name, images, tuple(rows), losses, meter.result("whole model"))


def fewest_float_layers(
    model: keras.Model,
    calibration_data: Iterable | np.ndarray,
    evaluation_data: Iterable | np.ndarray,
    agreement: float,
    config: QuantizationConfig | None = None,
    *,
    most: int | None = None,
    verbose: bool = True,
) -> tuple[str, ...]:
    """Finds the layers to keep in float so that a quantized model agrees with the float model.

    Layers are taken in the order of `Analysis.worst`, as few as do it: their number is found by
    doubling and then by bisection, and each number that is tried is a model quantized anew.

    Args:
        model: The float model; it is not changed.
        calibration_data: As `quantize_model` takes them. They are read several times, so a
            generator does not do.
        evaluation_data: Images in the same form, other ones than for calibration, without labels.
        agreement: Share of the evaluation images, in (0, 1], whose largest output must be the same
            one as in float.
        config: How to quantize; its `keep_float` layers are kept in any case.
        most: Largest number of further layers to keep in float; by default any number.
        verbose: Whether to show progress.

    Returns:
        Names of layers for `QuantizationConfig(keep_float=...)`, those of `config` first.

    Raises:
        TypeError: If data can be read only once, or the model is not supported.
        ValueError: If `agreement` or `most` is not allowed, if the first output of the model is no
            vector, if the data are not usable, or if the agreement is out of reach; the message
            then names the best that was reached.
    """
    config = QuantizationConfig() if config is None else config
    if not 0 < agreement <= 1:
        raise ValueError(f"`agreement` must be a share in (0, 1]. Received: {agreement}")
    if most is not None and most < 0:
        raise ValueError(f"`most` must be at least 0. Received: {most}")
    given = {"calibration_data": calibration_data, "evaluation_data": evaluation_data}
    for name, data in given.items():
        if hasattr(data, "__next__"):
            raise TypeError(
                f"`{name}` are read several times: give an array, a list of batches or a "
                f"`tf.data.Dataset`. Received: {type(data).__name__}"
            )

    def quantize(kept):
        chosen = dataclasses.replace(config, keep_float=kept)
        quantized = quantize_model(model, calibration_data, chosen, verbose=verbose)
        return quantized

    def reached(quantized, layers=()):
        found = analyze(model, quantized, evaluation_data, layers=layers, verbose=verbose)
        if found.total.agreement_loss is None:
            raise ValueError(
                f"Agreement needs a model whose first output is a vector of scores. Received: "
                f"{model.name!r} with the output shape {model.outputs[0].shape}"
            )
        return 1 - found.total.agreement_loss, found

    best, analysis = reached(quantize(config.keep_float), layers=None)
    if best >= agreement:
        return config.keep_float
    # The input is no layer that could be kept in float.
    images = read_model(model, config.keep_float).input
    ranked = [name for name in analysis.worst() if name != images][:most]
    enough, count, tried, found = None, 1, 0, {}
    while ranked and enough is None:
        count = min(count, len(ranked))
        kept = (*config.keep_float, *ranked[:count])
        found[count] = reached(quantize(kept))[0]
        if found[count] >= agreement:
            enough = count
        elif count == len(ranked):
            break
        else:
            tried, count = count, 2 * count
    if enough is None:
        found[0] = best
        number = max(found, key=lambda key: (found[key], -key))
        raise ValueError(
            f"An agreement of {agreement:.2%} is out of reach. The best, {found[number]:.2%}, is "
            f"reached with these layers in float: {(*config.keep_float, *ranked[:number])}. Ask "
            "for less, allow more layers (`most`), or use other corrections."
        )
    while enough - tried > 1:
        middle = (enough + tried) // 2
        if reached(quantize((*config.keep_float, *ranked[:middle])))[0] >= agreement:
            enough = middle
        else:
            tried = middle
    return (*config.keep_float, *ranked[:enough])


def _loss_cells(loss: LayerLoss | None) -> tuple[str, str, str]:
    if loss is None:
        return "", "", ""
    agreement = "-" if loss.agreement_loss is None else f"{loss.agreement_loss:.2%}"
    divergence = "-" if loss.divergence is None else f"{loss.divergence:.3g}"
    return agreement, divergence, f"{loss.noise:.3g}"


# --- The float computation in the form of the quantized graph ----------------------------------


def _float_twin(model: keras.Model, graph: Graph) -> tuple[Graph, Graph]:
    """Returns the folded float graph with the nodes of a quantized graph, and the unfolded one."""
    plain = read_model(model, _kept_float(model, graph))
    exact = fold(read_model(model, _kept_float(model, graph)))
    for node in graph:
        if node.op == "scale":
            _insert_scale(exact, graph, node)
    split = [node.name for node in graph if node.attrs.get("part") == POSITIVE]
    split_swishes(exact, [name for name in split if name in split_candidates(exact)])
    same = sorted(exact.nodes) == sorted(graph.nodes) and all(
        node.op == graph[node.name].op and node.shape == graph[node.name].shape for node in exact
    )
    if not same:
        differing = sorted(set(exact.nodes) ^ set(graph.nodes))[:5]
        raise ValueError(
            "The quantized model was made of another model: their layers or shapes differ. Give "
            f"the float model that it was made of. Received: {model.name!r} and {graph.name!r}; "
            f"layers of one alone: {differing}"
        )
    _divide_channels(exact)
    return exact, plain


def _kept_float(model: keras.Model, graph: Graph) -> tuple[str, ...]:
    unfolded = read_model(model)
    kept = {
        node.layer for node in unfolded if node.name in graph.nodes and graph[node.name].is_float
    }
    return tuple(sorted(kept))


def _insert_scale(exact: Graph, graph: Graph, node: Node) -> None:
    gates = [gate.name for gate in graph.consumers(node.name)]
    source = node.inputs[0]
    if source not in exact.nodes or any(gate not in exact.nodes for gate in gates):
        return  # Another model; the comparison of the nodes says so.
    gate = exact[gates[0]]
    weights = {"factors": node.weights["factors"]}
    scale = Node(node.name, "scale", [source], node.shape, gate.layer, weights=weights)
    exact.add(scale, after=source)
    gate.inputs = [scale.name]


def _divide_channels(exact: Graph) -> None:
    """Divides the channels of a float graph by the factors of the equalized one, exactly.

    The factors stand in the quantized graph, in the "scale" nodes before the gates of the swishes.
    """
    factors = {}
    for node in exact:
        ones = np.ones(node.shape[-1])
        if node.op in KERNEL_OPS:
            scales = [reader for reader in exact.consumers(node.name) if reader.op == "scale"]
            factors[node.name] = scales[0].weights["factors"].astype(np.float64) if scales else ones
            _rescale(node, factors)
        elif node.op == "mul":
            gated = [factors[name] for name in node.inputs]
            factors[node.name] = gated[0] * gated[1]
        elif node.op in ("global_avg", "global_max", "avg_pool", "max_pool", "dropout", "pad"):
            factors[node.name] = factors[node.inputs[0]]
        elif node.op == "add" and is_negative_side(exact, exact[node.inputs[1]]):
            factors[node.name] = factors[node.inputs[0]]
        else:
            factors[node.name] = ones


def _times_inputs(node, factors):
    kernel = node.weights["kernel"].astype(np.float64)
    if node.attrs.get("groups", 1) != 1:  # Never behind equalized channels.
        return kernel
    return kernel * (factors[:, None] if len(factors) == kernel.shape[-2] else 1.0)


def _rescale(node, factors):
    own = factors[node.name]
    kernel = _times_inputs(node, factors[node.inputs[0]])
    kernel = kernel / (own.reshape(-1, 1) if node.op == "depthwise" else own)
    node.weights["kernel"] = kernel.astype(np.float32)
    node.weights["bias"] = (node.weights["bias"] / own).astype(np.float32)


# --- A model whose layers are quantized one by one -----------------------------------------------


class _Switch(FakeQuant):
    """`FakeQuant` that can be switched off: it then is the identity."""

    def build(self, input_shape):
        super().build(input_shape)
        self.enabled = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="enabled"
        )

    def call(self, inputs):
        return ops.cond(self.enabled > 0, lambda: super(_Switch, self).call(inputs), lambda: inputs)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@dataclasses.dataclass
class _Group:
    """What belongs to one layer of the float model: kernels and ranges, by node."""

    kernels: list[str] = dataclasses.field(default_factory=list)
    ranges: list[str] = dataclasses.field(default_factory=list)


def _groups(graph: Graph, layers: dict[str, str]) -> dict[str, _Group]:
    groups = {}
    for node in graph:
        quantized_kernel = node.op in KERNEL_OPS and not node.is_float
        if not quantized_kernel and node.params is None:
            continue
        group = groups.setdefault(layers[node.name], _Group())
        if quantized_kernel:
            group.kernels.append(node.name)
        if node.params is not None:
            group.ranges.append(node.name)
    return groups


class _Switched:
    """The float model, in which the kernels and ranges of chosen layers are quantized."""

    def __init__(self, exact: Graph, graph: Graph, ranged: list[str]):
        twin = Graph(exact.name)
        twin.input, twin.outputs = exact.input, exact.outputs
        for node in exact:
            params = graph[node.name].params
            twin.add(dataclasses.replace(node, params=params, is_float=True))
        self.model = build_model(twin, quantized=True, range_layer=_Switch)
        self.model.jit_compile = False  # It would compute both sides of every switch.
        self.outputs = twin.outputs
        self.switches = {name: self.model.get_layer(name + RANGE_SUFFIX) for name in ranged}
        self.exact, self.rounded = {}, {}
        for node in graph:
            if node.op in KERNEL_OPS and not node.is_float:
                weights = exact[node.name].weights
                self.exact[node.name] = weights["kernel"], weights["bias"]
                self.rounded[node.name] = dequantized_kernel(node), node.weights["bias"]

    def predict(self, batch: np.ndarray, group: _Group) -> list[np.ndarray]:
        """Returns the outputs, as a list, with one group quantized."""
        self._switch(group, 1.0, self.rounded)
        outputs = self.model.predict_on_batch(batch)
        self._switch(group, 0.0, self.exact)
        return [outputs] if len(self.outputs) == 1 else list(outputs)

    def _switch(self, group, enabled, weights):
        for name in group.kernels:
            layer = self.model.get_layer(name)
            kernel, bias = weights[name]
            layer.kernel.assign(kernel)
            layer.bias.assign(bias)
        for name in group.ranges:
            self.switches[name].enabled.assign(enabled)


class _Observer(keras.Model):
    """The float and the quantized model on the same images, and sums over each tensor."""

    def __init__(self, exact: Graph, graph: Graph, ranged: list[str]):
        super().__init__(name="observer")
        self.jit_compile = False  # It takes longer than the sums.
        self.ranged = ranged
        self.params = {name: graph[name].params for name in ranged}
        model = build_model(exact, quantized=False, observed=(*exact.outputs, *ranged))
        number = len(exact.outputs)
        outputs = [model.outputs[:number], model.outputs[number:]]
        self.exact = keras.Model(model.input, outputs)
        model = build_model(graph, quantized=True)
        layers = [model.get_layer(name + RANGE_SUFFIX) for name in ranged]
        before, after = [layer.input for layer in layers], [layer.output for layer in layers]
        self.rounded = keras.Model(model.input, [model.outputs, before, after])

    def call(self, images):
        expected, exact = self.exact(images)
        found, before, after = self.rounded(images)
        sums = [
            self._sums(self.params[name], *tensors)
            for name, *tensors in zip(self.ranged, exact, before, after, strict=True)
        ]
        return expected, found, sums

    @staticmethod
    def _sums(params, exact, before, after):
        """Returns (signal, noise, low, high, clipped) of each image, and counts of the levels."""
        shape = (ops.shape(exact)[0], -1)
        exact, before, after = (ops.reshape(part, shape) for part in (exact, before, after))
        # Half a step beyond the bounds is rounded, not clipped.
        margin = params.scale / 2
        outside = (before < params.min - margin) | (before > params.max + margin)
        levels = ops.cast(ops.round((after - params.min) / params.scale), "int32")
        levels = ops.reshape(ops.clip(levels, 0, LEVELS - 1), (-1,))
        counts = ops.segment_sum(ops.ones_like(levels), levels, num_segments=LEVELS)
        return [
            ops.sum(exact**2, axis=1),
            ops.sum((after - exact) ** 2, axis=1),
            ops.min(exact, axis=1),
            ops.max(exact, axis=1),
            ops.mean(ops.cast(outside, "float32"), axis=1),
            # The leading 1 lets `predict_on_batch` return sums, which have no batch.
            ops.expand_dims(counts, 0),
        ]

    def observe(self, batch):
        """Returns the float outputs, the quantized ones, and the sums by tensor."""
        expected, found, sums = self.predict_on_batch(batch)
        return expected, found, dict(zip(self.ranged, sums, strict=True))


class _Sums:
    """The sums of one tensor over all batches."""

    def __init__(self):
        self.signal = self.noise = self.clipped = 0.0
        self.low, self.high = math.inf, -math.inf
        self.images = 0
        self.counts = np.zeros(LEVELS, np.int64)

    def update(self, signal, noise, low, high, clipped, counts):
        self.signal += float(np.sum(signal, dtype=np.float64))
        self.noise += float(np.sum(noise, dtype=np.float64))
        self.clipped += float(np.sum(clipped, dtype=np.float64))
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        self.images += len(signal)
        self.counts += counts[0]

    def row(self, layer: str, node: Node) -> AnalysisRow:
        return AnalysisRow(
            layer=layer,
            name=node.name,
            kind=TENSOR,
            sqnr=_decibels(self.signal, self.noise),
            low=self.low,
            high=self.high,
            minimum=node.params.min,
            maximum=node.params.max,
            scale=node.params.scale,
            zero_point=node.params.zero_point,
            clipped=self.clipped / self.images,
            dead_levels=int(np.sum(self.counts == 0)),
        )


def _kernel_row(layer: str, node: Node, exact: Node) -> AnalysisRow:
    kernel = exact.weights["kernel"]
    error = dequantized_kernel(node).astype(np.float64) - kernel
    limits = node.weights["limits"]
    scales = kernel_scales(limits)
    shape = (-1, 1) if node.op == "depthwise" else (-1,)
    outside = np.abs(kernel) > (limits + scales / 2).reshape(shape)
    used = len(np.unique(integer_kernel(node)[0]))
    return AnalysisRow(
        layer=layer,
        name=node.name,
        kind=KERNEL,
        sqnr=_decibels(float(np.sum(kernel.astype(np.float64) ** 2)), float(np.sum(error**2))),
        low=float(kernel.min()),
        high=float(kernel.max()),
        minimum=-float(limits.max()),
        maximum=float(limits.max()),
        scale=float(scales.max()),
        zero_point=0,
        clipped=float(np.mean(outside)),
        dead_levels=2 * KERNEL_MAX + 1 - used,
    )


def _decibels(signal: float, noise: float) -> float:
    if not noise:
        return EXACT
    return 10 * math.log10(max(signal, 1e-30) / noise)


class _Meter:
    """How far outputs are from those in float."""

    def __init__(self, graph: Graph):
        first = graph[graph.outputs[0]]
        self.votes = len(first.shape) == 1 and first.shape[0] > 1
        self.softmax = self.votes and first.op == "softmax"
        self.images = self.changed = 0
        self.divergence = self.signal = self.noise = 0.0

    def update(self, expected: list[np.ndarray], found: list[np.ndarray]) -> None:
        self.images += len(expected[0])
        for exact, other in zip(expected, found, strict=True):
            exact, other = exact.astype(np.float64), other.astype(np.float64)
            self.signal += float(np.sum(exact**2))
            self.noise += float(np.sum((other - exact) ** 2))
        if self.votes:
            exact, other = expected[0], found[0]
            self.changed += int(np.sum(exact.argmax(axis=-1) != other.argmax(axis=-1)))
        if self.softmax:
            p, q = (
                np.maximum(part.astype(np.float64), SMALLEST_PROBABILITY) for part in (exact, other)
            )
            p, q = (part / part.sum(axis=-1, keepdims=True) for part in (p, q))
            self.divergence += float(np.sum(p * np.log(p / q)))

    def result(self, layer: str) -> LayerLoss:
        return LayerLoss(
            layer=layer,
            agreement_loss=self.changed / self.images if self.votes else None,
            divergence=self.divergence / self.images if self.softmax else None,
            noise=self.noise / max(self.signal, 1e-30),
        )
