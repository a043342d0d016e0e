"""From a checkpoint to a filled model, and to one file that holds everything it needs.

Everything is checked before anything is built: which layout and variant a file has, that every
tensor is there in its shape and type, and that nothing is left over. One error lists all that does
not fit. A file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from ..builder import build, deep_graphs
from ..scaling import resolve
from ..specs import ADVPROP, SPECS, ModelSpec, PreprocessingSpec, get_spec
from ..weights import (
    HEAD,
    SPEC_MEMBER,
    STEM,
    StoredWeights,
    WeightsFileError,
    WeightsMismatchError,
    fetch_weights,
    find_source,
    listed,
    load_weights,
    models_folder,
    read_spec,
    read_weights,
    variant_of,
)
from .files import Checkpoint, format_of, open_checkpoint
from .layouts import BY_NAME, KERAS, LAYOUTS, Layout, Tensor, tensors

PREPROCESSINGS: dict[str, PreprocessingSpec] = {"imagenet": PreprocessingSpec(), "advprop": ADVPROP}
"""Transforms that `preprocessing=` takes by name: V1's own, and AdvProp's x / 127.5 - 1."""

_EMA = "/ExponentialMovingAverage"
# What training leaves in a checkpoint beside the weights.
_TENSORFLOW_BOOKKEEPING = ("global_step", "save_counter", "beta1_power", "beta2_power")
_TENSORFLOW_SLOTS = ("/RMSProp", "/RMSProp_1", "/Momentum", "/Adam", "/Adam_1")
_PYTORCH_BOOKKEEPING = ".num_batches_tracked"  # Counts batches; the momentum is a constant here.
_DATA_PARALLEL = "module."

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Args:
        origin: The file.
        layout: Whose names it has, one of `LAYOUTS`.
        spec: The variant with the padding, preprocessing and resolution of these weights; builds
            the same graph for other arguments: `create_model(spec, weights=path, …)`.
        model: The filled model: pixels in 0..255 to probabilities, or to features for a file
            without a classifier.
        classes: Outputs of the classifier, None without one.
        tensors: How many tensors were taken.
        ignored: Tensors that hold no weights: counters, slots of optimizers, and whichever of
            averaged and unaveraged weights was not wanted.
    """

    origin: str
    layout: str
    spec: ModelSpec
    model: keras.Model
    classes: int | None
    tensors: int
    ignored: tuple[str, ...]


def read_checkpoint(
    source: str | os.PathLike,
    *,
    model: str | ModelSpec | None = None,
    layout: str | None = None,
    ema: bool = True,
    preprocessing: str | PreprocessingSpec | None = None,
) -> Conversion:
    """Builds the model that a checkpoint belongs to, with its weights.

    Nothing in a file is executed. Differences are folded in exactly: kernels are transposed, and
    where a batch norm was trained with another epsilon its gamma is rescaled by
    sqrt((variance + ours) / (variance + theirs)).

    Args:
        source: A TensorFlow checkpoint (its prefix, one of its files, its folder, or the `.tar.gz`
            of the official repositories), a PyTorch file (`.pth`, `.pt`, `.bin`, `.safetensors`),
            or a file of Keras or keras.applications (`.h5`, `.weights.h5`, `.keras`).
        model: The variant: its name or spec. None finds it by names and shapes.
        layout: Whose names the file has, one of `LAYOUTS`. None finds it by the names. timm's
            `tf_…` models share theirs with those trained in PyTorch: they are told apart by a
            `config.json` beside the file, else by its name (`tf_efficientnet…`), else not at all.
        ema: Whether to take the exponential moving averages of the weights, which the official
            repositories evaluate. False takes the weights of the last step.
        preprocessing: The input transform, where it is not the usual one of layout and variant: a
            name in `PREPROCESSINGS`, or a spec. AdvProp's checkpoints need `"advprop"`: nothing in
            them tells.

    Returns:
        The model, its spec, and what was done.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the library that reads the file is not installed.
        ValueError: If an argument is out of its range, or layout or variant cannot be told.
        WeightsFileError: If the file is damaged, holds code, or no weights.
        WeightsMismatchError: If the file and the variant do not fit; lists all that does not.
    """
    path = Path(source)
    spec = get_spec(model) if isinstance(model, str) else model
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"`layout` must be None or one of {LAYOUTS}. Received: {layout!r}")
    transform = _transform(preprocessing)
    format = format_of(path)
    if layout is not None and (layout == KERAS) != (format == KERAS):
        raise ValueError(
            f"{str(path)!r} is a file of format {format!r}, which layout={layout!r} does not fit. "
            "Leave `layout` out to have it found."
        )
    if format == KERAS:
        return _from_keras(path, spec, transform)
    with open_checkpoint(path, format, ema) as checkpoint:
        names, ignored = _weight_names(checkpoint, ema)
        chosen = _layout(checkpoint, names, layout, path)
        spec, plan_tensors, classes, channels = _match(checkpoint, names, chosen, spec)
        spec = chosen.adapt(spec, checkpoint.config)
        if chosen.padding is not None:
            spec = replace(spec, padding=chosen.padding)
        spec = _with_transform(spec, transform)
        arrays = _arrays(checkpoint, names, plan_tensors)
        _fold_epsilon(arrays, spec, chosen.bn_epsilon(spec.constructor))
        filled = _build(spec, classes, channels)
        load_weights(filled, StoredWeights(checkpoint.origin, arrays))
        return Conversion(
            checkpoint.origin, chosen.name, spec, filled, classes, len(plan_tensors), ignored
        )


def convert_weights(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    model: str | ModelSpec | None = None,
    layout: str | None = None,
    ema: bool = True,
    preprocessing: str | PreprocessingSpec | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Converts a checkpoint into a `.keras` file.

    The file is complete: `keras.models.load_model(path)` gives the model with its preprocessing,
    without this package. It also holds the spec, crop and interpolation included:
    `create_model(read_spec(path), weights=path, …)` builds it with other arguments.

    Args:
        source: See `read_checkpoint`, as are `model`, `layout`, `ema` and `preprocessing`.
        output: The file to write, ending in `.keras`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What was converted.

    Raises:
        ValueError: If `output` does not end in `.keras`; and as `read_checkpoint`.
        FileExistsError: If the file exists and `overwrite` is False.
        OSError: If it cannot be written; an existing file then stays as it was.
    """
    target = Path(output)
    if target.suffix != ".keras":
        raise ValueError(f"`output` must end in '.keras'. Received: {str(output)!r}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r}. Create it first.")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} exists. Choose another name, or allow it to be replaced "
            "(overwrite=True, on the command line --overwrite)."
        )
    conversion = read_checkpoint(
        source, model=model, layout=layout, ema=ema, preprocessing=preprocessing
    )
    write_model(conversion.model, conversion.spec, target)
    return conversion


def fetch_converted(
    model: str | ModelSpec,
    weights: str,
    *,
    base_url: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Puts an official checkpoint into Keras' cache as a `.keras` file, unless it is there.

    The archive is fetched and verified (`fetch_weights`), converted with the moving averages of
    its weights and the transform that they were trained with, and then removed.

    Args:
        model: A variant: its name, or its spec.
        weights: Name of a training whose file is a checkpoint, see `list_weights`.
        base_url: See `fetch_weights`, as is `cache_dir`.

    Returns:
        Path of the converted file, which holds the spec as well (`read_spec`).

    Raises:
        ValueError: If there is no such official file, or it does not fit its variant.
        WeightsDownloadError: If it cannot be fetched.
        ImportError: If TensorFlow, which reads checkpoints, is not installed.
    """
    source = find_source(model, weights)
    target = models_folder(cache_dir) / f"{SPECS[source.model].name}_{weights}.keras"
    if not target.is_file():
        archive = fetch_weights(model, weights, base_url=base_url, cache_dir=cache_dir)
        # Another process may have converted it meanwhile: to the same.
        convert_weights(
            archive,
            target,
            model=source.model,
            preprocessing=source.preprocessing,
            overwrite=True,
        )
        archive.unlink(missing_ok=True)
    return target


def write_model(model: keras.Model, spec: ModelSpec, target: Path) -> None:
    """Writes a model and its spec as one `.keras` file, whole or not at all."""
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem[:100]}.") as folder:
        partial = Path(folder) / target.name
        with deep_graphs():
            model.save(partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(SPEC_MEMBER, json.dumps({"version": 1, "spec": spec.to_dict()}))
        os.replace(partial, target)


# --- What is in the file ----------------------------------------------------------------------


def _transform(preprocessing: str | PreprocessingSpec | None) -> PreprocessingSpec | None:
    if preprocessing is None or isinstance(preprocessing, PreprocessingSpec):
        return preprocessing
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(
            f"`preprocessing` must be None, one of {tuple(PREPROCESSINGS)}, or a "
            f"PreprocessingSpec. Received: {preprocessing!r}"
        )
    return PREPROCESSINGS[preprocessing]


def _with_transform(spec: ModelSpec, transform: PreprocessingSpec | None) -> ModelSpec:
    if transform is None:
        return spec
    stored = spec.preprocessing.stored_in_weights
    return replace(spec, preprocessing=replace(transform, stored_in_weights=stored))


def _weight_names(checkpoint: Checkpoint, ema: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names of the weights, without what is wrapped around them, to the names in the file."""
    if checkpoint.format == "tensorflow":
        return _tensorflow_names(checkpoint, ema)
    names, ignored = {}, []
    wrapped = all(name.startswith(_DATA_PARALLEL) for name in checkpoint.shapes)
    for stored in checkpoint.shapes:
        if stored.endswith(_PYTORCH_BOOKKEEPING):
            ignored.append(stored)
        else:
            names[stored.removeprefix(_DATA_PARALLEL) if wrapped else stored] = stored
    return names, tuple(ignored)


def _tensorflow_names(checkpoint: Checkpoint, ema: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    marker = BY_NAME["tensorflow"].marker
    scopes = {
        name.removesuffix(marker)
        for name in checkpoint.shapes
        if name.endswith(marker) and not name.removesuffix(marker).rstrip("/").count("/")
    }
    scope = scopes.pop() if len(scopes) == 1 else ""
    raw, averaged, ignored = {}, {}, []
    for stored in checkpoint.shapes:
        name = stored.removeprefix(scope)
        last = name.rpartition("/")[2]
        if last in _TENSORFLOW_BOOKKEEPING or name.endswith(_TENSORFLOW_SLOTS):
            ignored.append(stored)
        elif name.endswith(_EMA):
            averaged[name.removesuffix(_EMA)] = stored
        else:
            raw[name] = stored
    if not ema:
        return raw, (*ignored, *averaged.values())
    without = [name for name in raw if name not in averaged]
    if without:
        raise WeightsMismatchError(
            "\n".join(
                (
                    f"{checkpoint.origin!r} does not hold the moving average ({_EMA[1:]}) of every "
                    "weight; nothing was loaded.",
                    *listed("Without one", without),
                    "Take the weights of the last step instead: ema=False, on the command line "
                    "--no-ema.",
                )
            )
        )
    return averaged, (*ignored, *raw.values())


def _layout(
    checkpoint: Checkpoint, names: Mapping[str, str], layout: str | None, path: Path
) -> Layout:
    """The layout asked for, or the one that the names have."""
    found = [each for each in BY_NAME.values() if each.marker in names]
    if not found:
        raise WeightsFileError(
            f"{checkpoint.origin!r} has the names of none of the layouts {LAYOUTS}: it lacks the "
            f"kernel of the stem, one of {sorted({each.marker for each in BY_NAME.values()})}. "
            f"Received: {len(names)} tensors, such as {sorted(names)[:5]}"
        )
    if layout is not None:
        if BY_NAME[layout] not in found:
            raise WeightsMismatchError(
                f"{checkpoint.origin!r} does not have the names of layout={layout!r}, which has "
                f"{BY_NAME[layout].marker!r}. It looks like "
                f"{' or '.join(repr(each.name) for each in found)}."
            )
        return BY_NAME[layout]
    if len(found) == 1:
        return found[0]
    # timm's: the same names whichever framework they were trained in.
    for text in (str(checkpoint.config.get("architecture", "")), path.name, path.parent.name):
        if "tf_efficientnet" in text:
            return BY_NAME["timm-tf"]
        if "efficientnet" in text and "_" in text:
            return BY_NAME["timm"]
    raise ValueError(
        f"{checkpoint.origin!r} is a file of timm, but nothing tells whether the model was called "
        "tf_efficientnet… (trained in TensorFlow, and padded as there) or efficientnet… (PyTorch). "
        "Say which: layout='timm-tf' or layout='timm', on the command line --layout."
    )


def _match(
    checkpoint: Checkpoint, names: Mapping[str, str], layout: Layout, spec: ModelSpec | None
) -> tuple[ModelSpec, list[Tensor], int | None, int]:
    """The variant whose tensors these are, its tensors, classes and input channels.

    Raises:
        WeightsMismatchError: If they are no variant's, or not those of the given one.
    """
    shapes = {name: tuple(checkpoint.shapes[stored]) for name, stored in names.items()}
    stem = shapes[layout.marker]
    channels = stem[1 if layout.transposed else 2] if len(stem) == 4 else 3
    head = _head(layout)
    classes = None
    if any(name.startswith(f"{head}{separator}") for name in names for separator in "./"):
        kernel = shapes.get(head + layout.parameters["kernel"], ())
        classes = (kernel[0] if layout.transposed else kernel[1]) if len(kernel) == 2 else 1

    best = None
    for candidate in SPECS.values() if spec is None else (spec,):
        plan = resolve(candidate, channels=max(1, channels), classes=classes)
        expected = tensors(plan, layout)
        if expected is None:
            continue
        problems = _problems(expected, shapes)
        count = sum(map(len, problems))
        if best is None or count < best[0]:
            best = count, candidate, expected, problems
    if best is None:
        raise WeightsMismatchError(
            f"The layout {layout.name!r} has no {spec.constructor}. Received: {checkpoint.origin!r}"
        )
    count, candidate, expected, (missing, unexpected, misshapen) = best
    wrong_type = [
        f"{tensor.source} ({dtype})"
        for tensor in expected
        if tensor.source in names
        and (dtype := checkpoint.dtypes[names[tensor.source]]) not in _FLOATS
    ]
    if count or wrong_type:
        raise WeightsMismatchError(
            "\n".join(
                (
                    f"The tensors of {checkpoint.origin!r} (layout {layout.name!r}) are not those "
                    f"of {candidate.constructor}{'' if spec else ', the closest variant'}; nothing "
                    "was loaded.",
                    *listed("Missing in the file", missing),
                    *listed("Unexpected, not of this variant", unexpected),
                    *listed("Misshapen", misshapen),
                    *listed(f"Not of a type among {_FLOATS}", wrong_type),
                    "Leave `model` out to have the variant found, or convert the complete file "
                    "of one variant of `list_models()`.",
                )
            )
        )
    return candidate, expected, classes, channels


def _head(layout: Layout) -> str:
    """Name of the classifier's module; the same for every variant of a layout."""
    return layout.modules(resolve("EfficientNetB0"))[HEAD]


def _problems(
    expected: list[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    wanted = {tensor.source: tensor.shape for tensor in expected}
    return (
        [name for name in wanted if name not in shapes],
        [name for name in shapes if name not in wanted],
        [
            f"{name} (variant {shape}, file {shapes[name]})"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
    )


# --- Values -----------------------------------------------------------------------------------


def _arrays(
    checkpoint: Checkpoint, names: Mapping[str, str], expected: list[Tensor]
) -> dict[str, dict[str, np.ndarray]]:
    """The weights by our layers and variables, float32."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    not_finite = []
    for tensor in expected:
        array = np.asarray(checkpoint.read(names[tensor.source])).astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            not_finite.append(tensor.source)
        if tensor.axes is not None:
            array = np.transpose(array, tensor.axes)
        arrays.setdefault(tensor.layer, {})[tensor.variable] = array
    if not_finite:
        raise WeightsMismatchError(
            "\n".join(
                (
                    f"{checkpoint.origin!r} holds NaN or infinite values; nothing was loaded.",
                    *listed("Not finite", not_finite),
                )
            )
        )
    return arrays


def _fold_epsilon(
    arrays: dict[str, dict[str, np.ndarray]], spec: ModelSpec, epsilon: float
) -> None:
    """Rescales gamma where a batch norm was trained with another epsilon.

    gamma / sqrt(variance + epsilon) stays what it was. The variance itself cannot take the
    difference up: it would become negative where it is smaller than that.
    """
    if epsilon == spec.bn_epsilon:
        return
    for layer in list(arrays):
        if layer.endswith("_bn"):
            norm = arrays[layer]
            variance = norm["moving_variance"].astype(np.float64)
            factor = np.sqrt((variance + spec.bn_epsilon) / (variance + epsilon))
            norm["gamma"] = (norm["gamma"] * factor).astype(np.float32)


def _build(spec: ModelSpec, classes: int | None, channels: int) -> keras.Model:
    side = spec.resolution if classes is not None else None
    shape = (side, side, channels)
    if keras.config.image_data_format() == "channels_first":
        shape = (channels, side, side)
    return build(
        spec,
        include_top=classes is not None,
        input_shape=shape,
        classes=1000 if classes is None else classes,
    )


def _from_keras(
    path: Path, spec: ModelSpec | None, transform: PreprocessingSpec | None
) -> Conversion:
    """A file of Keras: read by layer name, as `load_weights` does."""
    stored = read_weights(path)
    spec = spec or read_spec(path) or variant_of(stored)
    if spec is None:
        raise ValueError(
            f"{str(path)!r} does not tell its variant"
            f"{' (it holds no layer names)' if stored.by_counter else ''}. Name it: model=…, on "
            "the command line --model."
        )
    spec = _with_transform(spec, transform)
    head = stored.layers.get(HEAD) or stored.layers.get("dense" if stored.by_counter else HEAD)
    classes = None
    if head:
        classes = next((array.shape[1] for array in head.values() if array.ndim == 2), None)
    stem = stored.layers.get(STEM) or {}
    channels = next((array.shape[2] for array in stem.values() if array.ndim == 4), 3)
    filled = _build(spec, classes, channels)
    # A transform of the caller's must not be overwritten by the file's constants.
    report = load_weights(filled, stored, ignore=() if transform is None else ("normalization",))
    count = sum(len(stored.layers.get(name, ())) for name in stored.layers)
    return Conversion(str(path), KERAS, spec, filled, classes, count, report.ignored)
