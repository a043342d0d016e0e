"""How other projects call the tensors of the family: one explicit map of names for each.

A map follows from the plan of a variant, so that every tensor that a file should hold is known by
name and shape before any is read. Sources of the names:

- `tensorflow`: tensorflow/tpu, models/official/efficientnet/efficientnet_model.py (V1, Lite,
  EdgeTPU), and google/automl, efficientnetv2/effnetv2_model.py (V2), which keeps to them. Layers
  are numbered by scope in the order of their first call.
- `timm`, `timm-tf`: huggingface/pytorch-image-models, timm/models/efficientnet.py and
  _efficientnet_blocks.py. The models `tf_…` have the same names as the others, but were trained
  with TensorFlow's padding and batch norm epsilon.
- `torchvision`: pytorch/vision, torchvision/models/efficientnet.py.
- `lukemelas`: lukemelas/EfficientNet-PyTorch, efficientnet_pytorch/model.py (V1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..scaling import BlockPlan, ConvPlan, ModelPlan
from ..specs import ADVPROP, ModelSpec, PreprocessingSpec

KERAS = "keras"

# Module names of a plan: name of our layer to name of theirs.
Modules = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """How a project names and computes its models.

    Args:
        name: As `layout=` takes it.
        marker: End of the name of the stem's kernel, by which a file of this layout is known.
        modules: The map of layers, or None if the layout has no such models.
        parameters: Name of a weight of a Keras layer to what follows the module's name.
        transposed: Whether kernels are stored as PyTorch has them, outputs first.
        padding: `"torch"`, or None for the variant's own.
        bn_epsilon: Of a variant, by the name of its constructor.
        adapt: Gives a variant the preprocessing that the project uses with its weights.
    """

    name: str
    marker: str
    modules: Callable[[ModelPlan], Modules | None]
    parameters: Mapping[str, str]
    transposed: bool
    padding: str | None
    bn_epsilon: Callable[[str], float]
    adapt: Callable[[ModelSpec, Mapping[str, Any]], ModelSpec]


@dataclass(frozen=True)
class Tensor:
    """A tensor that a file should hold.

    Args:
        source: Its name there.
        layer: The layer of ours that takes it.
        variable: Name of the weight.
        shape: In the file.
        axes: Order of its axes in Keras, or None if it is the same.
    """

    source: str
    layer: str
    variable: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None


def batch_norm_of(convolution: str) -> str:
    """Name of the batch norm behind a convolution: `block2a_dwconv` has `block2a_bn`."""
    for suffix in ("dwconv", "dwconv2", "conv"):
        if convolution.endswith(f"_{suffix}"):
            return f"{convolution.removesuffix(suffix)}bn"
    raise ValueError(f"Layer {convolution!r} has no batch norm.")


def tensors(plan: ModelPlan, layout: Layout) -> list[Tensor] | None:
    """Every tensor of a variant in a layout; None if the layout has no such variant."""
    modules = layout.modules(plan)
    if modules is None:
        return None
    found = []

    def add(layer: str, variable: str, shape: tuple[int, ...], axes=None, parameter=None) -> None:
        suffix = layout.parameters[parameter or variable]
        if axes is not None:
            # `shape` is Keras'; axis i of Keras is axis axes[i] of the file.
            shape = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
        found.append(Tensor(f"{modules[layer]}{suffix}", layer, variable, shape, axes))

    for conv in plan.convolutions:
        torch = layout.transposed
        if conv.name == "predictions":
            shape = (conv.input_filters, conv.output_filters)
            add(conv.name, "kernel", shape, (1, 0) if torch else None)
        elif conv.depthwise:
            shape = (conv.kernel_size, conv.kernel_size, conv.input_filters, 1)
            axes = (2, 3, 0, 1) if torch else None
            add(conv.name, "kernel", shape, axes, parameter="depthwise_kernel")
        else:
            shape = (conv.kernel_size, conv.kernel_size, conv.input_filters, conv.output_filters)
            add(conv.name, "kernel", shape, (2, 3, 1, 0) if torch else None)
        if conv.batch_norm:
            for variable in ("gamma", "beta", "moving_mean", "moving_variance"):
                add(batch_norm_of(conv.name), variable, (conv.output_filters,))
        else:
            add(conv.name, "bias", (conv.output_filters,))
    return found


# --- Names ------------------------------------------------------------------------------------


def _role(block: BlockPlan, conv: ConvPlan) -> str:
    """What a convolution does in its block: expand, depthwise, se_reduce, se_expand, project."""
    if conv.depthwise:
        return "depthwise"
    return conv.name.removeprefix(block.name).removesuffix("_conv")


def _blocks(plan: ModelPlan) -> Iterable[tuple[int, int, int, BlockPlan]]:
    """Blocks with their index, the index of their stage, and their index in it, from 0."""
    within = -1
    for index, block in enumerate(plan.blocks):
        first = index == 0 or plan.blocks[index - 1].stage != block.stage
        within = 0 if first else within + 1
        yield index, block.stage - 1, within, block


def _ends(plan: ModelPlan, stem: str, stem_bn: str, top: str, top_bn: str, head: str) -> Modules:
    modules = {"stem_conv": stem, "stem_bn": stem_bn, "top_conv": top, "top_bn": top_bn}
    return modules if plan.classes is None else {**modules, "predictions": head}


def _named(block: BlockPlan, names: Mapping[str, tuple[str, str | None]], prefix: str) -> Modules:
    """Modules of a block from the names of each role's convolution and batch norm."""
    modules = {}
    for conv in block.convolutions:
        module, norm = names[_role(block, conv)]
        modules[conv.name] = prefix + module
        if conv.batch_norm:
            modules[batch_norm_of(conv.name)] = prefix + norm
    return modules


def _tensorflow(plan: ModelPlan) -> Modules:
    norm = "tpu_batch_normalization"
    modules = _ends(
        plan, "stem/conv2d", f"stem/{norm}", "head/conv2d", f"head/{norm}", "head/dense"
    )
    for index, _, _, block in _blocks(plan):
        names = {"se_reduce": ("se/conv2d", None), "se_expand": ("se/conv2d_1", None)}
        convolutions = norms = 0
        for conv in block.convolutions:
            role = _role(block, conv)
            if role in names:
                continue
            own_norm = f"{norm}_{norms}" if norms else norm
            norms += 1
            if role == "depthwise":
                names[role] = ("depthwise_conv2d", own_norm)
            else:
                names[role] = (f"conv2d_{convolutions}" if convolutions else "conv2d", own_norm)
                convolutions += 1
        modules.update(_named(block, names, f"blocks_{index}/"))
    return modules


_TIMM_SE = {"se_reduce": ("se.conv_reduce", None), "se_expand": ("se.conv_expand", None)}
_TIMM_BLOCKS = {
    ("mbconv", True): {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
    },
    ("mbconv", False): {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
    ("fused_mbconv", True): {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")},
    ("fused_mbconv", False): {"project": ("conv", "bn1")},
}


def _timm(plan: ModelPlan) -> Modules:
    modules = _ends(plan, "conv_stem", "bn1", "conv_head", "bn2", "classifier")
    for _, stage, within, block in _blocks(plan):
        names = {**_TIMM_SE, **_TIMM_BLOCKS[block.block, block.expands]}
        modules.update(_named(block, names, f"blocks.{stage}.{within}."))
    return modules


def _torchvision(plan: ModelPlan) -> Modules:
    top = f"features.{len(plan.spec.stages) + 1}"
    modules = _ends(plan, "features.0.0", "features.0.1", f"{top}.0", f"{top}.1", "classifier.1")
    for _, stage, within, block in _blocks(plan):
        names, position = {}, 0
        for conv in block.convolutions:
            role = _role(block, conv)
            if role in ("se_reduce", "se_expand"):  # One module holds both.
                names[role] = (f"{position}.{'fc1' if role == 'se_reduce' else 'fc2'}", None)
                position += role == "se_expand"
            else:
                names[role] = (f"{position}.0", f"{position}.1")
                position += 1
        modules.update(_named(block, names, f"features.{stage + 1}.{within}.block."))
    return modules


_LUKEMELAS_BLOCK = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "se_reduce": ("_se_reduce", None),
    "se_expand": ("_se_expand", None),
    "project": ("_project_conv", "_bn2"),
}


def _lukemelas(plan: ModelPlan) -> Modules | None:
    if any(block.block != "mbconv" for block in plan.blocks):
        return None
    modules = _ends(plan, "_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc")
    for index, _, _, block in _blocks(plan):
        modules.update(_named(block, _LUKEMELAS_BLOCK, f"_blocks.{index}."))
    return modules


# --- What goes with the weights ---------------------------------------------------------------

# Inception's transform, which timm's ports of V2, Lite and EdgeTPU use.
_INCEPTION = {
    "scale": ADVPROP.scale,
    "offset": ADVPROP.offset,
    "mean": ADVPROP.mean,
    "std": ADVPROP.std,
}


def _as_published(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    return spec


def _imagenet(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    return _with(spec, PreprocessingSpec())


def _with(spec: ModelSpec, preprocessing: PreprocessingSpec, **changes: Any) -> ModelSpec:
    """A spec with another transform; whether its constants are weights stays the variant's."""
    stored = spec.preprocessing.stored_in_weights
    preprocessing = replace(preprocessing, stored_in_weights=stored)
    return replace(spec, preprocessing=preprocessing, **changes)


def _timm_own(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    return _timm_config(_imagenet(spec, config), config)


def _timm_port(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    if spec.preprocessing.mean is None:
        preprocessing = replace(spec.preprocessing, **_INCEPTION)
        spec = replace(spec, preprocessing=preprocessing)
    return _timm_config(spec, config)


def _timm_config(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    """What `config.json` of a timm repository says: mean, std, size, crop, interpolation."""
    values = config.get("pretrained_cfg", config)
    if not isinstance(values, Mapping):
        return spec
    preprocessing, resolution = spec.preprocessing, spec.resolution
    if "mean" in values and "std" in values:
        mean, std = tuple(values["mean"]), tuple(values["std"])
        if mean == std == (0.5, 0.5, 0.5):
            preprocessing = replace(preprocessing, **_INCEPTION)
        else:
            preprocessing = replace(preprocessing, scale=1 / 255, offset=0.0, mean=mean, std=std)
    size = values.get("input_size")
    if size:
        resolution = int(size[-1])
    if "crop_pct" in values:
        # timm resizes the short side to size / crop_pct, then crops.
        padding = max(0, round(resolution / values["crop_pct"]) - resolution)
        preprocessing = replace(preprocessing, crop_padding=padding)
    if values.get("interpolation") in ("bicubic", "bilinear"):
        preprocessing = replace(preprocessing, interpolation=values["interpolation"])
    return replace(spec, preprocessing=preprocessing, resolution=resolution)


# Input side, and how much larger the short side is before the crop, of torchvision's default
# weights (`EfficientNet_…_Weights.DEFAULT`).
_TORCHVISION_SIZES = {
    "EfficientNetB0": (224, 32, "bicubic"),
    "EfficientNetB1": (240, 15, "bilinear"),
    "EfficientNetB2": (288, 0, "bicubic"),
    "EfficientNetB3": (300, 20, "bicubic"),
    "EfficientNetB4": (380, 4, "bicubic"),
    "EfficientNetB5": (456, 0, "bicubic"),
    "EfficientNetB6": (528, 0, "bicubic"),
    "EfficientNetB7": (600, 0, "bicubic"),
    "EfficientNetV2S": (384, 0, "bilinear"),
    "EfficientNetV2M": (480, 0, "bilinear"),
    "EfficientNetV2L": (480, 0, "bicubic"),
}


def _torchvision_transforms(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    side, padding, interpolation = _TORCHVISION_SIZES.get(
        spec.constructor, (spec.resolution, 32, "bicubic")
    )
    preprocessing = PreprocessingSpec(crop_padding=padding, interpolation=interpolation)
    if spec.constructor == "EfficientNetV2L":
        preprocessing = replace(preprocessing, **_INCEPTION)
    return _with(spec, preprocessing, resolution=side)


_TENSORFLOW_EPSILON, _PYTORCH_EPSILON = 1e-3, 1e-5
# torchvision's ports of these keep TensorFlow's epsilon, though not its padding.
_TORCHVISION_TENSORFLOW_EPSILON = ("EfficientNetB5", "EfficientNetB6", "EfficientNetB7")


def _tensorflow_epsilon(constructor: str) -> float:
    return _TENSORFLOW_EPSILON


def _pytorch_epsilon(constructor: str) -> float:
    return _PYTORCH_EPSILON


def _torchvision_epsilon(constructor: str) -> float:
    ported = constructor in _TORCHVISION_TENSORFLOW_EPSILON
    return _TENSORFLOW_EPSILON if ported or "V2" in constructor else _PYTORCH_EPSILON


_KERAS_PARAMETERS = {
    "kernel": "/kernel",
    "depthwise_kernel": "/depthwise_kernel",
    "bias": "/bias",
    "gamma": "/gamma",
    "beta": "/beta",
    "moving_mean": "/moving_mean",
    "moving_variance": "/moving_variance",
}
_TORCH_PARAMETERS = {
    "kernel": ".weight",
    "depthwise_kernel": ".weight",
    "bias": ".bias",
    "gamma": ".weight",
    "beta": ".bias",
    "moving_mean": ".running_mean",
    "moving_variance": ".running_var",
}


def _pytorch(name, marker, modules, padding, bn_epsilon, adapt) -> Layout:
    return Layout(name, marker, modules, _TORCH_PARAMETERS, True, padding, bn_epsilon, adapt)


_LAYOUTS = (
    Layout(
        "tensorflow",
        "stem/conv2d/kernel",
        _tensorflow,
        _KERAS_PARAMETERS,
        False,
        None,
        _tensorflow_epsilon,
        _as_published,
    ),
    _pytorch("timm", "conv_stem.weight", _timm, "torch", _pytorch_epsilon, _timm_own),
    _pytorch("timm-tf", "conv_stem.weight", _timm, None, _tensorflow_epsilon, _timm_port),
    _pytorch(
        "torchvision",
        "features.0.0.weight",
        _torchvision,
        "torch",
        _torchvision_epsilon,
        _torchvision_transforms,
    ),
    _pytorch("lukemelas", "_conv_stem.weight", _lukemelas, None, _tensorflow_epsilon, _imagenet),
)

BY_NAME: dict[str, Layout] = {layout.name: layout for layout in _LAYOUTS}

LAYOUTS: tuple[str, ...] = (*BY_NAME, KERAS)
"""Names that `layout=` takes."""
