"""`quantize_model`: a float Keras model in, a quantized Keras model out."""

import dataclasses
from collections.abc import Iterable, Mapping

import keras
import numpy as np

from . import equalization, rescaling, splitting
from .bias import correct_biases
from .build import build_model
from .calibration import TensorStatistics, calibration_batches, collect
from .fake_quant import FIXED_RANGES, TRAINING_RANGES
from .folding import fold
from .graph import Graph, read_model
from .importance import consumer_of
from .lowering import is_quantized
from .params import PIXELS, QuantParams, widen
from .ranges import METHODS, find_range
from .ranges_file import TensorRange, check_ranges
from .reconstruction import reconstruct_kernels
from .rounding import collect_covariances, round_kernels
from .scheme import FIXED, OUTPUT_RULES, expects_pixels, fixed_params, needs_range, shared_ranges
from .sides import bind_ranges, negative_name
from .ties import remove_ties, round_biases

NATIVE, TFMOT = ENGINES = ("native", "tfmot")
FOLDED, TRAINED = "folded", "trained"
BATCH_NORMS = (FOLDED, TRAINED)
DEFAULT_CORRECTIONS = (
    "swish_equalization",
    "swish_splitting",
    "learned_rounding",
    "bias_correction",
    "kernel_reconstruction",
)
CORRECTIONS = ("swish_rescaling", *DEFAULT_CORRECTIONS)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantized.

    Args:
        method: How ranges are found from the calibration data: "min_max", "moving_average",
            "percentile", "mse", "entropy", or "consumer", which measures the squared error after
            the swish, sigmoid or kernel that reads the tensor.
        corrections: What is done beyond ranges, out of `CORRECTIONS`:

            - "swish_equalization": channels of very different ranges are brought closer through
              the swish that follows them, exactly, for one more multiplication (`equalization`);
            - "swish_rescaling": channels of very different ranges are brought closer through the
              swish that follows them, approximately, for nothing (`rescaling`): for fast files
              without equalization, best followed by training; swishes that are equalized are left
              out; needs one more pass over the data;
            - "swish_splitting": the two sides of late swishes have steps of their own, for one more
              product, gating and projection each (`splitting`); left out with
              `batch_norm="trained"`, since such a projection has no batch norm of its own, and by
              the engine "tfmot";
            - "learned_rounding": kernels are rounded so that the errors of their weights cancel
              (`rounding`); needs one more pass over the data, and about as long as all the rest;
            - "bias_correction": biases take up the mean of the rounding errors (`bias`);
            - "kernel_reconstruction": the depthwise kernels and the projections at the ends of
              blocks are fitted to the float model's outputs, from inputs with all errors before
              them (`reconstruction`); needs about two more passes over the data.
        equalize: Swishes to equalize: "auto", those where it saves much noise; "all"; a share of
            their elements in (0, 1), such as 0.25, for those that save most noise for each element,
            which gives faster files; or a tuple of layer names.
        per_channel_head: Whether dense layers have one scale for each unit. Needs FULLY_CONNECTED
            of version 12 (TensorFlow 2.14); the Edge TPU wants False.
        keep_float: Names of layers to keep in float.
        batch_size: Images in a calibration batch, when the data are one array.
        training_ranges: What `fit` does to the ranges of the quantized model: "fixed" leaves them;
            "moving_average" lets them follow the extremes of the batches until `FreezeRanges`
            freezes them; "learned" trains them by gradient.
        batch_norm: What `fit` does where a batch norm was folded: "folded" trains the folded
            kernel and bias alone, which is fastest; "trained" normalizes by the moments of the
            batches until `FreezeBatchNorms` freezes them. `settle` folds again; the integers are
            the same until something is trained.

    Raises:
        ValueError: If a value is not allowed.
    """

    method: str = "consumer"
    corrections: tuple[str, ...] = DEFAULT_CORRECTIONS
    equalize: str | float | tuple[str, ...] = "auto"
    per_channel_head: bool = True
    keep_float: tuple[str, ...] = ()
    batch_size: int = 8
    training_ranges: str = FIXED_RANGES
    batch_norm: str = FOLDED

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}. Received: {self.method!r}")
        if isinstance(self.equalize, str | int | float):
            share = not isinstance(self.equalize, str | bool) and 0 < self.equalize < 1
            if not share and self.equalize not in ("auto", "all"):
                raise ValueError(
                    "`equalize` must be 'auto', 'all', a share in (0, 1) or a tuple of layer "
                    f"names. Received: {self.equalize!r}"
                )
        else:
            object.__setattr__(self, "equalize", tuple(self.equalize))
        if isinstance(self.keep_float, str):
            raise ValueError(
                f"`keep_float` must be a tuple of layer names. Received: {self.keep_float!r}"
            )
        unknown = [name for name in self.corrections if name not in CORRECTIONS]
        if isinstance(self.corrections, str) or unknown:
            raise ValueError(
                f"`corrections` must be a tuple of names out of {CORRECTIONS}. "
                f"Received: {self.corrections!r}"
            )
        object.__setattr__(self, "corrections", tuple(self.corrections))
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        if self.training_ranges not in TRAINING_RANGES:
            raise ValueError(
                f"`training_ranges` must be one of {TRAINING_RANGES}. "
                f"Received: {self.training_ranges!r}"
            )
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(
                f"`batch_norm` must be one of {BATCH_NORMS}. Received: {self.batch_norm!r}"
            )
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: {self.batch_size}")


def quantize_model(
    model: keras.Model,
    calibration_data: Iterable | np.ndarray | None,
    config: QuantizationConfig | None = None,
    verbose: bool = True,
    ranges: Mapping[str, TensorRange] | None = None,
    engine: str = NATIVE,
):
    """Quantizes a model to 8-bit integers, without labels and without training.

    Args:
        model: Functional or Sequential model of image layers, with one input of static shape; it
            is not changed.
        calibration_data: Typical images as the model takes them, without labels: an array
            (images, height, width, channels), or an iterable of batches (of tuples whose first
            element is the batch). 100 to 200 varied photographs are usual. None is allowed where
            nothing is measured: with `ranges` and without corrections.
        config: How to quantize; by default `QuantizationConfig()`.
        verbose: Whether to show the progress of calibration.
        ranges: Ranges from `load_calibration`, used in place of a search for the tensors that they
            name. They fit the configuration that they were found with.
        engine: "native", or "tfmot" for the same integers as a tf_keras model of
            tensorflow-model-optimization (`tfmot.quantize_model`, which tells what it does not
            allow).

    Returns:
        A new Functional model that predicts what the integer file will predict. Its layers carry
        8-bit kernels and its tensors pass through `FakeQuant` layers. It can be saved, trained
        and exported. With `engine="tfmot"`, a `tf_keras.Model`.

    Raises:
        TypeError: If the model is not Functional, a layer's type is not supported, or the data
            are neither an array nor an iterable.
        ValueError: If the model is quantized already, shares layers or has several inputs, or if
            the calibration data are empty, constant, not finite, or of the wrong shape or scale; if
            they are None though something is to be measured; if `ranges` do not fit the model.
    """
    if engine == TFMOT:
        from . import tfmot

        return tfmot.quantize_model(model, calibration_data, config, verbose, ranges)
    if engine != NATIVE:
        raise ValueError(f"`engine` must be one of {ENGINES}. Received: {engine!r}")
    config = QuantizationConfig() if config is None else config
    if is_quantized(model):
        raise ValueError(
            f"The model {model.name!r} is quantized already; quantize the float model it was made "
            "of."
        )
    graph = read_model(model, config.keep_float)
    pixels = expects_pixels(graph)
    if calibration_data is None:
        if ranges is None or config.corrections:
            raise ValueError(
                "`calibration_data` are needed, apart from quantization with `ranges` and "
                "`corrections=()`. Received: None, with "
                f"{'no ranges' if ranges is None else 'ranges'} and the corrections "
                f"{config.corrections}"
            )
        batches, total = (), 0
    else:
        batches, total = calibration_batches(calibration_data, graph, config.batch_size, minimum=2)
    learned, rescaled, reconstructed = (
        name in config.corrections
        for name in ("learned_rounding", "swish_rescaling", "kernel_reconstruction")
    )
    images = _Kept(batches) if learned or rescaled or reconstructed else batches
    fold(graph)
    statistics = {} if calibration_data is None else collect(graph, images, total, verbose)
    _equalize(graph, statistics, config)
    if rescaled:
        names = equalization.swish_candidates(graph)
        if rescaling.rescale_swishes(graph, statistics, names):
            statistics = collect(graph, images, total, verbose)
    _split(graph, statistics, config, ranges)
    if ranges is not None:
        check_ranges(graph, ranges, complete=calibration_data is None)
    _set_ranges(graph, statistics, config, pixels, ranges or {})
    bind_ranges(graph)
    set_kernel_limits(graph, config.per_channel_head)
    remove_ties(graph, shared_ranges(graph))
    kernels = {node.name: node.weights["kernel"] for node in graph.kernel_nodes()}
    if learned:
        round_kernels(graph, collect_covariances(graph, images, total, verbose))
    if "bias_correction" in config.corrections:
        correct_biases(graph, statistics, kernels)
    if reconstructed:
        teacher = read_model(model, config.keep_float)
        fold(teacher)
        reconstruct_kernels(teacher, graph, images, verbose)
    round_biases(graph)
    return build_model(
        graph,
        quantized=True,
        training_ranges=config.training_ranges,
        batch_norm=config.batch_norm == TRAINED,
    )


class _Kept:
    """Batches that can be iterated again: kept while they are drawn, pixels in 8 bits."""

    def __init__(self, batches):
        self.batches, self.kept, self.complete = batches, [], False

    def __iter__(self):
        if self.complete:
            for batch in self.kept:
                yield batch.astype(np.float32)
            return
        for batch in self.batches:
            pixels = batch.astype(np.uint8)
            self.kept.append(pixels if np.array_equal(pixels, batch) else batch)
            yield batch
        self.complete = True


def _equalize(graph, statistics, config):
    if "swish_equalization" not in config.corrections:
        return
    if isinstance(config.equalize, tuple):
        equalization.equalize_swish(graph, statistics, list(config.equalize))
        return
    candidates = equalization.swish_candidates(graph)
    if isinstance(config.equalize, float):
        chosen = equalization.best_swishes(graph, statistics, candidates, config.equalize)
        equalization.equalize_swish(graph, statistics, chosen)
        return
    least = equalization.LEAST_GAIN if config.equalize == "auto" else None
    equalization.equalize_swish(graph, statistics, candidates, least)


def _split(graph, statistics, config, ranges):
    if "swish_splitting" not in config.corrections or config.batch_norm == TRAINED:
        return
    names = splitting.split_candidates(graph)
    if ranges is None:
        chosen = [name for name in names if splitting.lobes_are_shallow(statistics[name])]
    else:  # Those that were split when they were found.
        chosen = [name for name in names if negative_name(name) in ranges]
    splitting.split_swishes(graph, chosen, statistics)


def _set_ranges(
    graph: Graph,
    statistics: dict[str, TensorStatistics],
    config: QuantizationConfig,
    pixels: bool,
    ranges: Mapping[str, TensorRange],
) -> None:
    for group in shared_ranges(graph):
        nodes = [graph[name] for name in group if needs_range(graph, graph[name])]
        if not nodes:
            continue
        if OUTPUT_RULES[nodes[0].op] == FIXED:
            params = fixed_params(graph, nodes[0])
        elif any(node.name in ranges for node in nodes):
            params = next(ranges[node.name].params for node in nodes if node.name in ranges)
        elif nodes[0].op == "input":
            params = _input_params(statistics[nodes[0].name], pixels)
        else:
            params = find_range(
                [statistics[node.name] for node in nodes],
                config.method,
                [consumer_of(graph, node.name) for node in nodes],
            )
        for node in nodes:
            node.params = params


def _input_params(statistics: TensorStatistics, pixels: bool) -> QuantParams:
    low, high = float(statistics.low.min()), float(statistics.high.max())
    # Values in 0..255 that reach beyond the darkest photographs are pixels.
    if pixels or (low >= 0 and 16 < high <= 255):
        return PIXELS
    return QuantParams.from_range(*widen(low, high))


def set_kernel_limits(graph: Graph, per_channel_head: bool) -> None:
    """Sets the limits of all kernels to the largest magnitudes of their channels, in place.

    Args:
        graph: The folded graph.
        per_channel_head: Whether dense layers have one limit for each unit, or one in all.
    """
    for node in graph.kernel_nodes():
        kernel = np.abs(node.weights["kernel"])
        if node.op == "dense":
            node.attrs["per_channel"] = per_channel_head
            limits = kernel.max(axis=0)
            limits = limits if per_channel_head else limits.max(keepdims=True)
        elif node.op == "depthwise":
            limits = kernel.max(axis=(0, 1, 3))
        else:
            limits = kernel.max(axis=(0, 1, 2))
        # A dead channel may take any limit; that of the others keeps its bias representable.
        usual = limits[limits > 0].mean() if np.any(limits > 0) else 1.0
        node.weights["limits"] = np.where(limits > 0, limits, usual).astype(np.float32)
